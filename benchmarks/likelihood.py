"""Measures the likelihood of answers: python benchmarks/likelihood.py [--model=DIR --text=FILE.jsonl]

Prints one JSON line per case.

Without --model, measures the speed on random weights: a set of requests like HellaSwag's through
`scoring.likelihood.log_likelihoods`, and the plain way, which processes one request at a time and applies the head to
every position of the canvas. The cases run in turns, so that other load on the machine affects all of them alike. It
reports medians and the ratio of medians, both of elapsed time and of this process's CPU time, which other load
disturbs less. Compilation is not counted.

With --model (a trained model) and --text (a file with one object {"text": ...} per line), measures the variance: the
standard deviation of one sample of the 1/t form, of Eq. 6 with l drawn independently, and of our estimate with l spread
evenly (the standard deviation of the estimate, times the square root of its number of samples). The variances are
averaged over texts. It also reports the ratio of our reported standard error to the true one.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import llada_jax
from llada_jax.cli.paths import expanded
from llada_jax.config import ComputeConfig, ModelConfig, NonFinite
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer, initialise
from llada_jax.scoring.bound import masked_nats
from llada_jax.scoring.likelihood import greedy_matches, log_likelihoods

FORMS = ("1/t", "Eq. 6, l independent", "ours")


@jax.jit
def _plain(model: Transformer, tokens_BT: jax.Array, mask_BT: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Returns weight * sum log p over the masked positions, (B,), computing logits for every position."""
    tokens_BT = jax.reshard(tokens_BT, mesh.TOKENS_BT)
    logits_BTV = model.logits(model.trunk(jnp.where(mask_BT, model.config.mask_id, tokens_BT)))
    log_p_BTV = jax.nn.log_softmax(jax.reshard(logits_BTV, mesh.HIDDEN_BTD))
    log_p_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return weight_B * jnp.where(mask_BT, log_p_BT, 0.0).sum(axis=1)


def draw(rng: np.random.Generator, prompt: int, answer: int, samples: int, form: str):
    """Draws random masks of an answer.

    Args:
      rng: The source of random numbers.
      prompt: Number of tokens of the prompt, which are never masked.
      answer: Number of tokens of the answer.
      samples: Number of masks to draw.
      form: "1/t" for the 1/t form, anything else for Eq. 6 with l drawn independently.

    Returns:
      The masks, bool (samples, prompt + answer), and their weights, fp32 (samples,): 1 / t, or L / l.
    """
    uniform = rng.random((samples, answer))
    if form == "1/t":
        t = 1 - rng.random(samples)
        mask, weight = uniform < t[:, None], 1 / t
    else:
        masked = rng.integers(1, answer + 1, samples)
        mask, weight = uniform.argsort(axis=1).argsort(axis=1) < masked[:, None], answer / masked
    return np.pad(mask, ((0, 0), (prompt, 0))), weight.astype(np.float32)


