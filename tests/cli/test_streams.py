"""Tests that what cannot be printed neither ends in a traceback nor is lost without a word."""

import os
import subprocess
import sys

import pytest
from paths import PYTHONPATH

TEXT = "a é → 漢 \U0001f600 z"


def command(main: str, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """Runs a command whose main program is the body `main` through a shell that redirects its streams."""
    program = "import sys\nfrom llada_jax.cli import entry_point, streams\n"
    program += "\n".join(["def main():", *("    " + line for line in main.splitlines()), "entry_point.run(main)"])
    unset = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" "$@" {shell}', sys.executable, "-c", program],
        capture_output=True, check=False, env=kept | {"PYTHONPATH": PYTHONPATH} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "written"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"a \xe9 \u2192 \u6f22 \U0001f600 z"),
        ({"PYTHONIOENCODING": "latin-1"}, b"a \xe9 \\u2192 \\u6f22 \\U0001f600 z"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"a \xe9 \u2192 \u6f22 \U0001f600 z"),
        ({"LC_ALL": "C"}, TEXT.encode()),
        ({"PYTHONIOENCODING": "utf-8"}, TEXT.encode()),
    ],
)
def test_no_text_is_lost_in_another_encoding(environment, written):
    done = command(f"print({TEXT!a})\nprint({TEXT!a}, file=sys.stderr)", **environment)
    assert (done.returncode, done.stdout.rstrip(b"\n")) == (0, written), done.stderr
    assert done.stderr.rstrip(b"\n") == written


def test_a_lone_surrogate_can_be_printed():
    done = command(r"print('a \ud800 z')", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, b"a \\ud800 z\n")


def test_closed_streams():
    """Python has no stream then: print would do nothing, or write what belongs to stderr to stdout."""
    done = command("streams.require_stdout('pass --output=FILE')", ">&-")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: stdout is closed, so the result would be lost: pass --output=FILE\n"
    done = command("print('result')\nprint('note', file=sys.stderr)\nraise entry_point.UserError('x')", "2>&-")
    assert (done.returncode, done.stdout) == (2, b"result\n")


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """What a library prints to stderr would land in the file."""
    main = (
        f"import os\nwith open({str(tmp_path / 'f')!r}, 'w') as file:\n    os.write(2, b'noise')\n    file.write('x')"
    )
    assert command(main, "2>&- >&- <&-").returncode == 0
    assert (tmp_path / "f").read_text() == "x"


@pytest.mark.parametrize("length", [1, 100_000])  # one that is buffered, and one that print itself writes
def test_a_full_disk(length):
    done = command(f"print('x' * {length})", ">/dev/full")
    assert done.returncode == 1
    assert done.stderr == b"error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_that_has_gone(length):
    done = command(f"import time\ntime.sleep(0.2)\nprint('x' * {length})", "| true")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_training_outlives_the_reader_of_its_lines():
    main = "import time\ntime.sleep(0.2)\nfrom llada_jax.devices.distributed import log\n"
    main += "for i in range(3):\n    log('x' * 9000)\nprint('done')"
    done = command(main, "2> >(true)")
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_help_without_a_stdout():
    done = command("pass", "--help >&-")
    assert done.returncode == 2 and done.stderr.startswith(b"error: stdout is closed") and done.stderr.count(b"\n") == 1
