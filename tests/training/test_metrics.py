"""Tests the sums between log lines, the FLOPs, the speed, and the files that metrics are written to."""

import json
import math

import jax
import numpy as np
import pytest
import rounding

from llada_jax.config import ComputeConfig, LoggingConfig, ModelConfig, UserError
from llada_jax.devices import distributed, mesh
from llada_jax.model.transformer import abstract_model, merge, split
from llada_jax.training import flops, metrics
from llada_jax.training.metrics import Speed, Window, Writer

EIGHT = ModelConfig(vocab_size=126464)


def step_metrics(rng, skipped=0):
    return {
        "loss": np.float32(math.nan if skipped else rng.uniform(1, 9)),
        "skipped": np.int32(skipped),
        "tokens": np.int32(rng.integers(100, 200)),
        "bucket_nll": rng.uniform(0, 100, 3).astype(np.float32),
        "bucket_tokens": rng.integers(0, 50, 3).astype(np.float32),
    }


def test_window_means(rng):
    steps = [step_metrics(rng) for _ in range(5)]
    window = Window(3)
    for values in steps:
        window.add(values)
    got = window.summary()
    # The sums are in float64, and have five terms. np.mean sums fp32 numbers in fp32, unless it is told otherwise.
    exact = rounding.of_chain(5, roundings=2, eps=np.finfo(np.float64).eps)
    mean = np.mean([s["loss"] for s in steps], dtype=np.float64)
    assert got["loss"] == pytest.approx(mean, rel=exact) and got["skipped"] == 0
    for k, name in enumerate(("loss_t/0.00-0.33", "loss_t/0.33-0.67", "loss_t/0.67-1.00")):
        # The mean over all masked tokens, not the mean of the steps' means.
        nll, tokens = (sum(float(s[f"bucket_{x}"][k]) for s in steps) for x in ("nll", "tokens"))
        assert got[name] == pytest.approx(nll / tokens, rel=exact)
    assert window.sums["tokens"] == sum(int(s["tokens"]) for s in steps)


def test_window_round_trip_through_json_is_bitwise(rng):
    """After a checkpoint in the middle of a window, the resumed run logs exactly the same numbers."""
    steps = [step_metrics(rng) for _ in range(6)]
    steps[2] = step_metrics(rng, skipped=1)
    whole, first = Window(3), Window(3)
    for values in steps:
        whole.add(values)
    for values in steps[:3]:
        first.add(values)
    second = Window(3, json.loads(json.dumps(first.sums)))
    assert second.sums == first.sums
    for values in steps[3:]:
        second.add(values)
    assert second.sums == whole.sums and second.summary() == whole.summary()


def test_skipped_steps_count_only_as_skipped(rng):
    good, bad = step_metrics(rng), step_metrics(rng, skipped=1)
    window, alone = Window(3), Window(3)
    window.add(bad)
    assert math.isnan(window.summary()["loss"]) and window.summary()["skipped"] == 1
    window.add(good)
    alone.add(good)
    assert window.summary() == alone.summary() | {"skipped": 1}


def test_bucket_that_was_not_met_has_no_loss(rng):
    window, values = Window(3), step_metrics(rng)
    values["bucket_tokens"][1] = values["bucket_nll"][1] = 0
    window.add(values)
    assert "loss_t/0.33-0.67" not in window.summary() and "loss_t/0.67-1.00" in window.summary()


def test_window_survives_another_number_of_buckets(rng):
    before = Window(3)
    before.add(step_metrics(rng))
    window = Window(4, json.loads(json.dumps(before.sums)))
    assert window.summary() == {"loss": before.summary()["loss"], "skipped": 0}
    window.add(step_metrics(rng) | {"bucket_nll": np.ones(4), "bucket_tokens": np.ones(4)})
    assert len([name for name in window.summary() if name.startswith("loss_t/")]) == 4