def plain(model: Transformer, requests, samples: int, chunk: int) -> list[float]:
    """Scores one request at a time, in chunks of its samples, as the published code does."""
    rng, values = np.random.default_rng(0), []
    with mesh.mesh_of(model.embedding[...]):
        for prompt, answer in requests:
            tokens = np.tile(np.concatenate([prompt, answer]).astype(np.int32), (chunk, 1))
            parts = []
            for _ in range(samples // chunk):
                mask, weight = draw(rng, len(prompt), len(answer), chunk, "Eq. 6")
                parts.append(np.asarray(_plain(model, tokens, mask, weight)))
            values.append(float(np.mean(parts)))
    return values


@functools.partial(jax.jit, static_argnames="times")
def _trunk(model: Transformer, tokens_BT: jax.Array, times: int) -> jax.Array:
    tokens_BT = jax.reshard(tokens_BT, mesh.TOKENS_BT)

    def once(_, total):  # Every iteration depends on the one before, so the compiler cannot merge them.
        return total + jnp.sum(model.trunk(tokens_BT + (total > 1e30)).astype(jnp.float32))

    return jax.lax.fori_loop(0, times, once, jnp.float32(0))


def speed(args: argparse.Namespace) -> None:
    architecture = {name: getattr(args, name) for name in ("layers", "width", "heads", "feed_forward", "vocab_size")}
    config = ModelConfig(**architecture, kv_heads=args.heads, mask_id=args.vocab_size - 1)
    with jax.set_mesh(mesh.one_device_mesh()):
        model = initialise(config, ComputeConfig(unroll=args.unroll), jax.random.key(0))
    rng = np.random.default_rng(0)
    requests = [
        tuple(rng.integers(0, args.vocab_size - 1, rng.integers(*bounds)) for bounds in ((40, 121), (10, 41)))
        for _ in range(args.requests)
    ]
    tokens = args.samples * sum(len(prompt) + len(answer) for prompt, answer in requests)
    batch = np.zeros((32, 128), np.int32)

    def trunk() -> None:
        with mesh.mesh_of(model.embedding[...]):
            _trunk(model, batch, -(-tokens // batch.size)).block_until_ready()

    score = functools.partial(log_likelihoods, model, requests, samples=args.samples, key=jax.random.key(0))
    cases = {
        "log_likelihoods": lambda: score(batch_size=args.batch_size),
        "plain": lambda: plain(model, requests, args.samples, args.chunk),
        "the trunk alone on as many tokens": trunk,
        "greedy_matches": lambda: greedy_matches(model, requests, batch_size=args.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(args.repeats + 1):
        for name, case in cases.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            case()
            if repeat:  # The first run also compiles and is not counted.
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    for name, values in seconds.items():
        tell(
            args,
            case=name,
            seconds=round(medians[name], 3),
            fastest=round(min(values), 3),
            slowest=round(max(values), 3),
            cpu_seconds=round(cpu_medians[name], 3),
            ms_per_request=round(1000 * medians[name] / args.requests, 1),
            times_plain=round(medians["plain"] / medians[name], 2),
            times_plain_in_cpu_seconds=round(cpu_medians["plain"] / cpu_medians[name], 2),
            **architecture,
        )


def variance(args: argparse.Namespace) -> None:
    model, tokenizer = llada_jax.load(args.model)
    with open(args.text, encoding="utf-8") as file:
        texts = [tokenizer.encode(json.loads(line)["text"]) for line in file]
    rng = np.random.default_rng(0)

    def values(tokens_T: np.ndarray, prompt: int, form: str) -> np.ndarray:
        mask, weight = draw(rng, prompt, len(tokens_T) - prompt, args.draws, form)
        parts = []
        with mesh.mesh_of(model.embedding[...]):
            for i in range(0, args.draws, 64):
                part = np.tile(tokens_T, (64, 1)), mask[i : i + 64], weight[i : i + 64]
                parts.append(np.asarray(_rows(model, *mesh.place_rows(*part))))
        return np.concatenate(parts)

    for lengths in args.lengths.split(","):
        prompt, answer = map(int, lengths.split(":"))
        chosen = [np.int32(ids[: prompt + answer]) for ids in texts if len(ids) >= prompt + answer][: args.texts]
        squares: dict[str, list[float]] = {form: [] for form in FORMS}
        off, nats = [], []
        for tokens_T in chosen:
            for form in FORMS[:2]:
                squares[form].append(values(tokens_T, prompt, form).var(ddof=1))
            scores = np.array(
                [
                    log_likelihoods(
                        model,
                        [(tokens_T[:prompt], tokens_T[prompt:])],
                        samples=args.samples,
                        key=jax.random.key(i),
                    )[0]
                    for i in range(args.estimates)
                ]
            )
            squares["ours"].append(scores[:, 0].var(ddof=1) * args.samples)
            off.append((scores[:, 0].var(ddof=1), (scores[:, 1] ** 2).mean()))
            nats.append(-scores[:, 0].mean())
        deviation = {form: math.sqrt(np.mean(square)) for form, square in squares.items()}
        true, reported = np.mean(off, axis=0)
        for form in FORMS:
            tell(
                args,
                case=form,
                prompt=prompt,
                answer=answer,
                texts=len(chosen),
                nats=round(float(np.mean(nats)), 2),
                deviation_of_one_sample=round(deviation[form], 2),
                samples_for_the_error_of_ours=round((deviation[form] / deviation["ours"]) ** 2, 2),
                **({"reported_error_over_true": round(math.sqrt(reported / true), 3)} if form == "ours" else {}),
            )


@jax.jit
def _rows(model: Transformer, tokens_BT: jax.Array, mask_BT: jax.Array, weight_B: jax.Array) -> jax.Array:
    chunk, mask_id = model.compute.loss_chunk, model.config.mask_id
    return -masked_nats(model, model.trunk, tokens_BT, mask_BT, weight_B, chunk, mask_id)


def tell(args: argparse.Namespace, **line) -> None:
    """Prints one JSON line."""
    where = {
        "samples": args.samples,
        "threads": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "likelihood"} | line | where, allow_nan=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"layers": 8, "width": 512, "heads": 8, "feed_forward": 1536, "vocab_size": 32000, "unroll": 1}
    sizes |= {"requests": 16, "samples": 32, "chunk": 32, "repeats": 3, "batch_size": None, "threads": 2}
    sizes |= {"texts": 4, "draws": 1024, "estimates": 40}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--model", type=expanded, help="trained model to measure the variance on, instead of measuring the speed"
    )
    parser.add_argument("--text", type=expanded, help='file with one JSON object {"text": ...} per line, for --model')
    parser.add_argument(
        "--lengths", default="32:8,32:32,32:96", help="lengths in tokens as PROMPT:ANSWER, separated by commas"
    )
    args = parser.parse_args()
    # This must come before the first computation: XLA starts as many threads as there are cores that it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    try:
        (variance if args.model else speed)(args)
    except NonFinite as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
