"""Measures the head with cross-entropy, forward and backward: python benchmarks/cross_entropy.py [--tokens=2048 ...]

Compares `ours` (llada_jax/diffusion/cross_entropy.py) with three common implementations, for LLaDA's vocabulary and
with half of the positions masked. `plain` holds all logits in memory; `scan` processes chunks of positions in a
checkpointed lax.scan; `optax` applies optax's cross-entropy for integer labels to all logits. Each implementation has a
process of its own, and the processes take turns. Prints one JSON line per implementation: the median time, its ratio to
the time of `ours`, the memory beyond the inputs that the compiler plans, the peak memory of the process or device, and
the relative differences of the loss and the gradients from those of `plain`.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np

FORMS = ("ours", "plain", "scan", "optax")


def make_loss(form: str, chunk: int, targets, weight) -> Callable:
    """Returns the function loss(h_BTD, head_DV) that computes the fp32 sum of weight * nll in the given form."""
    import jax
    import jax.numpy as jnp
    import optax

    from llada_jax.diffusion.cross_entropy import linear_cross_entropy

    def logits_of(h, head):
        return jnp.einsum("...d,dv->...v", h, head.astype(h.dtype), preferred_element_type=jnp.float32)

    def ours(h, head):
        return linear_cross_entropy(h, head, targets, weight, chunk)[0]

    def plain(h, head, targets=targets, weight=weight):
        logits = logits_of(h, head)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - target_logit))

    def scan(h, head):
        @jax.checkpoint
        def one(total, inputs):
            h, targets, weight = inputs
            return total + plain(h, head, targets, weight), None

        inputs = h.reshape(-1, chunk, h.shape[-1]), targets.reshape(-1, chunk), weight.reshape(-1, chunk)
        return jax.lax.scan(one, jnp.float32(0), inputs)[0]

    def with_optax(h, head):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(h, head), targets)
        return jnp.sum(weight * losses)

    return {"ours": ours, "plain": plain, "scan": scan, "optax": with_optax}[form]


def _worker(connection, form: str, args: argparse.Namespace) -> None:
    """Runs one form in a process of its own.

    Sends the memory of the compiled program in bytes and the kind of the device. Then, for each message received, runs
    the program once and sends (seconds, loss, samples of the gradients, peak memory in bytes).
    """
    import jax

    from llada_jax.devices import mesh

    rng = np.random.default_rng(0)
    shape = (args.rows, args.tokens // args.rows)
    h = rng.standard_normal((*shape, args.width), np.float32)
    head = rng.standard_normal((args.width, args.vocabulary), np.float32) * args.width**-0.5
    targets = rng.integers(0, args.vocabulary, shape).astype(np.int32)
    weight = (rng.random(shape) < args.masked).astype(np.float32) / args.tokens
    if form == "ours":
        jax.set_mesh(mesh.one_device_mesh())
        h, head = jax.device_put(h, mesh.HIDDEN_BTD), jax.device_put(head, mesh.PARAMETERS["head"])
        targets, weight = jax.device_put(targets, mesh.TOKENS_BT), jax.device_put(weight, mesh.TOKENS_BT)
    else:
        h, head, targets, weight = (jax.device_put(x) for x in (h, head, targets, weight))
    h = h.astype(args.dtype)
    run = jax.jit(jax.value_and_grad(make_loss(form, args.chunk, targets, weight), (0, 1))).lower(h, head).compile()
    memory = run.memory_analysis()
    connection.send((memory.temp_size_in_bytes + memory.output_size_in_bytes, jax.devices()[0].device_kind))
    while connection.recv():
        start = time.perf_counter()
        loss, (dh, dhead) = jax.block_until_ready(run(h, head))
        seconds = time.perf_counter() - start
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        samples = [np.asarray(x.reshape(-1)[:: max(1, x.size // 100_000)], np.float32) for x in (dh, dhead)]
        connection.send((seconds, float(loss), samples, peak))


def main() -> None:
    """Measures all forms in turns and prints one line per form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 2048, "rows": 4, "width": 512, "vocabulary": 126_464, "chunk": 1024, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--masked", type=float, default=0.5, help="share of the positions that have a loss")
    parser.add_argument("--dtype", default="float32", help="dtype of the hidden states and of the matrix products")
    parser.add_argument("--forms", default=",".join(FORMS), help="implementations to measure, separated by commas")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers, planned = {}, {}
    for form in args.forms.split(","):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there, form, args), daemon=True)
        process.start()
        there.close()  # Without an open end here, recv() fails if the worker dies.
        planned[form], device = here.recv()
        workers[form] = (process, here)
    answers: dict[str, list] = {form: [] for form in workers}
    for _ in range(args.rounds + 1):  # The first round is not counted.
        for form, (_, connection) in workers.items():
            connection.send(True)
            answers[form].append(connection.recv())
    for process, connection in workers.values():
        connection.send(False)
        process.join()

    import jax

    median = {form: statistics.median(answer[0] for answer in values[1:]) for form, values in answers.items()}
    reference = answers.get("plain", answers["ours"])[-1]
    for form, values in answers.items():
        _, loss, samples, peak = values[-1]
        errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(samples, reference[2], strict=True)]
        record = {
            "benchmark": "cross_entropy",
            "form": form,
            "milliseconds": round(median[form] * 1e3, 1),
            "times_ours": round(median[form] / median["ours"], 2),
            "planned_gib": round(planned[form] / 2**30, 3),
            "peak_gib": round(peak / 2**30, 2),
            "loss_difference": float(f"{abs(loss / reference[1] - 1):.2g}"),
            "gradient_differences": [float(f"{error:.2g}") for error in errors],
            "device": device,
            "jax": jax.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(record | vars(args)), flush=True)


if __name__ == "__main__":
    main()
