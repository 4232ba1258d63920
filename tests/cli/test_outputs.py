"""Tests that a text file is written whole or not at all; tests/data/test_output.py does the same for folders."""

import os
import re
import subprocess
import sys

import pytest
from paths import PYTHONPATH

from llada_jax.cli.outputs import check_file, write_text
from llada_jax.config import UserError


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "old")

    def fill_the_disk(file, content):
        with open(file, "wb") as stream:
            stream.write(content[:1])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="--output=.*: the disk is full"):
        patch.setattr(type(path), "write_bytes", fill_the_disk)
        write_text(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="--output=.*no.*No such file"):
        write_text(tmp_path / "no" / "results.json", "new")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert check_file(tmp_path / "pipe") == tmp_path / "pipe"
    write_text(tmp_path / "pipe", "x")
    assert os.read(reader, 9) == b"x" and [path.name for path in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)


@pytest.mark.parametrize(
    ("shell", "code", "content", "said"),
    [
        (">> file", 0, "old\nbefore\ntext é\nafter\n", ""),
        ("| cat > file", 0, "before\ntext é\nafter\n", ""),
        (">&-", 2, "old\n", "error: stdout is closed, .*: name another file than --output=/proc/self/fd/1\n"),
    ],
)
def test_a_name_of_stdout_is_written_to_and_not_replaced(tmp_path, shell, code, content, said):
    """Where stdout leads to a file, the name of stdout would be replaced by a file (/dev/stdout itself, for root)."""
    main = "from llada_jax.cli import entry_point, outputs\n"
    main += "def main():\n    path = outputs.check_file('/proc/self/fd/1')\n    print('before')\n"
    main += "    outputs.write_text(path, 'text \\u00e9\\n')\n    print('after')\nentry_point.run(main)"
    (tmp_path / "file").write_text("old\n")
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" "$@" {shell}', sys.executable, "-c", main],
        cwd=tmp_path, capture_output=True, check=False, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert done.returncode == code and re.fullmatch(said, done.stderr)
    assert (tmp_path / "file").read_text() == content and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "--output=. is a folder; pass the name of a file"),
        ("none/x", "--output=none/x: there is no folder /.*/none; create it first"),
        ("gs://bucket/x", "--output=gs://bucket/x: name a file on this machine"),
        ("x" * 300, "--output=x+ cannot be written: File name too long"),
        ("a\0b", "--output=a.b cannot be written: .*null"),
        ("file/x", "--output=file/x: there is no folder"),
        ("/dev/fd/999", "--output=/dev/fd/999 cannot be written: Bad file descriptor"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        check_file(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
