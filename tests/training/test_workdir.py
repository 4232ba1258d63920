"""The folder of a run: one owner, what a resume may change, what is recorded."""

import dataclasses
import fcntl
import json
import subprocess
import sys
import types

import pytest

from llada_jax.config import Config, UserError, leaves
from llada_jax.training import workdir

IDENTITY = {"data": ["a1"], "weights": [], "tokenizer": "t1"}


def test_only_one_owner(tmp_path):
    folder = tmp_path / "runs" / "one"
    with workdir.locked(folder):
        assert folder.is_dir()
        with pytest.raises(UserError, match=r"--workdir=.*one is in use"), workdir.locked(folder):
            pass
    with workdir.locked(folder):  # free again
        pass


def test_the_lock_ends_with_its_process(tmp_path):
    """Even by kill -9: nothing to clean up by hand."""
    program = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="in use"), workdir.locked(tmp_path):
            pass
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    with workdir.locked(tmp_path):
        pass


def test_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), workdir.locked(tmp_path):
        raise KeyError
    with workdir.locked(tmp_path):
        pass


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--workdir=.* cannot be written: "), workdir.locked(folder):
            pass


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workdir.locked(tmp_path):
        pass


def test_identity_is_content():
    config = Config()
    config.data.weights = (0.5, 0.5)
    manifests = [types.SimpleNamespace(sha256="a"), types.SimpleNamespace(sha256="b")]
    assert workdir.identity(config, manifests, "t") == {"data": ["a", "b"], "weights": [0.5, 0.5], "tokenizer": "t"}
    json.dumps(workdir.identity(config, manifests, "t"))


def changed(name, value):
    config = Config()
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
        node = getattr(node, group)
    assert getattr(node, leaf) != value
    setattr(node, leaf, value)
    return config


def check(new, identity=IDENTITY):
    return workdir.check_same_run((Config(), IDENTITY), (new, identity), "runs/old", "take another --workdir")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mesh.tensor", 2), ("accumulation", 2), ("optimizer.schedule", ((0, 1.0),)), ("steps", 5),
        ("logging.every", 3),
        ("optimizer.peak_learning_rate", 1e-3), ("compute.dtype", "float32"), ("checkpoint.every", 10),
        ("validation.rows", 3), ("data.path", "elsewhere/same"), ("sampling.every", 5),
    ],
)  # fmt: skip
def test_a_resume_may_change(name, value):
    before = dict(leaves(Config()))[name]
    assert check(changed(name, value)) == {name: (before, value)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1), ("batch_size", 16), ("sequence_length", 128), ("model.layers", 2), ("model.rope_theta", 1e4),
        ("model.tied_embeddings", True), ("model.mask_id", 5), ("diffusion.eps", 0.1),
        ("diffusion.t_sampling", "independent"), ("diffusion.random_length_every", 0),
        ("optimizer.name", "muon"),
    ],
)  # fmt: skip
def test_a_resume_may_not_change(name, value):
    with pytest.raises(UserError, match=rf"^config\.{name} is {value}, but runs/old was trained with .*: take another"):
        check(changed(name, value))


@pytest.mark.parametrize("name", IDENTITY)
def test_data_and_tokenizer_stay_what_they_are(name):
    with pytest.raises(UserError, match=rf"^the {name} differs from that of runs/old .*: take another --workdir$"):
        check(Config(), IDENTITY | {name: ["other"]})
    with pytest.raises(UserError, match=rf"^the {name} differs"):  # an old record that does not have it
        workdir.check_same_run(
            (Config(), {k: v for k, v in IDENTITY.items() if k != name}), (Config(), IDENTITY), "runs/old", "x"
        )


def test_nothing_changed():
    assert check(Config()) == {}


def test_config_round_trip(tmp_path):
    config = changed("optimizer.schedule", ((0, 0.0), (0.5, 1.0)))
    workdir.write_config(tmp_path, config, IDENTITY)
    assert workdir.read_config(tmp_path) == (config, IDENTITY)
    workdir.write_config(tmp_path, Config(), IDENTITY)  # over the old one
    assert workdir.read_config(tmp_path) == (Config(), IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_config_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="is not a training workdir"):
        workdir.read_config(tmp_path)
    for text in ("{", "[]", "{}", '{"config": {"stepz": 1}, "identity": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged") as caught:
            workdir.read_config(tmp_path)
        assert "\n" not in str(caught.value)


def test_record_of_each_start(tmp_path):
    config = dataclasses.replace(Config(), steps=7)
    workdir.record_start(tmp_path, config, 0)
    workdir.record_start(tmp_path, config, 5)
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 5)
    assert first["config"]["steps"] == 7 and first["command"] == sys.argv
    assert first["versions"]["jax"] and first["versions"]["python"].startswith("3.")
    assert first["hardware"]["devices"] == 8 and first["hardware"]["processes"] == 1
    assert "device_count=8" in first["xla_flags"]
    assert first["commit"] is None or len(first["commit"].split("-")[0]) == 40


def test_tokenizer_is_copied_whole_or_not_at_all(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir(), run.mkdir()
    (source / "tokenizer.model").write_bytes(b"abc")
    (run / "tokenizer.tmp").mkdir()  # left by one that was killed
    (run / "tokenizer.tmp" / "half").write_bytes(b"a")
    workdir.keep_tokenizer(run, source)
    assert [p.name for p in run.iterdir()] == ["tokenizer"]
    assert [(p.name, p.read_bytes()) for p in (run / "tokenizer").iterdir()] == [("tokenizer.model", b"abc")]
    kept = (run / "tokenizer").stat().st_ino
    workdir.keep_tokenizer(run, source)  # once is enough
    assert (run / "tokenizer").stat().st_ino == kept
    (source / "tokenizer.model").write_bytes(b"other")
    workdir.keep_tokenizer(run, source)
    assert [p.name for p in run.iterdir()] == ["tokenizer"]
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == b"other"
