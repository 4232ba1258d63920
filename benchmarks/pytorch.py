"""Compares llada_jax with PyTorch on a CPU: python benchmarks/pytorch.py [--cases=step_cpu,...] [--threads=2]

Needs torch (pip install torch). llada_jax and plain PyTorch run the same model with the same weights, tokens and masks.
The PyTorch code is written below for this comparison: pre-norm blocks, RMSNorm, RoPE, SwiGLU, bidirectional
scaled_dot_product_attention, AdamW, and the head on masked positions only (and, as a second reference, on all
positions). Each case first checks that all implementations compute the same loss. The implementations then run in turns
in two processes, one of which sleeps while the other works, because two pools of threads in one process would disturb
each other. Each turn begins with a run that is not timed: while a process sleeps, the other one takes its caches, and a
virtual machine may give its freed memory back to the host, which no program that runs alone has to wait for. Both have
huge pages, as `llada_jax.train` has. Prints one JSON line per case: median times, and `ratio`, the time of llada_jax
divided by the time of PyTorch, which is below 1 if llada_jax is faster. `isa` is the widest instruction set that the
processor shows them; tests/support/no_avx512.c hides AVX-512 from both on one that has it.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy._core._multiarray_umath import __cpu_features__

from llada_jax.cli import huge_pages

MASK_SHARE = 0.5  # share of the positions that is masked, in every row
SAMPLES = 32  # number of Monte Carlo samples of each likelihood


@dataclasses.dataclass(frozen=True)
class Case:
    """What a case runs: a train step, the forward pass of one reverse step of the sampler, or likelihoods."""

    kind: str  # step | forward | likelihood
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocabulary: int
    batch: int  # number of rows; for likelihoods, number of requests with SAMPLES samples each
    length: int  # tokens per row; for likelihoods, the largest number of tokens per request
    loss_chunk: int = 1024
    dtype: str = "float32"


_SMALL = {"layers": 3, "width": 128, "heads": 4, "feed_forward": 320, "vocabulary": 8192}
_LARGE = {"layers": 8, "width": 512, "heads": 8, "feed_forward": 1536, "vocabulary": 32000}
CASES = {
    "step_quickstart": Case("step", **_SMALL, batch=16, length=128, loss_chunk=128),
    "step_cpu": Case("step", **_LARGE, batch=8, length=512),
    "forward_1": Case("forward", **_LARGE, batch=1, length=512),
    "forward_8": Case("forward", **_LARGE, batch=8, length=512),
    "likelihood": Case("likelihood", **_LARGE, batch=8, length=160),
}
CASES |= {f"{name}_bf16": dataclasses.replace(case, dtype="bfloat16") for name, case in CASES.items()}


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """Returns the batch of a case, by name.

    "tokens" and "noisy" (tokens with MASK at the masked positions) are int32. "weight" is fp32, the weight of each
    position in the loss: 1 / p_mask, divided by the number of positions, if it is masked, else 0.
    """
    rng = np.random.default_rng(0)
    shape = (case.batch, case.length)
    masked = np.argsort(rng.random(shape), axis=1) < case.length * MASK_SHARE
    tokens = rng.integers(0, case.vocabulary - 1, shape).astype(np.int32)
    noisy = np.where(masked, case.vocabulary - 1, tokens).astype(np.int32)
    p_mask = rng.uniform(0.2, 1.0, (case.batch, 1))
    weight = (masked / p_mask / case.length / case.batch).astype(np.float32)
    return {"tokens": tokens, "noisy": noisy, "weight": weight}


def make_requests(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns pairs of prompt and answer, of random tokens and with lengths like HellaSwag's."""
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(40, 121), rng.integers(10, 41)) for _ in range(case.batch)]
    return [tuple(rng.integers(0, case.vocabulary - 1, n).astype(np.int32) for n in pair) for pair in lengths]


def make_weights(case: Case) -> dict[str, np.ndarray]:
    """Returns random weights by their names in mesh.PARAMETERS, with stacked layers and the shapes of llada_jax."""
    rng = np.random.default_rng(1)
    d, h, k, f, n = case.width, case.heads, case.width // case.heads, case.feed_forward, case.layers
    shapes = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (n, d, h, k)),
        "attn_out": (n, h, k, d),
        **dict.fromkeys(("ff_proj", "up_proj"), (n, d, f)),
        "ff_out": (n, f, d),
        "embedding": (case.vocabulary, d),
        "head": (d, case.vocabulary),
    }
    weights = {name: (rng.standard_normal(s, np.float32) * d**-0.5) for name, s in shapes.items()}
    ones = {"attn_norm": (n, d), "ff_norm": (n, d), "final_norm": (d,)}
    return weights | {name: np.ones(s, np.float32) for name, s in ones.items()}


