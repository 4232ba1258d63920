r"""Trains LLaDA and autoregressive models with equal compute, to see how their likelihoods grow with it.

    python benchmarks/scaling.py --input=stories.jsonl.gz --output=runs/scaling --grid=cpu
    python benchmarks/scaling_table.py --input=runs/scaling/runs.jsonl --picture=scaling.svg

Three experiments:

  rates     Models of one width with one budget and several learning rates. In the other experiments, each kind has the
            one that did best: with AdamW, times this width over the width of the model.
  compute   Models of several widths, each with several budgets of FLOPs. Every run is a whole schedule: warm-up and
            linear decay to zero within its budget. Left out are runs of very few steps, and runs that would go over the
            text more than --most_epochs times.
  epochs    A model of one width on a small part of the text, which it goes over 2, 8, 32 ... times. Here, too, every
            run is a whole schedule.

Equal compute. FLOPs are those of llada_jax/training/flops.py: 6 per parameter of a matrix and token, and those of
attention, of which a causal model needs half; a masked model needs the head for half of the positions. With a
vocabulary of 2 L T ids (L layers, T tokens per row), the one outweighs the other: both kinds of models have the same
FLOPs per token, and so the same steps, tokens, batches and FLOPs, to the last digit. What the machine spends on them
may differ; each line has the seconds, too.

Equal treatment. Both kinds have the same weights at the start, rows in the same order, optimizer and schedule, and the
learning rate is chosen for both from the same ones in the same way. Without the experiment rates, it is the middle one.
The products that Muon itself needs are not counted; they are the same for both. LLaDA is trained with the paper's
objective (Eq. 3), but for loss_weight=count, whose mean is the same. --kinds=llada_window takes t from (0.2, 0.9) only,
as configs/quickstart.py does; its results are of all t, too.

Results are nats per token of all held-out rows, those of one tokenizer, so that kinds can be compared:

  autoregressive   the exact negative log-likelihood. The first token of a row has none before it; it gets its frequency
                   in the text of the training, so that the result, too, is about all tokens.
  llada            the mean of Eq. 6 over random masks, an upper bound of the negative log-likelihood. How far it is
                   above the likelihood, nobody knows. standard_error is that of the mean over the samples, each with
                   other masks of all rows: how far the mean may be from the bound.

The folder --output gets the prepared text, a workdir for the run under way, and runs.jsonl, one JSON line per run. The
cheapest runs come first, so that what is there tells something at any time. The same command, started again, goes on
where it was. --list prints the runs of a grid, and trains nothing.

Grids. cpu: 0.06 to 0.8 M parameters, 1.0e14 FLOPs; --most_flops=7e12 leaves 7.6e13. It should take about an hour on one
core with AVX-512. The text should have 3 million tokens, as 7.5 MB of stories have. gpu: 17 to 274 M parameters, 5e17
FLOPs, for a text of at least 70 MB, such as 92 novels. By the step times of benchmarks/RESULTS.md these are 24 minutes
on one H100 at 35 % MFU, and about 15 more for compiling and validation. It has not been run.
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
from scaling_grid import (
    COMPUTE,
    EPOCHS,
    GRIDS,
    KINDS,
    OPTIMIZERS,
    RATES,
    Grid,
    Run,
    about,
    best_rates,
    config_of,
    runs_of,
)

from llada_jax.cli import compilation_cache, entry_point, huge_pages
from llada_jax.cli.outputs import temporary_folder
from llada_jax.cli.paths import expanded, expanded_path
from llada_jax.config import UserError, ValidationConfig
from llada_jax.data.manifest import TOKENIZER_FOLDER, Split, load_manifest
from llada_jax.data.prepare.output import publish
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.data.read.shards import open_sets
from llada_jax.data.rows import HeldOut, ShardWriter, encode_row
from llada_jax.devices import mesh
from llada_jax.loading import load
from llada_jax.model.transformer import Transformer, split
from llada_jax.scoring import bound
from llada_jax.training.run import train


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
    if [source.input for source in manifest.sources] != inputs:
        raise UserError(f"--output={folder} has other text than --input={','.join(inputs)}: name another folder")
    if not manifest.validation.rows:
        raise UserError(f"--input={','.join(inputs)} is too little text to hold some out: give more")
    if EPOCHS in experiments and not part.exists():
        small_part(whole, grid.epochs_rows, part)
    return {RATES: str(whole), COMPUTE: str(whole), EPOCHS: str(part)}


def lines_of(file: Path) -> list[dict[str, object]]:
    """Returns the lines of runs.jsonl. A last line that was not written to its end is removed from the file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


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
    names = [field.name for field in dataclasses.fields(Run)]
    finished = {Run(**{name: line[name] for name in names}) for line in lines_of(file)}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", action="append", default=[], help="text, as for llada_jax.prepare; may repeat")
    parser.add_argument("--output", type=expanded_path, help="folder for the prepared text and runs.jsonl")
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=["autoregressive", "llada"])
    parser.add_argument("--experiments", choices=(RATES, COMPUTE, EPOCHS), nargs="+", default=[RATES, COMPUTE, EPOCHS])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="default: the grid's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most_epochs", type=float, help="of rates and compute; default: the grid's")
    parser.add_argument("--most_flops", type=float, default=math.inf, help="leave out runs of more FLOPs")
    parser.add_argument("--list", action="store_true", help="print the runs and do none of them")
    args = parser.parse_args()
    if not args.input or not args.output:
        parser.error("--input=FILES and --output=DIR are both needed")
    if args.seeds < 1:
        parser.error(f"--seeds={args.seeds}: there must be at least one")
    huge_pages.restart()
    compilation_cache.enable()
    grid, kinds = GRIDS[args.grid], list(dict.fromkeys(args.kinds))
    if args.optimizer:
        grid = dataclasses.replace(grid, optimizer=args.optimizer)
    if args.most_epochs is not None:
        grid = dataclasses.replace(grid, most_epochs=args.most_epochs)
    try:
        sets = prepared([expanded(each) for each in args.input], grid, args.output, args.experiments)
        rows = load_manifest(sets[COMPUTE]).train.rows
        for part in ([RATES], [COMPUTE, EPOCHS]):  # what RATES finds decides the other runs
            before = lines_of(args.output / "runs.jsonl")
            if any(line["optimizer"] != grid.optimizer for line in before):
                raise UserError(f"--output={args.output} has runs of another optimizer: name another folder")
            rates = best_rates(grid, before, kinds)
            experiments = [each for each in part if each in args.experiments]
            runs = runs_of(grid, rows, kinds, experiments, rates, args.seeds)
            runs = [run for run in runs if about(grid, run)["flops"] <= args.most_flops]
            lines = (about(grid, run) for run in runs) if args.list else series(grid, runs, sets, args.output)
            for line in lines:
                print(json.dumps(line), flush=True)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
