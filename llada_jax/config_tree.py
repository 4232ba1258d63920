"""Walks over trees of settings, which are dataclasses in dataclasses, whatever settings they hold."""

import dataclasses
import typing
from collections.abc import Iterator


def differences(old, new) -> dict[str, tuple]:
    """Returns the settings of two trees that differ, as a dict from the dotted name to (old, new)."""
    after = dict(leaves(new))
    return {name: (value, after[name]) for name, value in leaves(old) if not _same(value, after[name])}


def _same(one, other) -> bool:
    # 1 and 1.0 are equal in Python, but in a schedule 1 is a step and 1.0 a fraction of the run.
    return one == other and (not isinstance(one, tuple) or repr(one) == repr(other))


def leaves(node, prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Yields (dotted name, value) for every setting below `node`."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