def with_jax(case: Case) -> tuple[dict[str, Callable[[], float]], dict]:
    """Prepares a case with llada_jax.

    Returns:
      The functions that run the case once, by name (here only "ours"), and the versions of the packages. The functions
      return a value to compare: the loss, the mean absolute hidden state, or the sum of the likelihoods.
    """
    import jax
    import jax.numpy as jnp

    from llada_jax.config import ComputeConfig, Config, ModelConfig
    from llada_jax.devices import mesh
    from llada_jax.diffusion.cross_entropy import linear_cross_entropy
    from llada_jax.model.transformer import abstract_model, merge, split
    from llada_jax.training.optimizer import make_optimizer

    model = ModelConfig(
        layers=case.layers, width=case.width, heads=case.heads, kv_heads=case.heads, feed_forward=case.feed_forward,
        vocab_size=case.vocabulary, mask_id=case.vocabulary - 1,
    )  # fmt: skip
    # Unrolling the layers makes the train step faster, but not the forward pass alone.
    unroll = 0 if case.kind == "step" else 1
    compute = ComputeConfig(dtype=case.dtype, remat="none", unroll=unroll, loss_chunk=case.loss_chunk)
    config, batch, weights = Config(), make_batch(case), make_weights(case)
    jax.set_mesh(mesh.one_device_mesh())
    graphdef, _ = split(abstract_model(model, compute))
    outside = ("embedding", "final_norm", "head")
    params = {name: weights[name] for name in outside}
    params["blocks"] = {name: value for name, value in weights.items() if name not in outside}
    params = jax.tree.map_with_path(
        lambda path, x: jax.device_put(x, jax.P(*(None,) * (len(path) - 1), *mesh.PARAMETERS[path[-1].key])), params
    )
    noisy, tokens, weight = (jax.device_put(batch[name], mesh.TOKENS_BT) for name in ("noisy", "tokens", "weight"))
    length = jax.device_put(np.full(case.batch, case.length, np.int32), mesh.ROWS_B)
    versions = {"jax": jax.__version__}

    if case.kind == "forward":

        @jax.jit
        def forward(params, noisy):
            return merge(graphdef, params).trunk(noisy)

        # The sampler also casts the parameters only once.
        params = jax.tree.map(lambda p: p.astype(case.dtype), params)
        return {"ours": lambda: float(jnp.mean(jnp.abs(forward(params, noisy).astype(jnp.float32))))}, versions

    if case.kind == "likelihood":
        from llada_jax.scoring.likelihood import log_likelihoods

        model, requests, key = merge(graphdef, params), make_requests(case), jax.random.key(0)
        return {"ours": lambda: sum(s.value for s in log_likelihoods(model, requests, samples=SAMPLES, key=key))}, (
            versions
        )

    optimizer = make_optimizer(config.optimizer)
    state = [params, optimizer.init(params)]

    def loss_of(params):
        model = merge(graphdef, params)
        return linear_cross_entropy(model.trunk(noisy, length), model.head_weight(), tokens, weight, case.loss_chunk)[0]

    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - 1e-4 * u, params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))

    def run() -> float:
        state[0], state[1], loss = step(*state)
        jax.block_until_ready(state)
        return float(loss)

    return {"ours": run}, versions


