"""Describes every setting of the config tree, for --help and for the pages of the documentation.

The descriptions are the comments in `config.py`: the comment lines above a field, and the comment behind it.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any

from llada_jax import config as configs
from llada_jax.config import Config, leaves

_INTRODUCTION = (
    "settings, each set by --config.NAME=VALUE after --config=FILE:",
    "A bool is written true or false, a tuple (0.25,0.75) or ('one text','another text'), and an empty str as nothing, "
    "--config.NAME=. None can be set only in a config file.",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the config tree."""

    name: str  # the dotted name without "config.", for example "optimizer.beta1"
    type: str  # the type in words, for example "int or None"
    default: Any  # the value that the setting has if neither a config file nor a flag sets it
    comment: str  # what config.py says about it; the items of a list are lines of their own, indented by two spaces
    section: str  # the dotted name of the section, for example "optimizer"; "" for a setting of Config itself


def settings() -> Iterator[Setting]:
    """Yields all settings in the order of `config.py`, those of a section before those of its subsections."""
    for section, kind in sections().items():
        hints, comments, default = typing.get_type_hints(kind), _comments(kind.__name__), kind()
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            name = f"{section}.{field.name}" if section else field.name
            value = getattr(default, field.name)
            yield Setting(name, _in_words(hints[field.name]), value, comments.get(field.name, ""), section)


def sections(kind: type = Config, name: str = "") -> dict[str, type]:
    """Returns the dataclass of each section by the section's dotted name; the name of `Config` itself is ""."""
    found = {name: kind}
    for field, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= sections(hint, f"{name}.{field}" if name else field)
    return found


def render(width: int, config: Config | None = None, file: str = "") -> str:
    """Returns a description of all settings for a terminal.

    Args:
      width: The maximum number of columns. Only a word that is longer than that makes a longer line.
      config: The config whose values are shown beside the defaults that they differ from. None means no config.
      file: The name of the file that `config` comes from, for example "configs/8b.py".
    """
    values = {} if config is None else dict(leaves(config))
    blocks = [_fill(paragraph, width, "", "") for paragraph in _INTRODUCTION]
    if values:
        blocks.append(_fill(f"The values of {file} are shown where they differ from the defaults.", width, "", ""))
    by_section: dict[str, list[Setting]] = {name: [] for name in sections()}
    for setting in settings():
        by_section[setting.section].append(setting)
    for section, kind in sections().items():
        head, *rest = inspect.getdoc(kind).split("\n\n")
        title = f"config.{section}" if section else "config"
        blocks.append(_fill(f"{title}: {head}", width, "", "  "))
        blocks += [_fill(paragraph, width, "  ", "  ") for paragraph in rest]
        blocks += [_entry(setting, values, file, width) for setting in by_section[section]]
    return "\n\n".join(blocks) + "\n"


def _entry(setting: Setting, values: dict[str, Any], file: str, width: int) -> str:
    value = values.get(setting.name, setting.default)
    # 1 and 1.0 differ in a schedule.
    differs = repr(value) != repr(setting.default) and (value != setting.default or isinstance(value, tuple))
    shown = f"{value!r} in {file}, " if differs else ""
    title = f"--config.{setting.name} ({setting.type}, {shown}default {setting.default!r})"
    lines = [_fill(title, width, "  ", "    ")]
    for line in setting.comment.splitlines():
        item = re.match(r"  (\S+ +)", line)
        lines.append(_fill(line.strip(), width, " " * 8, " " * (8 + len(item[1]))) if item else _fill(line, width))
    return "\n".join(lines)


def _fill(text: str, width: int, first: str = " " * 6, others: str = " " * 6) -> str:
    lines = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return lines.fill(text) if text else ""


def _in_words(hint: Any) -> str:
    """Returns the name of a type as a user would say it, for example "tuple of str"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("None" if argument is type(None) else _in_words(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"tuple of {_in_words(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(_in_words, arguments))})"
    return hint.__name__


@functools.cache
def _source() -> tuple[dict[str, ast.ClassDef], dict[int, str], frozenset[int]]:
    """Returns what `config.py` says: its classes by name, its comments by line, and the lines with nothing else."""
    text = inspect.getsource(configs)
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            comments[line] = token.string.removeprefix("#").removeprefix(" ").rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(line)
    return classes, comments, frozenset(alone)


def _comments(class_name: str) -> dict[str, str]:
    """Returns the comment of each field of a class in `config.py`."""
    classes, comments, alone = _source()
    found = {}
    for node in classes[class_name].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
            found[node.target.id] = _joined(lines)
    return found


def _joined(lines: list[str]) -> str:
    """Joins the lines of a comment, except that each item of a list stays a line of its own.

    An item is indented, and has at least two spaces between its name and its meaning. What is indented without that
    continues the item before.
    """
    joined: list[str] = []
    for line in lines:
        in_list, indented = bool(joined) and joined[-1].startswith("  "), line.startswith("  ")
        if re.match(r" {2,}\S+ {2,}\S", line):
            joined.append("  " + line.strip())
        elif joined and in_list == indented:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    return "\n".join(joined)
