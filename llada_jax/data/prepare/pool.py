"""Tokenises text in several processes and returns the results in order.

The workers are plain child processes that exchange pickles with the caller over pipes. Unlike
`multiprocessing`, this module never runs the caller's `__main__` again. It is therefore safe in a notebook, under
`python -c` and beside the threads of JAX, and a worker starts in a fraction of a second.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.prepare.text import cut
from llada_jax.text.tokenizer import Tokenizer, load_tokenizer

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_AHEAD = 2  # batches per worker that may be read but not yet consumed; the limit bounds the memory


class Tokens(NamedTuple):
    """The tokens of several texts, one after the other."""

    ids: np.ndarray  # uint32 [tokens]
    bytes: np.ndarray  # uint32 [tokens], bytes of text that each token stands for; the sum over each text is exact
    lengths: list[int]  # number of tokens of each text
    refused: dict[int, str]  # the texts that the tokenizer cannot encode, and why; they have no tokens


class Work(Protocol):
    """A named tuple that one process tokenises. The tuple and its result must be picklable."""

    tag: Any  # data of the caller; it stays in the caller's process

    def tokenize(self, tokenizer: Tokenizer | None, token_bytes: np.ndarray | None) -> Any:
        """Returns the result; a pool without a tokenizer passes None.

        A UserError that is raised here is raised again where the results are read.
        """


class Batch(NamedTuple):
    """Texts that are tokenised together."""

    texts: Sequence[str]
    continues: Sequence[bool]  # whether each text continues the text before it
    tag: Any = None

    def tokenize(self, tokenizer: Tokenizer, token_bytes: np.ndarray) -> Tokens:
        """Returns the tokens of the texts, see the function `tokenize` of this module."""
        return tokenize(tokenizer, token_bytes, self)


def tokenize(tokenizer: Tokenizer, token_bytes: np.ndarray, batch: Batch) -> Tokens:
    """Returns the ids of each text, and the number of bytes of text that each id stands for.

    A tokenizer may add a space to a text or normalise it. The byte counts of the tokens are therefore scaled, in
    integers, such that they add up to the number of bytes of the text itself.

    Args:
      tokenizer: The tokenizer. What it puts in front of a text (`Tokenizer.prefix`) stands for no bytes.
      token_bytes: int32 [ids], the bytes of text that each id of the tokenizer stands for.
      batch: The texts.
    """
    ids, counts, lengths, refused = [], [], [], {}
    for text, continues in zip(batch.texts, batch.continues, strict=True):
        try:
            # Tokenizers need more time and memory per character for long texts, so long texts are cut into pieces.
            pieces = [tokenizer.encode(piece, continuation=continues or i > 0) for i, piece in enumerate(cut(text))]
        except UserError as error:
            refused[len(lengths)] = str(error)
            lengths.append(0)
            continue
        text_ids = np.concatenate([np.asarray(piece, np.uint32) for piece in pieces])
        cumulative = np.cumsum(token_bytes[text_ids], dtype=np.int64)
        size = len(text.encode())
        if len(text_ids) and cumulative[-1] != size:
            total = max(int(cumulative[-1]), 1)
            cumulative = cumulative * size // total
            cumulative[-1] = size
        front = np.asarray(() if continues else tokenizer.prefix, np.uint32)
        ids.append(np.concatenate([front, text_ids]))
        counts.append(np.concatenate([np.zeros_like(front), np.diff(cumulative, prepend=0).astype(np.uint32)]))
        lengths.append(len(ids[-1]))
    empty = [np.zeros(0, np.uint32)]
    return Tokens(np.concatenate(ids or empty), np.concatenate(counts or empty), lengths, refused)


class Pool:
    """Runs the worker processes for one tokenizer, or for none, as a context manager."""

    def __init__(self, tokenizer_path: str | os.PathLike | None, workers: int):
        """Starts the workers.

        Args:
          tokenizer_path: The file or folder that each worker loads the tokenizer from. None means that the work needs
            no tokenizer.
          workers: The number of worker processes. With 1, the calling process itself does the work.
        """
        self._workers = workers
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        if workers == 1:
            self._tools = _tools(tokenizer_path)
            return
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_ROOT, environment.get("PYTHONPATH")]))
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        # -P keeps Python from importing a file of the current folder in place of a standard module of the same name.
        command = [sys.executable, "-P", "-m", "llada_jax.data.prepare.pool", os.fspath(tokenizer_path or "")]
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers)  # each thread waits for one process

    def map(self, batches: Iterable[Work]) -> Iterator[tuple[Work, Any]]:
        """Yields each batch with its result, in order.

        Raises:
          RuntimeError: If a worker fails or dies.
          UserError: If the tokenisation of a batch raised it.
        """
        if self._workers == 1:
            for batch in batches:
                yield batch, batch.tokenize(*self._tools)
            return
        running: deque[tuple[Work, Future[Any]]] = deque()
        for batch in batches:
            running.append((batch, self._threads.submit(self._call, batch)))
            if len(running) >= _AHEAD * self._workers:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()

    def _call(self, batch: Work) -> Any:
        process = self._idle.get()
        try:
            pickle.dump(batch._replace(tag=None), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
            code = process.poll()
            raise RuntimeError(
                f"a tokenisation process died with exit code {code} (-9 often means that memory ran out)"
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"a tokenisation process failed:\n{result}")
        return result

    def close(self) -> None:
        """Ends the processes at once; their unfinished work is lost."""
        for process in self._processes:
            process.kill()
        if self._processes:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
        self._processes = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tools(tokenizer_path: str | os.PathLike | None) -> tuple[Tokenizer | None, np.ndarray | None]:
    """Returns the tokenizer and the bytes of text that each of its ids stands for, or (None, None) without a path."""
    if not tokenizer_path:
        return None, None
    tokenizer = load_tokenizer(tokenizer_path)
    return tokenizer, tokenizer.token_bytes()


def _serve(tokenizer_path: str) -> None:
    """Runs a worker, which reads batches from stdin and writes their results to stdout until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group, but the parent handles it
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints goes to stderr, so that it does not end up among the results
    tools = _tools(tokenizer_path)
    while True:
        try:
            batch = pickle.load(source)
        except EOFError:
            return
        try:
            result: Any = batch.tokenize(*tools)
        except UserError as error:
            result = error
        except Exception:
            result = traceback.format_exc()
        try:
            pickle.dump(result, sink, pickle.HIGHEST_PROTOCOL)
            sink.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    # Pickles must name the classes of this module by its real name, not by __main__.
    from llada_jax.data.prepare.pool import _serve as serve

    serve(sys.argv[1])
