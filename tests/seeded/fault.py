"""Defines what a seeded fault is."""

import dataclasses
from pathlib import PurePosixPath


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one file that breaks something a user relies on."""

    name: str
    file: str  # relative to the root of the source tree
    old: str  # the text that is replaced; it must occur exactly once in the file
    new: str
    harm: str  # one sentence that says what the fault would do to a user
    tests: tuple[str, ...]  # node ids of the tests that should catch it, relative to tests/

    @property
    def wing(self) -> str:
        """The wing of the package that the file is in; "loading" and "launch" stand for the files outside all wings."""
        parts = PurePosixPath(self.file).parts
        return PurePosixPath(parts[1]).stem if parts[0] == "llada_jax" else parts[0]

    @property
    def node_ids(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests]
