r"""Trains LLaDA and autoregressive models with equal compute, to see how their likelihoods grow with it.

    python benchmarks/scaling.py --input=stories.jsonl.gz --output=runs/scaling --grid=cpu
    python benchmarks/scaling_table.py --input=runs/scaling/runs.jsonl --picture=scaling.svg

Two experiments:

  compute   Models of several widths, each with several budgets of FLOPs. Every run is a whole schedule: warm-up and
            linear decay to zero within its budget. Left out are runs of very few steps, and runs that would go over the
            text more than --most_epochs times.
  epochs    A model of one width on a small part of the text, which it goes over 1, 2, 4 ... times. Here, too, every
            run is a whole schedule.

Equal compute. FLOPs are those of llada_jax/training/flops.py: 6 per parameter of a matrix and token, and those of
attention, of which a causal model needs half; a masked model needs the head for half of the positions. With a
vocabulary of 2 L T ids (L layers, T tokens per row), the one outweighs the other: both kinds of models have the same
FLOPs per token, and so the same steps, tokens, batches and FLOPs, to the last digit. What the machine spends on them
may differ; each line has the seconds, too.

Equal treatment. Both kinds have the same weights at the start, rows in the same order, optimizer (AdamW), schedule and
learning rate. The peak of the learning rate is that of the grid times (128 / width). LLaDA is trained with the paper's
objective (Eq. 3), but for loss_weight=count, whose mean is the same. --kinds=llada_window adds LLaDA as it is trained
by configs/quickstart.py, with t in (0.2, 0.9) only.

Results are nats per token of all held-out rows, those of one tokenizer, so that kinds can be compared:

  autoregressive   the exact negative log-likelihood. The first token of a row has none before it; it gets its frequency
                   in the text of the training, so that the result, too, is about all tokens.
  llada            the mean of Eq. 6 over random masks, an upper bound of the negative log-likelihood. How far it is
                   above the likelihood, nobody knows. standard_error is that of the mean over the samples, each with
                   other masks of all rows: how far the mean may be from the bound.

The folder --output gets the prepared text, a workdir for the run under way, and runs.jsonl, one JSON line per run. The
cheapest runs come first, so that what is there tells something at any time. The same command, started again, goes on
where it was. --list prints the runs of a grid, and trains nothing.

Grids: cpu takes about 40 minutes on one core with AVX-512. gpu has 17 to 274 M parameters and is meant for 40 minutes
of one H100: 3.9e17 FLOPs in all, for a text of at least 70 MB such as 92 novels. It has not been run.
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from llada_jax.cli import compilation_cache, entry_point, huge_pages
from llada_jax.cli.outputs import temporary_folder
from llada_jax.cli.paths import expanded
from llada_jax.config import Config, UserError, ValidationConfig
from llada_jax.data.manifest import TOKENIZER_FOLDER, Split, load_manifest
from llada_jax.data.prepare.output import publish
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.data.read.shards import open_sets
from llada_jax.data.rows import HeldOut, ShardWriter, encode_row
from llada_jax.devices import mesh
from llada_jax.diffusion.forward import masked_share
from llada_jax.loading import load
from llada_jax.model.transformer import Transformer, parameter_count, split
from llada_jax.scoring import bound
from llada_jax.training.flops import flops_per_token
from llada_jax.training.run import train

AUTOREGRESSIVE = "autoregressive"
# The settings of each kind, as NAME or SECTION.NAME.
KINDS = {
    AUTOREGRESSIVE: {"model.causal": True, "diffusion.objective": "next_token"},
    "llada": {"diffusion.loss_weight": "count"},
    "llada_window": {"diffusion.loss_weight": "count", "diffusion.t_range": (0.2, 0.9)},
}
COMPUTE, EPOCHS = "compute", "epochs"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of one machine."""

    layers: int
    head_size: int
    sequence_length: int
    batch_size: int  # rows per step
    widths: tuple[int, ...]
    budgets: tuple[float, ...]  # FLOPs
    learning_rate: float  # the peak at width 128
    fewest_steps: int
    epochs_width: int
    epochs_rows: int  # rows of the small part of the text
    epochs: tuple[int, ...]  # how often a run goes over the small part
    rows: int  # the most held-out rows of a result
    samples: int  # of the bound, each with other masks of all rows

    @property
    def vocabulary(self) -> int:
        """The number of ids with which both kinds have the same FLOPs per token."""
        return 2 * self.layers * self.sequence_length

    @property
    def tokens(self) -> int:
        """The number of tokens per step."""
        return self.batch_size * self.sequence_length


