"""Compares lm_eval's figures by our model class with those by its own class for transformers, item by item.

    LLADA_EVAL_DATA=DIR python benchmarks/lm_eval_peer.py --model=FOLDER [--limit=100] [--peer=PYTHON]

FOLDER is an autoregressive model in a published form, DIR has the files that benchmarks/eval/local_data.py reads, and
PYTHON is a Python with lm_eval and torch, by default this one. Each class scores the first items of arc_easy_local and
lambada_local in a process of its own, in fp32. Prints one JSON line per task: the metrics of both, the number of items
whose acc or acc_norm differs, and by how much the log-likelihoods (nats) and greedy flags of all requests differ.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = ("arc_easy_local", "lambada_local")
ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {"hf": {"dtype": "float32", "device": "cpu", "batch_size": 8}, "llada_jax": {"dtype": "float32"}}


def score(kind: str, model: str, limit: int, output: str) -> None:
    """Evaluates with one class, and writes the metrics of each task and the responses to all its requests."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if kind == "hf":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    else:
        import llada_jax.evaluation.harness  # noqa: F401 - registers the class
    started = time.monotonic()
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args={"pretrained": model, **ARGUMENTS[kind]},
        tasks=[*TASKS],
        task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "eval")),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    record = {
        name: {
            "metrics": {k: v for k, v in found["results"][name].items() if isinstance(v, float) and "stderr" not in k},
            "arguments": [list(pair) for sample in found["samples"][name] for pair in sample["arguments"]],
            "responses": [
                [float(nats), bool(greedy)]
                for sample in found["samples"][name]
                for nats, greedy in sample["filtered_resps"]
            ],
            "items": [[sample.get("acc"), sample.get("acc_norm")] for sample in found["samples"][name]],
        }
        for name in TASKS
    }
    record["seconds"] = round(time.monotonic() - started, 1)
    Path(output).write_text(json.dumps(record))


def compare(name: str, ours: dict, theirs: dict) -> dict:
    """Returns what the two classes make of one task."""
    assert ours["arguments"] == theirs["arguments"], "the requests are not the same"
    pairs = list(zip(ours["responses"], theirs["responses"], strict=True))
    apart = [abs(one[0] - other[0]) for one, other in pairs]
    return {
        "task": name,
        "items": len(ours["items"]),
        "items_that_differ": sum(one != other for one, other in zip(ours["items"], theirs["items"], strict=True)),
        "requests": len(pairs),
        "ours": ours["metrics"],
        "transformers": theirs["metrics"],
        "largest_difference_nats": max(apart),
        "rms_difference_nats": math.sqrt(sum(x * x for x in apart) / len(apart)),
        "largest_nats": max(-other[0] for _, other in pairs),
        "greedy_flags_that_differ": sum(one[1] != other[1] for one, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--score", nargs=2, metavar=("CLASS", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        score(options.score[0], options.model, options.limit, options.score[1])
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, python in (("llada_jax", sys.executable), ("hf", options.peer)):
            output = os.path.join(folder, kind)
            command = [
                python,
                __file__,
                f"--model={options.model}",
                f"--limit={options.limit}",
                "--score",
                kind,
                output,
            ]
            subprocess.run(command, check=True, stdout=sys.stderr)
            found[kind] = json.loads(Path(output).read_text())
    for name in TASKS:
        print(json.dumps(compare(name, found["llada_jax"][name], found["hf"][name])))
    print(json.dumps({f"seconds_{kind}": found[kind]["seconds"] for kind in found}))


if __name__ == "__main__":
    main()
