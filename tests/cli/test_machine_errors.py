"""Tests that errors of the machine are told from damaged files, however a library reports them."""

import errno
import os

import pytest

from llada_jax.cli.machine_errors import check_readable, machine_error, reason
from llada_jax.config import UserError


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EACCES])
def test_machine_errors(code):
    direct = OSError(code, os.strerror(code), "file")
    caused = ValueError("NOT_FOUND")
    caused.__cause__ = direct
    assert machine_error(direct) is direct and machine_error(caused) is direct
    text = RuntimeError(f"Error reading array: [OS error {code}: {os.strerror(code)}] in kvstore")
    found = machine_error(text, "place")
    assert (found.errno, found.filename) == (code, "place")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "f"), ValueError("bad magic"), OSError("x")]
)
def test_damage(error):
    assert machine_error(error) is None


def test_words(tmp_path):
    assert reason(OSError(errno.EMFILE, "Too many open files")).endswith(
        "allow this program more open files (ulimit -n)"
    )
    assert reason(OSError(errno.ENOSPC, "x")) == "no space left on the disk"
    (tmp_path / "f").write_bytes(b"x" * 10)
    check_readable(tmp_path / "f")
    with pytest.raises(UserError, match="none is missing"):
        check_readable(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        check_readable(tmp_path)
