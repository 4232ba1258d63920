"""Checks the settings of a preparation, publishes its output folder, and shows its progress."""

import os
import sys
import time
from pathlib import Path

from llada_jax.cli import outputs
from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, Manifest
from llada_jax.text.tokenizer import Tokenizer

SHARD_BYTES = 1 << 28  # size of a shard before compression
_MAX_SEQUENCE_LENGTH = 1 << 20


def check_settings(
    output: str | os.PathLike, sequence_length: int, fraction: float, workers: int, shard_rows: int
) -> Path:
    """Returns the path of the output folder after checking the settings of a preparation.

    Args:
      output: Folder to write, as the user gave it.
      sequence_length: Tokens per row.
      fraction: Share of the documents that is held out.
      workers: Number of processes; 0 means one per core.
      shard_rows: Rows per shard; 0 means as many as `SHARD_BYTES` allows.

    Raises:
      UserError: If a setting is impossible, or if something other than an empty folder exists at that path.
    """
    check_numbers(sequence_length, fraction, workers, shard_rows)
    if not os.fspath(output):
        raise UserError("output is missing: name the folder to write")
    if "://" in os.fspath(output):
        raise UserError(
            f"output {output} is not a local folder: prepare into a local folder and copy it there, or use --runner"
        )
    target = Path(os.path.abspath(output))
    refuse_existing(target)
    return target


def check_numbers(sequence_length: int, fraction: float, workers: int, shard_rows: int) -> None:
    """Raises UserError if one of these settings of a preparation is impossible; see `check_settings`."""
    if not 2 <= sequence_length <= _MAX_SEQUENCE_LENGTH:
        raise UserError(f"sequence_length={sequence_length}: it must be from 2 to {_MAX_SEQUENCE_LENGTH}")
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction={fraction}: it must be at least 0 and below 1")
    if workers < 0 or shard_rows < 0:
        raise UserError(f"workers={workers} and shard_rows={shard_rows} must not be negative")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def id_dtype(tokenizer: Tokenizer) -> str:
    """Returns the dtype in which records store token ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def refuse_existing(target: Path) -> None:
    """Raises UserError unless `target` does not exist yet or is an empty folder."""
    if (target / MANIFEST_FILE).exists():
        raise UserError(f"output {target} is already a prepared set: remove it or name another folder")
    outputs.refuse_existing(target)


def publish(folder: Path, target: Path, manifest: Manifest) -> None:
    """Writes the manifest and then gives the folder its name. Both are on the disk when this returns."""
    with (folder / MANIFEST_FILE).open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    (folder / outputs.LOCK_FILE).unlink()
    outputs.sync(folder)
    try:
        outputs.publish(folder, target)
    except UserError:
        refuse_existing(target)  # says more if it is another prepared set
        raise


class Progress:
    """Shows progress on stderr: a bar in a terminal, otherwise one line every half minute."""

    def __init__(self, total: int, enabled: bool, what: str = "preparing"):
        """Starts the clock.

        Args:
          total: Size of the input in bytes.
          enabled: Whether anything is shown.
          what: What is being done.
        """
        self._what = what
        self._total = total
        self._tokens = 0
        self._start = self._last = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = None
        if enabled and not self._lines:
            import tqdm

            self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=what, file=sys.stderr)

    def update(self, position: int, tokens: int) -> None:
        """Updates the display.

        Args:
          position: Number of bytes of the input that have been read so far.
          tokens: Number of tokens made since the last call.
        """
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(position - self._bar.n)
            if self._tokens:
                rate = self._tokens / max(now - self._start, 1e-9)
                self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        elif self._lines and now - self._last > 30:
            self._last = now
            done = 100 * position // max(self._total, 1)
            tokens = f", {self._tokens:,} tokens" if self._tokens else ""
            print(f"{self._what}: {done} % of the input{tokens}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
