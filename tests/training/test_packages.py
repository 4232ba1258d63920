"""Runs the optional packages that a training run works with, offline: wandb, TensorBoard's reader, matplotlib."""

import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import PYTHONPATH, ROOT

from llada_jax.config import Config, LoggingConfig, UserError
from llada_jax.data import sets as prepared
from llada_jax.training.metrics import Writer, check_wandb

QUIET = LoggingConfig(tensorboard=False)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'llada_jax[wandb]'")
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": tmp_path, "CONFIG_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    module.teardown()  # wandb reads these variables only once
    yield module
    module.teardown()


def records_of(content: bytes) -> Iterator[bytes]:
    """Yields the records of a .wandb file: after a header of 7 bytes, a log as LevelDB writes it."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def history(file: Path) -> list[dict]:
    """Returns what an offline run of wandb has kept, one dict for each step, once wandb has written all of it."""
    from wandb.proto import wandb_internal_pb2

    found, ended, end = [], False, time.monotonic() + 30
    while not ended:
        assert time.monotonic() < end, f"{file} has no end"
        found = []
        for content in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            ended |= record.WhichOneof("record_type") == "exit"
            if items := record.history.item:
                found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return found


def test_wandb_gets_every_record_and_continues_its_run(wandb, tmp_path):
    """The run keeps its id over restarts, and numbers that are not finite are left out."""
    logging = dataclasses.replace(QUIET, wandb_project="trial")
    for first, step in ((0, 10), (10, 20)):
        writer = Writer(tmp_path, logging, first, dataclasses.asdict(Config()))
        writer.write(step, {"loss": step / 7, "grad_norm": math.nan, "tokens": 3})
        writer.close()
        (number,) = {(tmp_path / "wandb_id").read_text()}
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    found = [record for file in files for record in history(file)]
    kept = [{name: x for name, x in record.items() if not name.startswith("_")} for record in found]
    assert kept == [{"loss": 10 / 7, "tokens": 3}, {"loss": 20 / 7, "tokens": 3}]
    assert len(files) == 2 and {file.name for file in files} == {f"run-{number}.wandb"}


def test_what_wandb_refuses_is_one_line(wandb, tmp_path):
    logging = dataclasses.replace(QUIET, wandb_project="no/such#name")
    for start in (lambda: check_wandb("no/such#name"), lambda: Writer(tmp_path, logging, 0, {})):
        with pytest.raises(UserError, match=r"^config.logging.wandb_project=no/such#name: .*MODE=offline") as error:
            start()
        assert "\n" not in str(error.value)
    check_wandb("trial")


def test_a_missing_key_of_wandb_is_found_before_the_data_is_prepared(wandb, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(prepared, "find_sets", lambda *_: pytest.fail("the data is prepared"))
    with pytest.raises(UserError, match=r"^config.logging.wandb_project=trial: .*WANDB_MODE=offline"):
        run(tmp_path / "run", logging__wandb_project="trial")


def test_tensorboard_reads_what_a_run_writes(tmp_path):
    """Events beyond the step that a run resumes at disappear, as they do from metrics.jsonl."""
    reason = "tensorboard is not installed"
    module = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator", reason=reason)
    for first, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        writer = Writer(tmp_path, LoggingConfig(), first, {})
        for step in steps:
            writer.write(step, {"loss": step / 8 + first, "name": "x", "grad_norm": math.inf})
            writer.text(step, "samples", f"sample {step} é")
        writer.close()
    found = module.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    numbers, texts = sorted(found.Tags()["tensors"])
    assert (numbers, texts) == ("loss", "samples/text_summary")
    losses = [(e.step, e.tensor_proto.float_val[0]) for e in found.Tensors(numbers)]
    assert losses == [(10, 1.25), (20, 2.5), (30, 23.75), (40, 25.0)]
    shown = [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(texts)]
    assert shown == [(step, f"```\nsample {step} é\n```") for step in (10, 20, 30, 40)]


def test_matplotlib_draws_the_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'llada_jax[plots]'")
    rows = [
        {"model": "m", "set": "sets/a", "step": step, "nats_per_token": 3 - step / 9, "stops": 0.5, "in_format": 0.2}
        for step in (0, 5)
    ]
    (tmp_path / "tuning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "benchmarks/curves.py", "--input=~/tuning.jsonl", "--output=~/tuning.svg"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "m")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuning.svg").read_text().startswith("<?xml")
