r"""Measures the quality of the rules of sampling beside their speed, on problems whose answers can be checked.

    python benchmarks/tasks.py --model=runs/tasks --problems=problems/held_out.jsonl --output=tasks.jsonl

benchmarks/tasks_config.py has the commands that make the model and the problems. --causal=runs/tasks_ar adds an
autoregressive model, which writes with its cache. Every rule of `commit` (and the schedule with 1, 2 and 4 tokens per
step) is used with every cache and block length; the other orders of `remasking` and the rules that take tokens back are
used without a cache, the latter in the blocks of --revoke_blocks. The rules that find the length are used with
commit=threshold: append with every cache and block length, and daedal once, if --gen_length is more than its first 64
tokens. All settings get the same problems in the same batches. For each batch they take turns, so that other load on
the machine affects all of them alike.

Each batch and setting appends one JSON line to --output; a run that was ended goes on where it was. Of a batch they
tell: correct, the number of answers with the right result; whole, those in which the working is right too; right, the
share of the parts (digits, signs) of the results that are at their place; tokens, the number of tokens up to the end of
the answers; passes, the number of forward passes of all rows; and the time of the batch in seconds and in seconds of
CPU time. Compilation is not counted. benchmarks/tasks_table.py makes of this file a table and a picture.
"""

import argparse
import dataclasses
import json
import operator
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import problems

import llada_jax
from llada_jax.cli.paths import expanded_path
from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import daedal
from llada_jax.sampling.commit import RULES, SCHEDULE
from llada_jax.sampling.lengths import APPEND, DAEDAL
from llada_jax.sampling.sampler import generate
from llada_jax.sampling.settings import NONE, REMDM, WINO
from llada_jax.sampling.text_completion import row_keys, text_length
from llada_jax.text.tokenizer import Tokenizer

PER_STEP = (1, 2, 4)  # tokens per step of the schedule
ORDERS = ("random", "margin", "entropy")  # that of the other settings is low_confidence
BOLD = {"commit": "threshold", "commit_bound": 0.6}  # as the authors of WINO use it
VARIED = (
    "commit",
    "steps",
    "commit_bound",
    "remasking",
    "revoke",
    "cache",
    "block_length",
    "length",
)  # the fields in which the settings differ


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some problems of one task, left-padded to the length of the longest of all problems."""

    task: str
    number: int
    rows: list[dict[str, str]]  # each with "prompt" and "response"
    prompt_BT: np.ndarray  # int32
    real_BT: np.ndarray  # bool, False = padding


def read_batches(path: Path, tokenizer: Tokenizer, size: int, count: int) -> list[Batch]:
    """Returns the first `count` problems of each task in batches of this size; a last, smaller one is left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}]) for row in rows]
    # One column more than is needed, because a batch without padding is another program.
    length, found = max(map(len, ids)) + 1, []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [i for i, row in enumerate(rows) if row["task"] == task][:count]
        for number, first in enumerate(range(0, len(chosen) - size + 1, size)):
            part = chosen[first : first + size]
            prompt_BT = np.zeros((len(part), length), np.int32)
            for row_T, i in zip(prompt_BT, part, strict=True):
                row_T[length - len(ids[i]) :] = ids[i]
            real_BT = np.arange(length) >= length - np.array([len(ids[i]) for i in part])[:, None]
            found.append(Batch(task, number, [rows[i] for i in part], prompt_BT, real_BT))
    return found


AUTOREGRESSIVE = {"commit": "autoregressive", "cache": "causal"}  # how the lines of that model are marked


