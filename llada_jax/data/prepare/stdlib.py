"""The corpus every machine has: the source files of the running interpreter's standard library.

About 10 MB of real text, without a download. Tests and generated tables are left out.
"""

import sysconfig
import tokenize
from pathlib import Path

from llada_jax.config import UserError

_LEFT_OUT_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",  # character tables
    "idle_test",
    "lib-dynload",
    "pydoc_data",  # generated
    "site-packages",
    "test",
    "tests",
}
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata", "entities.py", "stringprep.py", "test_")


def source_files() -> list[Path]:
    """The files in a fixed order; raises UserError if the interpreter came without them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if _LEFT_OUT_FOLDERS.isdisjoint(parts) and not any(part.startswith(_LEFT_OUT_PREFIXES) for part in parts):
            files.append(file)
    if not files:
        raise UserError(f"this Python has no standard-library sources in {root}: give text files as input instead")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def read_source(file: Path) -> str:
    """The text of one file; empty if it is not valid Python text."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
