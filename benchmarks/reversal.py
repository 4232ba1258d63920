r"""Tests the reversal curse (LLaDA, Section 3.3): a model that has read "A is B" is asked for B, and for A.

    python benchmarks/reversal.py --workdir=runs/reversal --output=reversal.jsonl [--data=couplets.json]
    python benchmarks/reversal_table.py --input=reversal.jsonl --output=benchmarks/reversal.svg > table.md

For each seed, an autoregressive model and a LLaDA of the same size (benchmarks/reversal_config.py) are trained on the
same facts (benchmarks/reversal_facts.py), with the same rows and steps. Some facts are seen in the order forward only,
some in reverse only, and others in both, from which the models learn that facts can be told in both orders. Then every
fact is asked for in both orders. With --data, a JSON list of {"first": ..., "second": ...}, the same is done with the
couplets of poems, of which none is seen in reverse only.

There are three ways of asking. Every model continues a text in the order that is asked for ("written"). If a fact was
not seen in this order, its text has a form that is known from other facts. A LLaDA can also fill in the missing part
where it stands in the text that was seen ("filled"): this needs no other order, but tells the model how many tokens are
missing. An autoregressive model cannot, but it can be asked which of all parts that it has read makes the text that was
seen most probable ("chosen"): this needs no other order either, and offers the answer among others. Generation is
greedy, one token per pass. An answer counts if all its tokens are right and, if it was written, it ends where it
should.

Each model appends one JSON line to --output. A run that was ended goes on where it was.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import reversal_facts
import tokenizers
from reversal_config import MODELS, get_config
from reversal_facts import BOTH, FORWARD, REVERSE, Item, Task

import llada_jax
from llada_jax.cli import outputs
from llada_jax.cli.paths import expanded_path
from llada_jax.config import SamplerConfig, UserError
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.evaluation.reversal import read_couplets
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.sampler import generate
from llada_jax.scoring.likelihood import log_likelihoods
from llada_jax.text.tokenizer import Tokenizer

# How often each text is seen by either model. A LLaDA needs this many to learn the order that it sees: with seed 0, it
# then answered 98 of 100 such questions about facts; after 97, 225 of 296 about couplets (2026-11-27, on a CPU).
EPOCHS = 170
WRITTEN, FILLED, CHOSEN = "written", "filled", "chosen"


class Question(NamedTuple):
    """A row of tokens, of which some are asked for."""

    row_T: np.ndarray  # int32: the whole text with its EOS
    start: int  # the first token that is asked for
    stop: int  # the token behind the last that must be right
    given: int  # the tokens from here on are given


def make_set(task: Task, folder: Path) -> None:
    """Writes the set that both models are trained on, in which each text is one row."""
    texts = task.texts()
    random.Random(0).shuffle(texts)
    words = dict.fromkeys(word for text in texts for word in text.split())
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if (folder / "set").exists():
        if (folder / "text.jsonl").read_text(encoding="utf-8") != lines:
            raise UserError(f"{folder} holds other texts: name another --workdir, or leave --facts and --data")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    manifest = prepare(
        [str(folder / "text.jsonl")], folder / "set", tokenizer=str(folder / "tokenizer.json"),
        sequence_length=task.row, validation_fraction=0.0, workers=1, progress=False,
    )  # fmt: skip
    if manifest.train.rows != len(texts):
        raise AssertionError(f"{len(texts)} texts make {manifest.train.rows} rows: a text is not one row")


def steps_of(task: Task) -> int:
    """Returns the number of steps in which each text is seen EPOCHS times."""
    return round(EPOCHS * len(task.texts()) / get_config().batch_size)


def train(model: str, task: Task, folder: Path, seed: int, steps: int) -> float:
    """Trains a model of MODELS in a process of its own, and returns the seconds that it took."""
    config = Path(__file__).with_name("reversal_config.py")
    command = [sys.executable, "-m", "llada_jax.train", f"--config={config}:{model}", f"--workdir={folder / model}"]
    command += [f"--config.data.path={folder / 'set'}", f"--config.sequence_length={task.row}"]
    command += [f"--config.seed={seed}", f"--config.steps={steps}"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"the training of {folder / model} ended with exit code {done.returncode}")
    return time.perf_counter() - began


def question(task: Task, item: Item, order: str, way: str, tokenizer: Tokenizer) -> Question:
    """Returns what a model gets when it is asked for the second part of an item (FORWARD), or the first (REVERSE)."""
    shown = order if way == WRITTEN or order in item.orders() else item.seen
    row_T = np.array([*tokenizer.encode(task.text(item, shown)), tokenizer.eos_id], np.int32)
    given, asked = (len(part.split()) for part in task.parts(item, shown))
    if shown != order:
        return Question(row_T, 0, given - 1, given - 1)  # all but the joint
    stop = given + asked
    return Question(row_T, given, stop + 1, len(row_T)) if way == WRITTEN else Question(row_T, given, stop, stop)


def answers(model: Transformer, questions: list[Question]) -> np.ndarray:
    """Returns the rows, int32 [N, T], in which a model has written what was asked for."""
    rows_NT = np.stack([each.row_T for each in questions])
    position_T = np.arange(rows_NT.shape[1])
    start_N1, given_N1 = (np.array([getattr(q, name) for q in questions])[:, None] for name in ("start", "given"))
    length, key = rows_NT.shape[1], jax.random.key(0)
    if not model.config.causal:
        hidden_NT = (position_T >= start_N1) & (position_T < given_N1)
        canvas_NT = np.where(hidden_NT, model.config.mask_id, rows_NT)
        config = SamplerConfig(gen_length=0, steps=length, block_length=length)
        return np.asarray(generate(model, canvas_NT, config, key))
    longest = max(each.start for each in questions)
    prompt_NT, real_NT = np.zeros((len(questions), longest), np.int32), np.arange(longest) >= longest - start_N1
    for each, prompt_T in zip(questions, prompt_NT, strict=True):
        prompt_T[longest - each.start :] = each.row_T[: each.start]
    canvas_NT = np.asarray(generate(model, prompt_NT, SamplerConfig(gen_length=length), key, real_NT))
    return np.stack([row_T[longest - q.start :][:length] for q, row_T in zip(questions, canvas_NT, strict=True)])


def choices(model: Transformer, tokenizer: Tokenizer, task: Task, items: list[Item], order: str) -> Iterator[str]:
    """Yields, of all parts of the task, the one that makes the text of an item most probable in an order seen."""
    asked = "second" if order == FORWARD else "first"
    parts = list(dict.fromkeys(getattr(item, asked) for item in task.items))
    for item in items:
        shown = order if order in item.orders() else item.seen
        texts = [task.text(dataclasses.replace(item, **{asked: part}), shown) for part in parts]
        rows = ([*tokenizer.encode(text), tokenizer.eos_id] for text in texts)
        scores = log_likelihoods(model, [(row[:1], row[1:]) for row in rows], key=jax.random.key(0))
        yield parts[int(np.argmax([score.value for score in scores]))]


def right(each: Question, row_T: np.ndarray) -> bool:
    """Returns whether all that was asked for is right."""
    return bool((row_T[each.start : each.stop] == each.row_T[each.start : each.stop]).all())


def ask(model: Transformer, tokenizer: Tokenizer, task: Task) -> Iterator[dict]:
    """Asks for all items in both orders and all ways, and yields the number of right answers of each kind."""
    for seen, order in itertools.product((FORWARD, REVERSE, BOTH), (FORWARD, REVERSE)):
        items = [item for item in task.items if item.seen == seen]
        if not items:
            continue
        about = {"seen": seen, "asked": order, "count": len(items)}
        for way in (WRITTEN,) if model.config.causal else (WRITTEN, FILLED):
            questions = [question(task, item, order, way, tokenizer) for item in items]
            pairs = list(zip(questions, answers(model, questions), strict=True))
            wrong = [
                {"wanted": tokenizer.decode(each.row_T), "written": tokenizer.decode(row_T)}
                for each, row_T in pairs
                if not right(each, row_T)
            ]
            yield about | {"way": way, "right": len(items) - len(wrong), "wrong": wrong[:3]}
        if model.config.causal:
            asked = "second" if order == FORWARD else "first"
            found = zip(items, choices(model, tokenizer, task, items, order), strict=True)
            wrong = [
                {"wanted": getattr(item, asked), "written": part}
                for item, part in found
                if part != getattr(item, asked)
            ]
            yield about | {"way": CHOSEN, "right": len(items) - len(wrong), "wrong": wrong[:3]}


def measure(name: str, task: Task, seed: int, steps: int, workdir: Path) -> dict:
    """Trains a model on a task and asks it. Returns what its line says."""
    folder = workdir / f"{task.name}-{seed}"
    make_set(task, folder)
    seconds = train(name, task, folder, seed, steps)
    model, tokenizer = llada_jax.load(folder / name)
    return {
        "benchmark": "reversal",
        "task": task.name,
        "seed": seed,
        "model": name,
        "items": len(task.items),
        "texts": len(task.texts()),
        "row": task.row,
        "steps": steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "seconds": round(seconds, 1),
        "answers": list(ask(model, tokenizer, task)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def run(args: argparse.Namespace) -> None:
    """Trains and asks all models that --output does not tell of yet."""
    output = outputs.check_file(args.output)
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    done = {tuple(line[name] for name in ("task", "seed", "model")): line for line in map(json.loads, lines)}
    poems = [(each.first, each.second) for each in read_couplets(args.data)] if args.data else []
    for seed in range(args.seeds):
        tasks = [reversal_facts.facts(seed, args.facts)] + ([reversal_facts.couplets(seed, poems)] if poems else [])
        for task, name in itertools.product(tasks, MODELS):
            steps, earlier = args.steps or steps_of(task), done.get((task.name, seed, name))
            if earlier:
                if (earlier["items"], earlier["steps"]) != (len(task.items), steps):
                    raise UserError(
                        f"--output={output} has {task.name} of a run with {earlier['items']} items and "
                        f"{earlier['steps']} steps: name another file, or leave --facts, --data and --steps"
                    )
                continue
            line = measure(name, task, seed, steps, args.workdir)
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(f"{task.name}, seed {seed}, {name}: {line['seconds']} s", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=expanded_path, required=True, help="folder for the sets and the training runs"
    )
    parser.add_argument("--output", type=expanded_path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--data", type=expanded_path, help="couplets of poems, to be learned as well")
    parser.add_argument("--seeds", type=_positive, default=5, help="each has its own facts, weights and order of rows")
    parser.add_argument(
        "--facts", type=_positive, default=50, help="facts seen forward only; four times as many in all"
    )
    parser.add_argument(
        "--steps", type=_positive, help="steps of each run; default: so many that each text is seen EPOCHS times"
    )
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
