import fcntl
import os
import signal

import pytest

from llada_jax.cli.outputs import temporary_folder
from llada_jax.config import UserError
from llada_jax.data.prepare.output import publish, refuse_existing

from .test_manifest import MANIFEST


def test_published_at_the_end(tmp_path):
    target = tmp_path / "deep" / "set"
    with temporary_folder(target) as folder:
        (folder / "train-00000.arrayrecord").write_bytes(b"x")
        assert not target.exists()
        publish(folder, target, MANIFEST)
    assert sorted(os.listdir(target)) == ["manifest.json", "train-00000.arrayrecord"]
    assert os.listdir(target.parent) == ["set"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_gone_after_any_exception(tmp_path, error):
    with pytest.raises(error), temporary_folder(tmp_path / "set") as folder:
        (folder / "half").write_bytes(b"x")
        raise error
    assert os.listdir(tmp_path) == []


def test_sigterm_becomes_an_exception(tmp_path):
    with pytest.raises(SystemExit) as error, temporary_folder(tmp_path / "set"):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert error.value.code == 143
    assert os.listdir(tmp_path) == []


def test_a_handler_of_the_program_stays(tmp_path):
    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with temporary_folder(tmp_path / "set"):
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_leftovers_go_and_running_neighbours_stay(tmp_path):
    for name in (".set.preparing-dead", ".set.preparing-live", ".other.preparing-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    with (tmp_path / ".set.preparing-live" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with temporary_folder(tmp_path / "set"):
            pass
    assert sorted(os.listdir(tmp_path)) == [".other.preparing-dead", ".set.preparing-live"]


def test_what_exists_is_never_overwritten(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    refuse_existing(target)  # an empty folder may be replaced
    with temporary_folder(target) as folder:
        publish(folder, target, MANIFEST)
    with pytest.raises(UserError, match="already a prepared set"):
        refuse_existing(target)
    with pytest.raises(UserError, match="already a prepared set"), temporary_folder(target) as folder:
        publish(folder, target, MANIFEST)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        refuse_existing(tmp_path / "file")