def settings(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields the fields of SamplerConfig in which the settings to measure differ."""
    rules = [{"commit": rule} for rule in RULES]
    rules += [{"commit": rule, "commit_bound": bound} for rule, bound in args.bounds]
    for block_length in args.block_lengths:
        # Each block gets an equal share of the steps, also a last block that is shorter than the others.
        blocks = -(-args.gen_length // block_length)
        schedules = [{"commit": SCHEDULE, "steps": blocks * -(-block_length // n)} for n in PER_STEP]
        revoking = [schedule | {"revoke": rule} for rule in REMDM for schedule in schedules[:2]]
        revoking += [rule | {"revoke": WINO} for rule in ({"commit": "threshold"}, BOLD)]
        ordered = [schedule | {"remasking": order} for order in ORDERS for schedule in schedules[:2]]
        uncached = ordered + (revoking if block_length in args.revoke_blocks else [])
        for cache in args.caches:
            appended = [{"commit": "threshold", "length": APPEND}] if block_length < args.gen_length else []
            for rule in schedules + rules + appended + (uncached if cache == NONE else []):
                yield rule | {"cache": cache, "block_length": block_length}
    if args.gen_length > daedal.FIRST:  # otherwise it has nothing to find
        yield {"commit": "threshold", "length": DAEDAL, "cache": NONE, "block_length": args.gen_length}
    if args.causal:
        yield AUTOREGRESSIVE


def measure(model: Transformer, tokenizer: Tokenizer, batch: Batch, config: SamplerConfig) -> dict[str, float]:
    """Answers the problems of a batch, and returns what its line says of them."""
    keys_B = row_keys(jax.random.key(0), range(len(batch.rows)))
    wall, cpu = time.perf_counter(), time.process_time()
    canvas_BT, steps_B = generate(model, batch.prompt_BT, config, keys_B, batch.real_BT, return_steps=True)
    canvas_BT, steps_B = np.asarray(canvas_BT), np.asarray(steps_B)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    correct = whole = tokens = right = parts = 0
    for row, row_T in zip(batch.rows, canvas_BT[:, batch.prompt_BT.shape[1] :], strict=True):
        length = text_length(row_T, model, tokenizer)
        text = tokenizer.decode(row_T[:length].tolist(), skip_special=True).strip()
        tokens += min(length + 1, len(row_T))  # the end is a token of the answer too
        whole += text == row["response"]
        found, wanted = (problems.result(each).split() for each in (text, row["response"]))
        correct += found == wanted
        right += sum(map(operator.eq, found, wanted))
        parts += len(wanted)
    return {
        "problems": len(batch.rows),
        "correct": correct,
        "whole": whole,
        "right": right / parts,
        "tokens": tokens,
        "passes": int(steps_B.sum()),
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 4),
    }


def _bound(text: str) -> tuple[str, float]:
    rule, _, bound = text.partition("=")
    return rule, float(bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "problems", "output"):
        parser.add_argument(f"--{name}", type=expanded_path, required=True)
    sizes = {"count": 500, "batch_size": 100, "gen_length": 24}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--block_lengths", type=int, nargs="*", default=[8, 24])
    parser.add_argument(
        "--revoke_blocks", type=int, nargs="*", default=[24], help="block lengths to take tokens back in"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint of --model; default: the newest")
    parser.add_argument("--causal", type=expanded_path, help="an autoregressive model with the same tokenizer")
    parser.add_argument("--caches", nargs="*", default=["none", "prefix", "dual"])
    parser.add_argument("--bounds", type=_bound, nargs="*", default=[], help="further bounds, such as threshold=0.8")
    args = parser.parse_args()

    model, tokenizer = llada_jax.load(args.model, step=args.step)
    causal = llada_jax.load(args.causal)[0] if args.causal else None
    batches = read_batches(args.problems, tokenizer, args.batch_size, args.count)
    base = SamplerConfig(gen_length=args.gen_length, stop_at_end=True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}
    about |= {"model": str(args.model), "step": args.step, "batch_size": args.batch_size, "gen_length": args.gen_length}
    text = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    done = {_name(line) for line in lines}
    for name in ("model", "step", "batch_size", "gen_length"):
        if others := {line.get(name) for line in lines} - {about[name]}:
            parser.error(f"--output={args.output} has lines with another {name}, {others.pop()}: name another file")
    warm: set[str] = set()
    with open(args.output, "a", encoding="utf-8") as file:
        for number in range(max(batch.number for batch in batches) + 1):
            for varied in settings(args):
                autoregressive = varied == AUTOREGRESSIVE
                writer = causal if autoregressive else model
                config = base if autoregressive else dataclasses.replace(base, **varied)
                for batch in batches:
                    line = {"benchmark": "tasks", "task": batch.task, "batch": batch.number} | varied
                    if batch.number != number or _name(line) in done:
                        continue
                    program = str(varied | {"steps": 0, "commit_bound": 0})
                    if program not in warm:  # the first run also compiles and is not counted
                        warm.add(program)
                        measure(writer, tokenizer, batch, config)
                    line |= measure(writer, tokenizer, batch, config) | about
                    file.write(json.dumps(line) + "\n")
                    file.flush()
            print(f"batch {number}", file=sys.stderr, flush=True)


def _name(line: dict[str, object]) -> tuple:
    """Returns what tells the lines of a file apart."""
    return tuple(line.get(name) for name in ("task", "batch", *VARIED))


if __name__ == "__main__":
    main()