def with_torch(case: Case) -> tuple[dict[str, Callable[[], float]], dict]:
    """Prepares a case with PyTorch and returns the same as `with_jax`.

    The names are "torch" and, for train steps only, "torch, head everywhere", which applies the head to all positions.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    d, heads, dtype = case.width, case.heads, getattr(torch, case.dtype)

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

        def forward(self, x):
            return F.rms_norm(x, (d,), self.weight.to(x.dtype), 1e-5)

    def rope(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ff_norm = RMSNorm(), RMSNorm()
            for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
                setattr(self, name, nn.Linear(d, d, bias=False))
            self.ff_proj = nn.Linear(d, case.feed_forward, bias=False)
            self.up_proj = nn.Linear(d, case.feed_forward, bias=False)
            self.ff_out = nn.Linear(case.feed_forward, d, bias=False)

        def forward(self, x, cos, sin):
            h = self.attn_norm(x)
            q, k, v = (
                proj(h).view(*h.shape[:2], heads, -1).transpose(1, 2)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
            o = F.scaled_dot_product_attention(rope(q, cos, sin), rope(k, cos, sin), v)
            x = x + self.attn_out(o.transpose(1, 2).flatten(2))
            h = self.ff_norm(x)
            return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(case.vocabulary, d)
            self.blocks = nn.ModuleList(Block() for _ in range(case.layers))
            self.final_norm = RMSNorm()
            self.head = nn.Linear(d, case.vocabulary, bias=False)
            half = d // heads // 2
            angle = torch.arange(case.length)[:, None] * 500_000.0 ** (-torch.arange(half) / half)
            self.register_buffer("cos", angle.cos().to(dtype))
            self.register_buffer("sin", angle.sin().to(dtype))

        def trunk(self, tokens):
            x = self.embedding(tokens).to(dtype)
            for block in self.blocks:
                x = block(x, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
            return self.final_norm(x)

    weights, model = make_weights(case), Model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            value = weights[next(part for part in reversed(parts) if part in weights)]
            value = value[int(parts[1])] if parts[0] == "blocks" else value
            if parts[-1] == "weight" and parts[0] != "embedding" and parameter.ndim == 2:
                inputs = parameter.shape[1]
                value = value.reshape(inputs, -1).T  # nn.Linear stores the transposed matrix.
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    batch = {name: torch.from_numpy(value) for name, value in make_batch(case).items()}
    noisy, tokens, weight = batch["noisy"].long(), batch["tokens"].long(), batch["weight"]
    versions = {"torch": torch.__version__}

    if case.kind == "forward":
        model = model.to(dtype)

        def forward() -> float:
            with torch.inference_mode():
                return float(model.trunk(noisy).float().abs().mean())

        return {"torch": forward}, versions

    if case.kind == "likelihood":

        def one_by_one() -> float:
            """Scores each request alone, all samples at once, with logits at every position, as the published code."""
            generator, total = torch.Generator().manual_seed(0), 0.0
            for prompt, answer in make_requests(case):
                tokens = torch.from_numpy(np.concatenate([prompt, answer])).long().expand(SAMPLES, -1)
                count = torch.linspace(1, len(answer), SAMPLES).round().long()
                order = torch.rand(SAMPLES, len(answer), generator=generator).argsort(1).argsort(1)
                mask = F.pad(order < count[:, None], (len(prompt), 0))
                with torch.inference_mode():
                    logits = model.head(model.trunk(tokens.masked_fill(mask, case.vocabulary - 1)))
                    nll = F.cross_entropy(logits[mask], tokens[mask], reduction="none")
                weight = (len(answer) / count)[:, None].expand_as(mask)[mask]
                total -= float((nll * weight).sum()) / SAMPLES
            return total

        return {"torch": one_by_one}, versions

    start = {name: value.clone() for name, value in model.state_dict().items()}
    masked = weight > 0

    def stepper(everywhere: bool) -> Callable[[], float]:
        twin = Model()
        twin.load_state_dict(start)
        norms = [p for p in twin.parameters() if p.ndim == 1]
        groups = [{"params": [p for p in twin.parameters() if p.ndim > 1]}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def run() -> float:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                h = twin.trunk(noisy)
                h, targets, w = (h, tokens, weight) if everywhere else (h[masked], tokens[masked], weight[masked])
                logits = twin.head(h).float()
            nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
            loss = (nll * w.flatten()).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
            return loss.item()

        return run

    return {"torch": stepper(False), "torch, head everywhere": stepper(True)}, versions


def _worker(connection, make: Callable, case: Case, threads: int) -> None:
    """Prepares a case in a process of its own, and answers each name of a function with (value, seconds) of one run."""
    if make is with_torch:
        import torch

        torch.set_num_threads(threads)
    runs, versions = make(case)
    connection.send((list(runs), versions))
    while (name := connection.recv()) is not None:
        start = time.perf_counter()
        value = runs[name]()
        connection.send((value, time.perf_counter() - start))


def compare(name: str, case: Case, threads: int, rounds: int) -> dict:
    """Measures one case and returns its record."""
    # This limits PyTorch's pool of threads. XLA's pool has one thread per core that the process may use.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    context = multiprocessing.get_context("spawn")
    workers, owners, versions = [], {}, {}
    for make in (with_jax, with_torch):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there, make, case, threads), daemon=True)
        process.start()
        there.close()  # Without an open end here, recv() fails if the worker dies.
        names, found = here.recv()
        owners |= dict.fromkeys(names, here)
        workers.append((process, here))
        versions |= found

    def ask(which: str) -> tuple[float, float]:
        owners[which].send(which)
        return owners[which].recv()

    first = {which: ask(which)[0] for which in owners}  # compiles, and gives the initial loss
    difference = max(abs(value / first["ours"] - 1) for value in first.values())
    # Likelihoods are estimates from different random masks, so they agree only roughly.
    tolerance = 1e-5 if case.dtype == "float32" and case.kind != "likelihood" else 2e-2
    if not difference < tolerance:
        raise SystemExit(f"{name}: the implementations do not compute the same value: {first}")
    seconds: dict[str, list[float]] = {which: [] for which in owners}
    for _ in range(rounds):
        for which in owners:
            ask(which)
            seconds[which].append(ask(which)[1])
    for process, connection in workers:
        connection.send(None)
        process.join()
    median = {which: statistics.median(values) for which, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["torch"], strict=True)]
    record = {
        "benchmark": "pytorch",
        "case": name,
        "ratio": round(median["ours"] / median["torch"], 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "milliseconds": {which: round(value * 1e3, 2) for which, value in median.items()},
        "value": first["ours"],
        "relative_difference": float(f"{difference:.2g}"),
        "threads": threads,
        "isa": next((isa for isa in ("AVX512F", "AVX2") if __cpu_features__.get(isa)), "other"),
        "rounds": rounds,
        **versions,
        "python": platform.python_version(),
    }
    if "torch, head everywhere" in median:
        record["ratio_head_everywhere"] = round(median["ours"] / median["torch, head everywhere"], 3)
    return record


def main() -> None:
    """Measures the cases and prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names of the cases, separated by commas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each of them")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each implementation")
    args = parser.parse_args()
    huge_pages.restart()
    for name in args.cases.split(","):
        print(json.dumps(compare(name, CASES[name], args.threads, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
