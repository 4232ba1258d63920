"""Tests benchmarks/scaling.py and scaling_table.py: equal compute for both kinds, resumption, fits and tables."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from experiments import imported
from paths import PYTHONPATH, ROOT
from scipy import stats

from llada_jax.cli import entry_point
from llada_jax.config import ComputeConfig, UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.data.read.shards import open_sets
from llada_jax.devices import mesh
from llada_jax.model.transformer import initialise
from llada_jax.training import config_check

BENCHMARKS = ROOT / "benchmarks"


grids, scaling, table = map(imported, ("scaling_grid", "scaling", "scaling_table"))
KINDS = ["autoregressive", "llada"]
EXPERIMENTS = ["rates", "compute", "epochs"]
RATES = dict.fromkeys(KINDS, 2e-3)
TINY = grids.Grid(
    layers=2, head_size=16, sequence_length=96, batch_size=8,
    widths=(32, 48), budgets=(1e9, 4e9), optimizer="adamw", fewest_steps=2, most_epochs=4.0,
    rates=(1e-3, 4e-3), rates_width=32, rates_budget=1e9,
    epochs_width=32, epochs_rows=16, epochs=(1, 2), rows=6, samples=3,
)  # fmt: skip


@pytest.mark.parametrize("name", grids.GRIDS)
def test_both_kinds_have_the_same_compute(name):
    grid = grids.GRIDS[name]
    layers, length, vocabulary = grid.layers, grid.sequence_length, grid.vocabulary
    for width in grid.widths:
        forward = grids.config_of(
            grid, grids.Run("compute", "llada", width, 0.0, 1, 0, "adamw", 1e-3, 0)
        ).model.feed_forward
        matrices = layers * (4 * width * width + 3 * width * forward)
        # Attention has two products of T x T numbers per head and layer: 2 * 2 T D FLOPs per token, three times that
        # with the backward pass. A causal model needs half of it, a masked model the head for half of the tokens.
        attention, head = 12 * layers * length * width, 6 * width * vocabulary
        assert attention == head
        wanted = grid.tokens * (6 * matrices + 1.5 * head)
        assert [grids.flops_per_step(grid, kind, width) for kind in KINDS] == [wanted, wanted]


@pytest.mark.parametrize(("name", "rows"), [("cpu", 50_000), ("gpu", 34_000)])
def test_the_runs_of_a_grid(name, rows):
    grid = grids.GRIDS[name]
    runs = grids.runs_of(grid, rows, KINDS, EXPERIMENTS, RATES)
    by_kind = [{dataclasses.replace(run, kind="") for run in runs if run.kind == kind} for kind in KINDS]
    assert by_kind[0] == by_kind[1] and len(by_kind[0]) == len(runs) / 2
    flops = [grids.about(grid, run)["flops"] for run in runs]
    assert flops == sorted(flops)
    for run, spent in zip(runs, flops, strict=True):
        config = grids.config_of(grid, run, "set")
        config_check.validate(config)
        assert config.optimizer.schedule[-1] == (1.0, 0.0)  # every run is a whole schedule
        if run.experiment != "rates":
            wanted = 2e-3 * {"cpu": 15, "gpu": 128 / run.width}[name]
            assert config.optimizer.peak_learning_rate == pytest.approx(wanted)
        if run.experiment != "epochs":
            assert run.steps >= grid.fewest_steps and run.steps * grid.batch_size <= grid.most_epochs * rows
            assert spent == pytest.approx(run.budget, rel=0.5 / run.steps)
        else:
            assert grids.about(grid, run)["epochs"] in grid.epochs
    # Every budget has runs of both kinds, and all but the smallest have several widths to choose from.
    for budget in grid.budgets:
        assert {run.kind for run in runs if run.budget == budget} == set(KINDS)
    twice = grids.runs_of(grid, rows, KINDS, ["epochs"], RATES, 2)
    assert len(set(twice)) == 2 * 2 * len(grid.epochs)


def test_the_sizes_for_a_gpu():
    grid = grids.GRIDS["gpu"]
    sizes = [
        grids.about(grid, grids.Run("compute", "llada", width, 0.0, 1, 1, "adamw", 1e-3, 0))["parameters"]
        for width in grid.widths
    ]
    assert 15e6 < sizes[0] < 25e6 and 250e6 < sizes[-1] < 300e6


def test_runs_with_a_line_are_not_done_again(tmp_path, monkeypatch):
    runs = grids.runs_of(TINY, 1000, KINDS, EXPERIMENTS, RATES)
    asked, codes = [], [entry_point.FINISHED] * 3 + [entry_point.PREEMPTED]

    def measure(grid, run, data, rows, workdir):
        asked.append(run)
        workdir.mkdir(exist_ok=True)
        return (codes.pop(0) if codes else entry_point.FINISHED), {"nats_per_token": 1.0}

    held_out = scaling.HeldOut(*np.zeros((4, 1, 1), int))
    monkeypatch.setattr(scaling, "validation_rows", lambda *_: held_out)
    monkeypatch.setattr(scaling, "measure", measure)
    sets = {"rates": "whole", "compute": "whole", "epochs": "part"}
    with pytest.raises(SystemExit) as stop:
        list(scaling.series(TINY, runs, sets, tmp_path))
    assert stop.value.code == entry_point.PREEMPTED
    file = tmp_path / "runs.jsonl"
    assert len(file.read_text().splitlines()) == 3
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1  # the run to go on with
    with file.open("a") as output:
        output.write('{"benchmark": "scal')  # the machine was lost while it wrote
    asked.clear()
    assert len(list(scaling.series(TINY, runs, sets, tmp_path))) == len(runs) - 3
    assert asked == runs[3:]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == len(runs)
    assert not list(scaling.series(TINY, runs, sets, tmp_path))


@pytest.mark.parametrize("optimizer", grids.OPTIMIZERS)
def test_each_kind_gets_the_learning_rate_that_did_best(optimizer):
    grid = dataclasses.replace(grids.GRIDS["cpu"], optimizer=optimizer)
    results = {"autoregressive": (3.0, 2.9, 3.1), "llada": (4.8, 4.9, 5.0)}
    runs = grids.runs_of(grid, 50_000, KINDS, ["rates"], {})
    times = {"adamw": 128 / 32, "muon": 15}[optimizer]
    lines = [
        dataclasses.asdict(run)
        | {"nats_per_token": results[run.kind][[rate * times for rate in grid.rates].index(run.learning_rate)]}
        for run in runs
    ]
    assert {grids.config_of(grid, run).optimizer.name for run in runs} == {optimizer}
    kinds = [*KINDS, "llada_window"]
    found = grids.best_rates(grid, json.loads(json.dumps(lines)), kinds)
    assert found == dict(zip(kinds, (grid.rates[1], grid.rates[0], grid.rates[1]), strict=True))


def test_a_small_part_of_a_set(prepared, tmp_path):
    (whole,) = open_sets([prepared], "train", 32, 384, chat=False)
    scaling.small_part(Path(prepared), 20, tmp_path / "part")
    (part,) = open_sets([str(tmp_path / "part")], "train", 32, 384, chat=False)
    assert len(part) == 20 and not load_manifest(tmp_path / "part").validation.rows
    places = {row.tokens.tobytes(): i for i, row in enumerate(whole.read(range(len(whole))))}
    found = [places[row.tokens.tobytes()] for row in part.read(range(20))]
    assert found == list(range(0, 20 * found[1], found[1])) and found[-1] > 0.9 * len(whole) - found[1]
    assert {row.length for row in part.read(range(20))} == {32}
    with pytest.raises(UserError, match="rows of text, but the experiment epochs takes 100000"):
        scaling.small_part(Path(prepared), 100_000, tmp_path / "other")


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_is_about_all_tokens(prepared, kind):
    """A plain computation from all logits gives the same result; the bound lies in the interval of its samples."""
    grid = dataclasses.replace(TINY, sequence_length=32, layers=6, samples=64)  # 384 ids, as in the set
    config = grids.config_of(grid, grids.Run("compute", kind, 32, 0.0, 1, 0, "adamw", 1e-3, 0)).model
    config.mask_id = load_manifest(prepared).mask_id
    rows = validation_rows([prepared], 6, 32, 384)
    with jax.set_mesh(mesh.one_device_mesh()):
        model = initialise(config, ComputeConfig(dtype="float32"), jax.random.key(0))
        result = scaling.nats(model, rows, grid, prepared)
        tokens_NT, tokens = rows.tokens_NT, int(rows.length_N.sum())

        def log_p(canvas_NT):
            logits_NTV = np.asarray(model(canvas_NT), np.float64)
            return logits_NTV - np.log(np.exp(logits_NTV).sum(-1, keepdims=True))

        counts = np.ones(384)
        (source,) = open_sets([prepared], "train", 32, 384, chat=False)
        for row in source.read(range(len(source))):
            np.add.at(counts, row.tokens[: row.length], 1)
        unigram = -np.log(counts / counts.sum())
        real_NT = np.arange(32) < rows.length_N[:, None]
        if kind == "autoregressive":
            after = -np.take_along_axis(log_p(tokens_NT)[:, :-1], tokens_NT[:, 1:, None], -1)[..., 0]
            wanted = (after[real_NT[:, 1:]].sum() + unigram[tokens_NT[:, 0]].sum()) / tokens
            assert result["nats_per_token"] == pytest.approx(wanted, rel=1e-5) and result["standard_error"] == 0
        else:
            # Eq. 6: l is uniform, and l of the L tokens are masked.
            rng, sums = np.random.default_rng(0), []
            for _ in range(64):
                mask_NT = np.zeros_like(real_NT)
                for row_T, length in zip(mask_NT, rows.length_N, strict=True):
                    row_T[rng.permutation(length)[: rng.integers(1, length + 1)]] = True
                nll_NT = -np.take_along_axis(
                    log_p(np.where(mask_NT, config.mask_id, tokens_NT)), tokens_NT[..., None], -1
                )[..., 0]
                total = ((nll_NT * mask_NT).sum(1) * rows.length_N / mask_NT.sum(1)).sum()
                sums.append(total / tokens)
            error = math.hypot(result["standard_error"], np.std(sums) / 8)
            assert 0 < error < 0.1 and abs(result["nats_per_token"] - np.mean(sums)) < 4 * error
    assert result["unigram_nats_per_token"] == pytest.approx(unigram[tokens_NT[real_NT]].mean(), rel=1e-9)
    in_bits = result["nats_per_token"] * tokens / math.log(2) / rows.bytes_N.sum()
    assert result["bits_per_byte"] == pytest.approx(in_bits, rel=1e-9)


@pytest.mark.slow
def test_a_whole_series(corpus, tmp_path):
    """Real runs of a tiny grid: each has its line with a finite result, and a second call has nothing to do."""
    sets = scaling.prepared([corpus], TINY, tmp_path, EXPERIMENTS)
    runs = grids.runs_of(TINY, load_manifest(sets["compute"]).train.rows, KINDS, EXPERIMENTS[1:], RATES)
    runs = [run for run in runs if run.width == 32 and run.budget in (0.0, 1e9)]
    lines = list(scaling.series(TINY, runs, sets, tmp_path))
    assert len(lines) == len(runs) == 6
    assert {line["learning_rate"] for line in lines} == {8e-3}
    assert all(0 < line["nats_per_token"] < 10 and math.isfinite(line["bits_per_byte"]) for line in lines)
    assert {line["kind"] for line in lines if line["standard_error"] > 0} == {"llada"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-16", "runs.jsonl", "text"]
    assert not list(scaling.series(TINY, runs, sets, tmp_path))
    with pytest.raises(UserError, match="belongs to another grid"):
        scaling.prepared([corpus], dataclasses.replace(TINY, layers=4), tmp_path, ["compute"])
    with pytest.raises(UserError, match="has other text than --input=other.txt"):
        scaling.prepared(["other.txt"], TINY, tmp_path, ["compute"])


BUDGETS = [1e11, 4e11, 1.6e12, 6.4e12, 2.56e13]


def test_the_fit_is_that_of_scipy():
    rng = np.random.default_rng(0)
    nats = 20 * np.array(BUDGETS) ** -0.06 * np.exp(0.01 * rng.standard_normal(5))
    found, known = table.fit(BUDGETS, nats), stats.linregress(np.log(BUDGETS), np.log(nats))
    assert found.slope == pytest.approx(known.slope)
    half = stats.t.ppf(0.975, 3) * known.stderr
    low, high = np.quantile(found.draws[:, 1], (0.025, 0.975))
    assert (known.slope - low, high - known.slope) == (pytest.approx(half, rel=0.05), pytest.approx(half, rel=0.05))
    assert found.loss(1.0) == pytest.approx(math.exp(known.intercept))


def test_the_intervals_hold_a_known_law():
    """In about 95 of 100 series with noise, the interval has the true exponent, and the true ratio of compute."""
    rng, flops, inside = np.random.default_rng(1), np.array(BUDGETS), np.zeros((200, 2), bool)
    for i in range(len(inside)):
        # The same law, but for 16 times the compute.
        fits = [
            table.fit(BUDGETS, 20 * (flops / times) ** -0.06 * np.exp(0.01 * rng.standard_normal(5)), seed=i * 2 + k)
            for k, times in enumerate((1, 16))
        ]
        low, high = np.quantile(fits[0].draws[:, 1], (0.025, 0.975))
        value, first, last = table.ratio(fits[1], fits[0], 6.4e12)
        inside[i] = low < -0.06 < high, first < 16 < last
        assert first < value < last
    assert (np.abs(inside.mean(0) - 0.95) < 0.05).all()
    exact = [table.fit(BUDGETS, 20 * (flops / times) ** -0.06) for times in (1, 16)]
    assert table.ratio(exact[1], exact[0], 6.4e12) == pytest.approx((16, 16, 16), rel=1e-6)


def lines() -> list[dict]:
    """Returns the lines of made-up series: LLaDA takes 15 times the compute, and does better over many epochs."""
    same = {"seed": 0, "learning_rate": 1e-3, "unigram_nats_per_token": 5.0}
    found = []
    for kind, times in zip(KINDS, (1, 15), strict=True):
        error = 0.004 if kind == "llada" else 0.0
        for budget in BUDGETS:
            for width, worse in ((64, 1.1), (128, 1.0)):
                nats = 20 * (budget / times) ** -0.06 * worse
                values = {"budget": budget, "flops": budget, "tokens": 1e6, "epochs": 0.5, "steps": budget // 1e9}
                values |= {"nats_per_token": nats, "bits_per_byte": nats / 2, "standard_error": error, "width": width}
                found.append({"experiment": "compute", "kind": kind} | same | values)
        for i, epochs in enumerate((1, 4, 16)):
            nats = [3.0, 2.5, 2.9][i] if times == 1 else [4.0, 3.0, 2.4][i]
            values = {"budget": 0.0, "flops": epochs * 1e12, "tokens": epochs * 1e5, "epochs": float(epochs)}
            values |= {"steps": epochs * 100, "nats_per_token": nats, "bits_per_byte": nats / 2, "width": 128}
            found.append({"experiment": "epochs", "kind": kind, "standard_error": error} | same | values)
    return found


def test_the_tables():
    compute, epochs = table.points(lines(), "compute"), table.points(lines(), "epochs")
    text = table.compute_tables(compute)
    assert text[0].count("|") == 10 and text[2].startswith("| 1e+11 | 128 | 1e+06 | 4.376 |")
    # LLaDA's first point is worse than the frequencies of tokens, and takes no part in its fit.
    assert "| llada | 4 | 0.0600 (0.0600 to 0.0600) |" in text
    assert "| autoregressive | 5 | 0.0600 (0.0600 to 0.0600) |" in text
    # Its second has a loss that the baseline was not measured at: nothing is extrapolated.
    assert [line for line in text if line.startswith("| llada, ")] == [
        f"| llada, {budget:.2g} FLOPs | {20 * (budget / 15) ** -0.06:.3f} | 15 (15 to 15) |" for budget in BUDGETS[2:]
    ]
    assert text[-1].endswith("plain cross-entropy | | 14 |")
    assert table.epochs_table(epochs)[2:] == [
        "| 1 | 1e+12 | 3.000 | 4.000 ± 0.004 |",
        "| 4 | 4e+12 | **2.500** | 3.000 ± 0.004 |",
        "| 16 | 1.6e+13 | 2.900 | **2.400 ± 0.004** |",
    ]


def test_the_table_of_learning_rates():
    nats = {
        ("autoregressive", 0.002): 3.0,
        ("llada", 0.002): 4.0,
        ("autoregressive", 0.004): 2.0,
        ("llada", 0.004): 4.5,
    }
    rows = [
        {"experiment": "rates", "kind": kind, "learning_rate": rate, "nats_per_token": value}
        for (kind, rate), value in nats.items()
    ]
    assert table.rates_table(rows)[2:] == ["| 0.002 | 3.000 | **4.000** |", "| 0.004 | **2.000** | 4.500 |"]


def test_few_results_give_no_interval():
    few = [line for line in lines() if line["budget"] in BUDGETS[3:]]
    text = table.compute_tables(table.points(few, "compute"))
    assert "| llada | 2 | 0.0600 (nan to nan) |" in text


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'llada_jax[plots]'")
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    command = [sys.executable, "benchmarks/scaling_table.py", "--input=~/runs.jsonl", "--picture=~/scaling.svg"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "m")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| llada, 6.4e+12 FLOPs |" in done.stdout
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")
