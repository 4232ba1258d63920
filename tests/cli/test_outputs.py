"""Tests that a text file is written whole or not at all; tests/data/test_output.py does the same for folders."""

import pytest

from llada_jax.cli.outputs import write_text
from llada_jax.config import UserError


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    with pytest.raises(UserError, match="--output=.*no.*No such file"):
        write_text(tmp_path / "no" / "results.json", "new")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
