"""Provides a corpus that every machine has: the source files of the running interpreter's standard library.

These are about 10 MB of real text that need no download. Tests and generated tables are left out.
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
    """Returns the source files in a fixed order.

    Raises:
      UserError: If the interpreter was installed without the sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if _LEFT_OUT_FOLDERS.isdisjoint(parts) and not any(part.startswith(_LEFT_OUT_PREFIXES) for part in parts):
            files.append(file)
    if not files:
        raise UserError(
            f"input stdlib: this Python has no standard-library sources in {root}; give text files as input instead"
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def read_source(file: Path) -> str:
    """Returns the text of one file, or an empty text if its encoding is unknown or wrong."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
