r"""Measures the quality of stories beside the speed of writing them, for many ways of sampling.

    python benchmarks/stories.py --model=runs/stories_llada --causal=runs/stories_arm --data=data/stories \
        --judge=SmolLM2-135M --output=stories.jsonl
    python benchmarks/stories_table.py --input=stories.jsonl --output=stories.svg > table.md

benchmarks/stories_config.py has the commands that make the two models and the set. Every way of WAYS continues the
same beginnings of held-out stories by --gen_length tokens, in the same batches and with the same keys; the end of a
story is never chosen, so all continuations have equally many tokens. For each batch the ways take turns, so that other
load on the machine affects all of them alike. --judge is the folder of an autoregressive model that is larger than
those that write. Its exact -log p(continuation | beginning) in nats tells how unusual the text is. The
continuations that the stories really have are judged in the same way, as the mark (TRUE).

Each batch and way appends one JSON line to --output; a run that was ended goes on where it was. A line tells: texts,
the continuations; nats and characters of each; tokens; passes, the number of forward passes of all rows; and the time
of the batch in seconds and in seconds of CPU time. Neither compilation nor the judge's work is counted.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import llada_jax
from llada_jax.cli import outputs
from llada_jax.cli.paths import expanded_path
from llada_jax.config import SamplerConfig, UserError
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.data.read.remote import manifest_of
from llada_jax.evaluation.pairs import Encoder
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.sampler import generate
from llada_jax.sampling.text_completion import row_keys
from llada_jax.scoring.likelihood import log_likelihoods
from llada_jax.text.tokenizer import Tokenizer

TRUE, EXACT, AUTOREGRESSIVE = "the stories themselves", "schedule, 1 per step", "autoregressive"
# The name of each way, and where it differs from BASE; per_step is the number of tokens per step of the schedule.
BASE = {"temperature": 0.7, "block_length": 32}
WAYS: dict[str, dict[str, object]] = {
    TRUE: {},
    f"{AUTOREGRESSIVE}, temperature 1": {"temperature": 1.0},
    AUTOREGRESSIVE: {},
    f"{AUTOREGRESSIVE}, greedy": {"temperature": 0.0},
    EXACT: {"per_step": 1},
    f"{EXACT}, greedy": {"per_step": 1, "temperature": 0.0},
    f"{EXACT}, blocks of 16": {"per_step": 1, "block_length": 16},
    f"{EXACT}, one block of 64": {"per_step": 1, "block_length": 64},
    f"{EXACT}, random order": {"per_step": 1, "remasking": "random"},
    f"{EXACT}, random order, temperature 1": {"per_step": 1, "remasking": "random", "temperature": 1.0},
    "schedule, 2 per step": {"per_step": 2},
    "schedule, 4 per step": {"per_step": 4},
    "threshold": {"commit": "threshold"},
    "factor": {"commit": "factor"},
    "entropy": {"commit": "entropy"},
    "local": {"commit": "local"},
    f"{EXACT}, prefix": {"per_step": 1, "cache": "prefix"},
    f"{EXACT}, dual": {"per_step": 1, "cache": "dual"},
    "factor, dual": {"commit": "factor", "cache": "dual"},
    "threshold 0.6, wino": {"commit": "threshold", "commit_bound": 0.6, "revoke": "wino"},
    f"{EXACT}, remdm_loop": {"per_step": 1, "revoke": "remdm_loop"},
}


class Text(NamedTuple):
    """A beginning and its continuation."""

    beginning: str
    continuation: str


def first_tokens(data: Path, vocab_size: int, prompt_length: int, gen_length: int, count: int) -> np.ndarray:
    """Returns the first tokens of held-out stories, int32 (count, 1 + prompt_length + gen_length), behind EOS.

    Left out are stories that are shorter, and those whose prompt is that of an earlier one.

    Raises:
      UserError: If the set holds out fewer such stories than `count`.
    """
    manifest = manifest_of(str(data))
    rows = validation_rows([str(data)], sys.maxsize, manifest.sequence_length, vocab_size)
    # Packed rows follow one another without a gap: together they are the stories, with EOS behind each.
    tokens = np.concatenate([row[:n] for row, n in zip(rows.tokens_NT, rows.length_N, strict=True)])
    found: dict[bytes, np.ndarray] = {}
    width = 1 + prompt_length + gen_length
    for start in np.flatnonzero(tokens == manifest.eos_id):
        row_T = tokens[start : start + width]
        if len(row_T) == width and manifest.eos_id not in row_T[1:]:
            found.setdefault(row_T[: 1 + prompt_length].tobytes(), row_T)
    if len(found) < count:
        raise UserError(f"--count={count}: {data} holds out {len(found)} stories that are long enough and begin apart")
    return np.stack([*found.values()][:count])


def sampler(way: dict[str, object], gen_length: int, causal: bool) -> SamplerConfig:
    """Returns the settings of a way. A block has one step for every `per_step` of its tokens."""
    fields = (BASE if not causal else {"temperature": BASE["temperature"]}) | way
    per_step = fields.pop("per_step", None)
    if per_step:
        blocks = -(-gen_length // fields["block_length"])
        fields["steps"] = blocks * -(-min(fields["block_length"], gen_length) // per_step)
    # A story that ends would leave a way fewer tokens to write.
    return SamplerConfig(gen_length=gen_length, logits_eos_inf=True, **fields)


def write(
    model: Transformer, tokenizer: Tokenizer, prompt_BT: np.ndarray, config: SamplerConfig, keys_B: jax.Array
) -> tuple[list[Text], dict[str, float]]:
    """Continues the prompts, and returns the texts and what the line says of the work."""
    wall, cpu = time.perf_counter(), time.process_time()
    canvas_BT, steps_B = generate(model, prompt_BT, config, keys_B, return_steps=True)
    canvas_BT, steps_B = np.asarray(canvas_BT), np.asarray(steps_B)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    about = {"tokens": len(prompt_BT) * config.gen_length, "passes": int(steps_B.sum())}
    about |= {"seconds": round(wall, 4), "cpu_seconds": round(cpu, 4)}
    return texts(canvas_BT, tokenizer, prompt_BT.shape[1]), about


def texts(canvas_BT: np.ndarray, tokenizer: Tokenizer, start: int) -> list[Text]:
    """Returns the text of each row, without the EOS in front, cut at the token `start`."""
    return [
        Text(tokenizer.decode(row_T[1:start]), tokenizer.decode(row_T[start:], continuation=True))
        for row_T in canvas_BT.tolist()
    ]


def judged(model: Transformer, tokenizer: Tokenizer, found: list[Text]) -> dict[str, list]:
    """Returns the continuations, their characters, and the nats of each: its exact -log p, given the beginning."""
    encoder = Encoder(tokenizer)
    scores = log_likelihoods(model, [encoder.pair(*text) for text in found], key=jax.random.key(0))
    return {
        "nats": [round(-score.value, 3) for score in scores],
        "characters": [len(text.continuation) for text in found],
        "texts": [text.continuation for text in found],
    }


def run(args: argparse.Namespace) -> None:
    """Writes and judges all that --output does not tell of yet."""
    output = outputs.check_file(args.output)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []
    about = {name: getattr(args, name) for name in ("batch_size", "prompt_length", "gen_length", "seed")}
    about |= {name: str(getattr(args, name)) for name in ("model", "causal", "judge")}
    for name, value in about.items():
        if others := {line[name] for line in lines} - {value}:
            raise UserError(f"--output={output} has lines with another {name}, {others.pop()}: name another file")
    done = {(line["way"], line["batch"]) for line in lines}
    llada, tokenizer = llada_jax.load(args.model)
    causal, judge = llada_jax.load(args.causal)[0], llada_jax.load(args.judge)
    about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}
    start = 1 + args.prompt_length
    rows_NT = first_tokens(args.data, llada.config.vocab_size, args.prompt_length, args.gen_length, args.count)
    warm: set[str] = set()
    for batch, first in enumerate(range(0, len(rows_NT) - args.batch_size + 1, args.batch_size)):
        row_BT = rows_NT[first : first + args.batch_size]
        keys_B = row_keys(jax.random.key(args.seed), range(first, first + args.batch_size))
        for name in args.ways:
            if (name, batch) in done:
                continue
            line = {"benchmark": "stories", "way": name, "batch": batch} | WAYS[name]
            found = texts(row_BT, tokenizer, start)
            if name != TRUE:
                writer = causal if name.startswith(AUTOREGRESSIVE) else llada
                config = sampler(WAYS[name], args.gen_length, writer is causal)
                if name not in warm:  # the first run also compiles and is not counted
                    warm.add(name)
                    write(writer, tokenizer, row_BT[:, :start], config, keys_B)
                found, work = write(writer, tokenizer, row_BT[:, :start], config, keys_B)
                line |= work
            line |= judged(*judge, found) | about
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"batch {batch}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = {
        "model": "the LLaDA",
        "causal": "the autoregressive model, with the same tokenizer",
        "data": "the prepared set that holds out stories",
        "judge": "the folder of the model that judges",
        "output": "the file of JSON lines to append to",
    }
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=expanded_path, required=True, help=text)
    for name, value in {"count": 96, "batch_size": 16, "prompt_length": 16, "gen_length": 64, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="default: all")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