def test_flops_of_the_paper():
    """The 8B model takes 51.4 GFLOP per token at length 4096 if the head is applied to all positions.

    Applying it to the masked positions only saves half of the head's FLOPs on average.
    """
    # The figures are given to three digits, for a whole row to four.
    assert flops.flops_per_token(EIGHT, 4096, head_share=1.0) == pytest.approx(51.4e9, rel=2e-3)
    assert flops.flops_per_token(EIGHT, 4096, head_share=1.0) * 4096 == pytest.approx(210.6e12, rel=1e-3)
    half = 0.5 * 6 * 4096 * 126464
    assert flops.flops_per_token(EIGHT, 4096) == flops.flops_per_token(EIGHT, 4096, 1.0) - half


def test_flops_by_hand():
    """The forward pass takes two FLOPs per multiplication, and the backward pass twice as many.

    The matrices of grouped keys and values are smaller than those of the queries.
    """
    model = ModelConfig(layers=3, width=8, heads=4, kv_heads=2, feed_forward=10, vocab_size=32)
    matmul = 3 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 10)
    assert flops.flops_per_token(model, 16, 1.0) == 6 * (matmul + 8 * 32) + 3 * 3 * 2 * 2 * 16 * 8


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_flops(kind, peak):
    assert flops.peak_flops(kind) == peak


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_speed_and_mfu(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 459e12)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    clock = Clock()
    speed = Speed(EIGHT, 4096, clock)
    clock.now += 10
    got = speed.summary(steps=5, tokens=100_000, steps_left=20)
    assert got["step_seconds"] == pytest.approx(2) and got["tokens_per_second"] == pytest.approx(10_000)
    assert got["tokens_per_second_per_device"] == pytest.approx(10_000 / jax.device_count())
    assert got["seconds_left"] == pytest.approx(40)
    assert got["mfu"] == pytest.approx(1e4 * flops.flops_per_token(EIGHT, 4096) / 4 / 459e12)
    assert got["mfu_full_head"] == pytest.approx(1e4 * 51.4e9 / 4 / 459e12, rel=2e-3)
    clock.now += 1
    assert speed.summary(1, 500, 0)["tokens_per_second"] == pytest.approx(500)  # counts only since the last call
    speed = Speed(EIGHT, 4096, clock, masked_share=0.75)
    clock.now += 10
    assert speed.summary(5, 100_000, 20)["mfu"] == pytest.approx((got["mfu"] + got["mfu_full_head"]) / 2)


def test_speed_leaves_pauses_out():
    clock = Clock()
    speed = Speed(EIGHT, 4096, clock)
    clock.now += 7
    speed.restart()
    clock.now += 2
    go_on = speed.pause()
    clock.now += 1000
    go_on()
    clock.now += 3
    assert speed.summary(1, 50, 0)["tokens_per_second"] == pytest.approx(10)


def test_no_mfu_without_a_known_peak(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: None)
    clock = Clock()
    speed = Speed(EIGHT, 4096, clock)
    clock.now += 1
    assert not any(name.startswith("mfu") for name in speed.summary(1, 1, 1))
    assert math.isfinite(speed.summary(0, 0, 5)["seconds_left"])  # also without any step or elapsed time


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writer_and_resume_leave_no_step_twice(tmp_path):
    quiet = LoggingConfig(tensorboard=False)
    writer = Writer(tmp_path, quiet, 0, {})
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 7, "note": "x"})
    writer.write(40, {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    assert records(path)[1] == {"step": 20, "loss": 20 / 7, "note": "x"}  # The loss is exact to the bit.
    assert records(path)[3] == {"step": 40, "loss": None, "grad_norm": None}  # JSON has no NaN.
    assert "NaN" not in path.read_text()
    writer = Writer(tmp_path, quiet, 20, {})  # The run resumes from the checkpoint of step 20.
    writer.write(30, {"loss": 0.5})
    writer.close()
    assert [r["step"] for r in records(path)] == [10, 20, 30] and records(path)[2]["loss"] == 0.5
    for _ in range(2):  # A run that starts from weights is validated at step 0, and is killed before its checkpoint.
        writer = Writer(tmp_path, quiet, 0, {})
        writer.write(0, {"loss": 2.0})
        writer.close()
    assert [r["step"] for r in records(path)] == [0]


def test_records_are_on_disk_at_once(tmp_path):
    """Records are written immediately, so that a kill -9 loses nothing up to the last log step."""
    writer = Writer(tmp_path, LoggingConfig(tensorboard=False), 0, {})
    writer.write(1, {"loss": 1.0})
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1]
    writer.close()


def test_drop_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.drop_after(path, 5)
    assert not path.exists()
    lines = ['{"step": 1, "a": 1}', '{"step": 5, "a": 2}', "{}", "[1]", "7", '{"step": 6}', '{"step": 7, "lo']
    path.write_text("\n".join(lines))
    metrics.drop_after(path, 5)
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 5, "a": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.drop_after(path, 0)
    assert path.read_text() == ""


def test_tensorboard_files(tmp_path):
    writer = Writer(tmp_path, LoggingConfig(), 0, {})
    writer.write(3, {"loss": 1.5, "name": "not a number"})
    writer.text(3, "samples", "hello sample")
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"loss" in content and b"hello sample" in content and b"not a number" not in content


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "index", lambda: 1)
    writer = Writer(tmp_path, LoggingConfig(), 0, {})
    writer.write(1, {"loss": 1.0})
    writer.text(1, "samples", "x")
    writer.close()
    assert not any(tmp_path.iterdir())


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.logging\.wandb_project .*pip install"):
        Writer(tmp_path, LoggingConfig(tensorboard=False, wandb_project="p"), 0, {})