GRIDS = {
    "cpu": Grid(
        layers=4, head_size=32, sequence_length=64, batch_size=16,
        widths=(32, 64, 128, 256), budgets=(5e10, 2e11, 8e11, 3.2e12, 1.28e13), learning_rate=4e-3, fewest_steps=80,
        epochs_width=128, epochs_rows=256, epochs=(1, 2, 4, 8, 16, 32, 64), rows=512, samples=8,
    ),
    "gpu": Grid(
        layers=16, head_size=64, sequence_length=512, batch_size=64,
        widths=(256, 512, 768, 1152), budgets=(2e15, 8e15, 3.2e16, 1e17), learning_rate=4e-3, fewest_steps=250,
        epochs_width=256, epochs_rows=2048, epochs=(1, 2, 4, 8, 16, 32, 64), rows=512, samples=16,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid."""

    experiment: str
    kind: str
    width: int
    budget: float  # FLOPs; 0 for the experiment epochs
    steps: int
    unique_rows: int  # the rows of its text
    seed: int


def config_of(grid: Grid, run: Run, data: str = "") -> Config:
    """Returns the settings of a run on the prepared set `data`."""
    config = Config(seed=run.seed, steps=run.steps, batch_size=grid.batch_size, sequence_length=grid.sequence_length)
    model, optimizer = config.model, config.optimizer
    model.layers, model.width = grid.layers, run.width
    model.heads = model.kv_heads = run.width // grid.head_size
    model.feed_forward = 64 * round(run.width / 24)  # 8 / 3 of the width
    model.vocab_size = grid.vocabulary
    model.tied_embeddings, model.rope_theta = True, 10_000.0
    config.compute.unroll, config.compute.remat = 0, "none"
    config.compute.loss_chunk = min(grid.tokens // 4, 8192)
    optimizer.peak_learning_rate = grid.learning_rate * 128 / run.width
    optimizer.schedule = ((0.0, 0.0), (0.05, 1.0), (1.0, 0.0))
    optimizer.beta2 = 0.98
    config.diffusion.random_length_every = 0  # or a step would have fewer tokens
    config.data.path = data
    config.checkpoint.every, config.checkpoint.keep = 1000, 1
    config.logging.every, config.logging.tensorboard = max(1, run.steps // 10), False
    config.validation.rows = 0  # `nats` is called at the end
    config.sampling.prompts = ()
    for name, value in KINDS[run.kind].items():
        section, _, leaf = name.rpartition(".")
        setattr(getattr(config, section), leaf, value)
    return config


def flops_per_step(grid: Grid, kind: str, width: int) -> float:
    """Returns the FLOPs of a training step."""
    config = config_of(grid, Run(COMPUTE, kind, width, 0.0, 1, 0, 0))
    return grid.tokens * flops_per_token(config.model, grid.sequence_length, masked_share(config.diffusion))


def runs_of(
    grid: Grid, rows: int, kinds: list[str], experiments: list[str], seeds: int, most_epochs: float
) -> list[Run]:
    """Returns the runs of a grid, the cheapest first.

    Args:
      grid: The grid.
      rows: The number of rows of the text.
      kinds: Names in KINDS.
      experiments: COMPUTE, EPOCHS or both.
      seeds: The number of runs that differ in the seed only.
      most_epochs: How often a run of COMPUTE may go over the text.
    """
    found = []
    for kind in kinds:
        for width in grid.widths if COMPUTE in experiments else ():
            for budget in grid.budgets:
                steps = round(budget / flops_per_step(grid, kind, width))
                if grid.fewest_steps <= steps <= most_epochs * rows / grid.batch_size:
                    found.append((COMPUTE, kind, width, budget, steps, rows))
        for epochs in grid.epochs if EPOCHS in experiments else ():
            steps = epochs * grid.epochs_rows // grid.batch_size
            found.append((EPOCHS, kind, grid.epochs_width, 0.0, steps, grid.epochs_rows))
    runs = [Run(*values, seed) for values in found for seed in range(seeds)]
    return sorted(runs, key=lambda run: run.steps * flops_per_step(grid, run.kind, run.width))


def small_part(whole: Path, rows: int, target: Path) -> None:
    """Writes a prepared set with some rows of the set `whole`, spread evenly over it, and no held-out rows."""
    manifest = load_manifest(whole)
    (source,) = open_sets([str(whole)], "train", manifest.sequence_length, manifest.vocab_size, chat=False)
    last = len(source) - 1  # the last row may be padded, and is left out
    if last < rows:
        raise UserError(f"--input has {last} rows of text, but the experiment epochs takes {rows}: give more text")
    with temporary_folder(target) as folder:
        shutil.copytree(whole / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
        writer, size = ShardWriter(folder, "train", rows), 0
        for row in source.read(range(0, last - last % rows, last // rows)):
            ids = row.tokens.astype(np.dtype(manifest.dtype).newbyteorder("<"))
            writer.write(encode_row(ids, row.length, row.bytes))
            size += row.bytes
        part = Split(rows, rows * manifest.sequence_length, size, 0, writer.finish())
        nothing = Split(0, 0, 0, 0, ())
        publish(folder, target, dataclasses.replace(manifest, train=part, validation=nothing))


@functools.cache
def frequencies(data: str) -> np.ndarray:
    """Returns log p of each id, fp64 (V,), where p is its frequency in the training rows of a set, plus one."""
    manifest = load_manifest(data)
    (source,) = open_sets([data], "train", manifest.sequence_length, manifest.vocab_size, chat=False)
    counts = np.ones(manifest.vocab_size)
    for first in range(0, len(source), 1024):
        rows = source.read(range(first, min(first + 1024, len(source))))
        counts += np.bincount(np.concatenate([row.tokens[: row.length] for row in rows]), minlength=manifest.vocab_size)
    return np.log(counts / counts.sum())


def nats(model: Transformer, rows: HeldOut, grid: Grid, data: str) -> dict[str, float]:
    """Returns the negative log-likelihood of held-out rows, or the bound of it.

    Args:
      model: The model.
      rows: The held-out rows.
      grid: The grid, for the number of samples.
      data: The set that the model was trained on.

    Returns:
      nats_per_token, bits_per_byte, the standard error of nats_per_token, which is 0 if it is exact, and
      unigram_nats_per_token, the result of the frequencies of tokens alone.
    """
    causal, tokens = model.config.causal, int(rows.length_N.sum())
    real_NT = np.arange(rows.tokens_NT.shape[1]) < rows.length_N[:, None]

    def sample(seed: int) -> float:
        values = bound.validate(
            *split(model), rows, ValidationConfig(samples=1, seed=seed), batch_size=grid.batch_size,
            chunk=min(grid.tokens // 4, 8192), mask_id=model.config.mask_id,
        )  # fmt: skip
        return values["nats_per_token"]

    with mesh.mesh_of(model.embedding[...]):
        if causal:
            first = -float(frequencies(data)[rows.tokens_NT[:, 0]].sum())
            values = [(sample(0) * (tokens - len(rows.length_N)) + first) / tokens]
        else:
            values = [sample(seed) for seed in range(grid.samples)]
    mean = statistics.mean(values)
    return {
        "nats_per_token": mean,
        "bits_per_byte": mean * tokens / math.log(2) / int(rows.bytes_N.sum()),
        "standard_error": 0.0 if causal else statistics.stdev(values) / math.sqrt(len(values)),
        "unigram_nats_per_token": -float(frequencies(data)[rows.tokens_NT[real_NT]].mean()),
    }


def prepared(inputs: list[str], grid: Grid, folder: Path, experiments: list[str]) -> dict[str, str]:
    """Prepares the text, unless this was done before, and returns the set of each experiment."""
    whole, part = folder / "text", folder / f"part-{grid.epochs_rows}"
    if not whole.exists():
        same = {"sequence_length": grid.sequence_length, "validation_fraction": 0.03}
        prepare(inputs, whole, train_tokenizer=grid.vocabulary, **same)
    manifest = load_manifest(whole)
    if (manifest.vocab_size, manifest.sequence_length) != (grid.vocabulary, grid.sequence_length):
        raise UserError(f"--output={folder} belongs to another grid: name another folder")
    if not manifest.validation.rows:
        raise UserError(f"--input={','.join(inputs)} is too little text to hold some out: give more")
    if EPOCHS in experiments and not part.exists():
        small_part(whole, grid.epochs_rows, part)
    return {COMPUTE: str(whole), EPOCHS: str(part)}


def done(file: Path) -> set[Run]:
    """Returns the runs that have a line in runs.jsonl. A last line that was not written to its end is removed."""
    if not file.exists():
        return set()
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    names = [field.name for field in dataclasses.fields(Run)]
    return {Run(**{name: line[name] for name in names}) for line in map(json.loads, whole.splitlines())}


def about(grid: Grid, run: Run) -> dict[str, object]:
    """Returns what a line says of a run before it has begun."""
    config = config_of(grid, run)
    tokens = run.steps * grid.tokens
    return dataclasses.asdict(run) | {
        "parameters": parameter_count(config.model),
        "flops": run.steps * flops_per_step(grid, run.kind, run.width),
        "tokens": tokens,
        "epochs": round(tokens / (run.unique_rows * grid.sequence_length), 3),
        "learning_rate": config.optimizer.peak_learning_rate,
    }


def measure(grid: Grid, run: Run, data: str, rows: HeldOut, workdir: Path) -> tuple[int, dict[str, object]]:
    """Trains a run in `workdir`, and returns the exit code of the training and what its line says of the result."""
    began = time.monotonic()
    code = train(config_of(grid, run, data), workdir)
    trained = time.monotonic()
    if code != entry_point.FINISHED:
        return code, {}
    result = nats(load(workdir)[0], rows, grid, data)
    rounded = {name: round(value, 5) for name, value in result.items()}
    seconds = {"seconds": round(trained - began, 1), "validation_seconds": round(time.monotonic() - trained, 1)}
    return code, rounded | seconds


def series(grid: Grid, runs: list[Run], sets: dict[str, str], folder: Path) -> Iterator[dict[str, object]]:
    """Does the runs that have no line yet, and yields the lines that are added.

    Raises:
      SystemExit: If a training stopped before its end, with its exit code. The next call goes on with it.
    """
    file = folder / "runs.jsonl"
    rows = validation_rows([sets[COMPUTE]], grid.rows, grid.sequence_length, grid.vocabulary)
    finished = done(file)
    versions = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for run in runs:
        if run in finished:
            continue
        workdir = folder / "-".join(map(str, dataclasses.astuple(run)))
        code, result = measure(grid, run, sets[run.experiment], rows, workdir)
        if code != entry_point.FINISHED:
            sys.exit(code)
        line = {"benchmark": "scaling"} | about(grid, run) | result
        line |= {"held_out_tokens": int(rows.length_N.sum())} | versions
        with file.open("a", encoding="utf-8") as output:
            output.write(json.dumps(line) + "\n")
        shutil.rmtree(workdir)
        yield line


def _path(text: str) -> Path:
    return Path(expanded(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", action="append", default=[], help="text, as for llada_jax.prepare; may repeat")
    parser.add_argument("--output", type=_path, help="folder for the prepared text and runs.jsonl")
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--kinds", choices=KINDS, nargs="*", default=["autoregressive", "llada"])
    parser.add_argument("--experiments", choices=(COMPUTE, EPOCHS), nargs="*", default=[COMPUTE, EPOCHS])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most_epochs", type=float, default=4.0)
    parser.add_argument("--most_flops", type=float, default=math.inf, help="leave out runs that take more")
    parser.add_argument("--list", action="store_true", help="print the runs and do none of them")
    args = parser.parse_args()
    if not args.input or not args.output:
        parser.error("--input and --output are missing")
    huge_pages.restart()
    compilation_cache.enable()
    grid = GRIDS[args.grid]
    try:
        sets = prepared([expanded(each) for each in args.input], grid, args.output, args.experiments)
        rows = load_manifest(sets[COMPUTE]).train.rows
        runs = runs_of(grid, rows, args.kinds, args.experiments, args.seeds, args.most_epochs)
        runs = [run for run in runs if about(grid, run)["flops"] <= args.most_flops]
        for line in map(functools.partial(about, grid), runs) if args.list else series(grid, runs, sets, args.output):
            print(json.dumps(line), flush=True)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