def test_log_line():
    values = {
        "loss": 2.34567, "learning_rate": 3e-4, "grad_norm": 0.987, "tokens_per_second": 12345.6,
        "skipped": 0, "seconds_left": 3723,
    }  # fmt: skip
    assert metrics.log_line(7, 1000, values) == (
        "step    7/1000  loss 2.3457  lr 3.00e-04  grad 0.99  12,346 tokens/s  left 1:02:03"
    )
    more = metrics.log_line(1000, 1000, values | {"mfu": 0.4567, "skipped": 2})
    assert more.startswith("step 1000/1000") and "MFU 45.7%" in more and "skipped 2" in more and "\n" not in more


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (3723, "1:02:03"), (86399, "23:59:59"), (2 * 86400 + 11045, "2d 03:04:05")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_fetch():
    got = metrics.fetch({"loss": jax.numpy.float32(1.5), "bucket_nll": jax.numpy.ones(3)})
    assert isinstance(got["loss"], np.float32) and got["loss"] == 1.5
    np.testing.assert_array_equal(got["bucket_nll"], np.ones(3))


@pytest.mark.parametrize("remat", ["dots", "rotated", "attention", "full"])
def test_recomputed_flops_are_what_the_compiler_counts(remat):
    """Compares the FLOPs of the gradient with a remat policy and without remat.

    The layers are unrolled so that the FLOPs of all of them are counted. They are those of the program before its
    optimization: the compiler for CPUs would find that the same scores of reference attention are computed twice.
    """
    config = ModelConfig(layers=2, width=256, heads=4, kv_heads=2, feed_forward=512, vocab_size=128, mask_id=127)
    # Compilers count the elementwise operations too, and that for GPUs counts more for an exponential, so the softmax
    # must be a small part there. On CPUs, attention is a larger part than the tolerance.
    length, share = (256, 0.06) if jax.default_backend() == "cpu" else (64, 0.15)

    def counted(remat):
        compute = ComputeConfig(dtype="float32", remat=remat, unroll=0, attention="reference")
        with jax.set_mesh(mesh.one_device_mesh()):
            graphdef, params = split(abstract_model(config, compute))
            tokens = jax.ShapeDtypeStruct((1, length), "int32", sharding=jax.P(mesh.BATCH, None))
            loss = lambda params, tokens: merge(graphdef, params).trunk(tokens).sum()  # noqa: E731
            return jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"] / length

    compute = ComputeConfig(remat=remat, attention="reference")
    expected = flops.recomputed_flops_per_token(config, length, compute)
    extra = counted(remat) - counted("none")
    assert abs(extra - expected) < share * flops.flops_per_token(config, length, head_share=0) / 3
    again = flops.recomputed_flops_per_token(config, length, ComputeConfig(remat=remat, attention="splash"))
    # With full remat, the backward pass of splash computes the scores once more.
    assert again - expected == (2 * 2 * length * 256 if remat == "full" else 0)
