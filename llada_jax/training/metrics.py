"""Measures a training run and writes its metrics: losses, speed, FLOPs and MFU."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from llada_jax.config import LoggingConfig, ModelConfig, UserError
from llada_jax.devices import distributed
from llada_jax.training.flops import flops_per_token, peak_flops


class Window:
    """Sums the metrics of the steps since the last log line.

    Every checkpoint contains the sums, so that a resumed run logs the same values as a run without interruption.
    """

    def __init__(self, buckets: int, record: dict | None = None):
        empty = {"steps": 0, "loss": 0.0, "skipped": 0, "tokens": 0}
        self.sums = record or {**empty, "bucket_nll": [0.0] * buckets, "bucket_tokens": [0.0] * buckets}
        if len(self.sums["bucket_nll"]) != buckets:  # logging.buckets has changed since the checkpoint was saved.
            self.sums.update(bucket_nll=[0.0] * buckets, bucket_tokens=[0.0] * buckets)

    def add(self, metrics: dict) -> None:
        """Adds the fetched metrics of one step.

        A skipped step adds to "skipped" and "tokens", but not to the losses.
        """
        self.sums["skipped"] += int(metrics["skipped"])
        self.sums["tokens"] += int(metrics["tokens"])
        if metrics["skipped"]:
            return
        self.sums["steps"] += 1
        self.sums["loss"] += float(metrics["loss"])
        for name in ("bucket_nll", "bucket_tokens"):
            self.sums[name] = [a + float(b) for a, b in zip(self.sums[name], metrics[name], strict=True)]

    def summary(self) -> dict:
        """Returns "loss" (mean nats per token), "skipped", and the loss of each mask-ratio bucket that occurred.

        The key of bucket k is "loss_t/" followed by its interval [k, k + 1) / buckets. The value is the mean nll of a
        masked token in the rows whose mask ratio lies in this interval.
        """
        sums, buckets = self.sums, len(self.sums["bucket_nll"])
        result = {"loss": sums["loss"] / sums["steps"] if sums["steps"] else math.nan, "skipped": sums["skipped"]}
        for k, (nll, tokens) in enumerate(zip(sums["bucket_nll"], sums["bucket_tokens"], strict=True)):
            if tokens:
                result[f"loss_t/{k / buckets:.2f}-{(k + 1) / buckets:.2f}"] = nll / tokens
        return result


class Speed:
    """Computes tokens per second, MFU and the remaining time from the steps between two log lines."""

    def __init__(
        self,
        model: ModelConfig,
        sequence_length: int,
        clock: Callable[[], float] = time.perf_counter,
        masked_share: float = 0.5,
    ):
        self._model, self._length, self._masked_share = model, sequence_length, masked_share
        self._devices = jax.device_count()
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._clock, self._since = clock, clock()

    def restart(self) -> None:
        """Starts the measurement again from the current time."""
        self._since = self._clock()

    def pause(self) -> Callable[[], None]:
        """Stops the clock during validation, sampling and saving.

        Returns:
          A function that lets the clock continue.
        """
        started = self._clock()

        def go_on() -> None:
            self._since += self._clock() - started

        return go_on

    def summary(self, steps: int, tokens: int, steps_left: int, rows: int | None = None) -> dict:
        """Returns the rates since the last call, or since the clock was restarted.

        The MFU counts the head as if the share `masked_share` of all tokens were masked, including prompts. For the 8B
        model and a share of 0.5, this overstates the FLOPs by up to 4 %.

        Args:
          steps: Number of steps since the last call.
          tokens: Number of tokens in these steps.
          steps_left: Number of steps until the end of the run.
          rows: Number of rows that the tokens lie in, if the lengths of the rows vary. None means that all rows have
            the full sequence length.

        Returns:
          step_seconds, tokens_per_second, tokens_per_second_per_device, seconds_left, and, if the peak of the device is
          known, mfu and mfu_full_head (which counts the head at every position).
        """
        now = self._clock()
        elapsed, self._since = max(now - self._since, 1e-9), now
        rate = tokens / elapsed
        result = {
            "step_seconds": elapsed / max(steps, 1),
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._devices,
            "seconds_left": steps_left * elapsed / max(steps, 1),
        }
        if self._peak:
            # Padding does no useful work, so count only the FLOPs of real tokens.
            length = tokens / rows if rows else self._length
            for name, share in (("mfu", self._masked_share), ("mfu_full_head", 1.0)):
                result[name] = rate * flops_per_token(self._model, length, share) / self._devices / self._peak
        return result


class Writer:
    """Writes the metrics of one workdir to metrics.jsonl, TensorBoard and Weights & Biases; only process 0 writes."""

    def __init__(self, workdir: Path, config: LoggingConfig, first_step: int, run_config: dict):
        self._on = distributed.index() == 0
        self._board = self._wandb = None
        if not self._on:
            return
        path = workdir / "metrics.jsonl"
        drop_after(path, first_step or -1)  # A run that starts at step 0 writes its record of step 0 again.
        self._file = path.open("a")
        if config.tensorboard:
            self._board = _Board(workdir / "tensorboard", first_step)
        if config.wandb_project:
            self._wandb = _start_wandb(config.wandb_project, workdir, run_config)

    def write(self, step: int, values: dict) -> None:
        """Writes one record, {"step": step, **values}. Floats that are not finite become null."""
        if not self._on:
            return
        record = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        scalars = {name: v for name, v in record.items() if isinstance(v, int | float)}
        if self._board:
            self._board.scalars(step, scalars)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, such as a sample of the model, to the text page of TensorBoard."""
        if self._board:
            self._board.text(step, name, f"```\n{text}\n```")

    def sync(self) -> None:
        """Waits until the records are on the disk.

        Call this before saving a checkpoint: even after a power failure, metrics.jsonl must reach as far as the
        checkpoint does.
        """
        if self._on:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes all files and finishes the Weights & Biases run."""
        if self._on:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class _Board:
    """Writes a TensorBoard event file immediately, in the calling thread.

    The SummaryWriter of tensorboardX passes events to a thread of its own instead. A killed process would lose up to
    two minutes of events, and on a full disk that thread would die and the training would wait for it forever.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns() % 10**9:09}")
        # Make TensorBoard hide events that earlier starts of the run wrote beyond the step it resumes at.
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        listed = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=listed))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX import summary

        self._write(step=step, summary=summary.text(name, text))

    def _write(self, **fields) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), **fields))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_wandb(project: str) -> None:
    """Raises UserError if Weights & Biases would not take the metrics of a run.

    Without this, a missing key would be found only after the data is prepared, which can take hours.
    """
    with _wandb(project) as wandb:
        wandb.Settings(project=project)
        if os.environ.get("WANDB_MODE", "online") == "online":
            wandb.login()


@contextlib.contextmanager
def _wandb(project: str) -> Iterator[ModuleType]:
    """Yields the module wandb. Whatever it raises in the block becomes a UserError of one line."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "config.logging.wandb_project needs the package wandb: pip install 'llada_jax[wandb]'"
        ) from None
    try:
        yield wandb
    except Exception as error:  # wandb has its own exceptions for a missing key, no network, and a bad name
        raise UserError(
            f"config.logging.wandb_project={project}: {' '.join(str(error).split())[:300]}; "
            "with WANDB_MODE=offline the metrics stay in the workdir"
        ) from error


def _start_wandb(project: str, workdir: Path, run_config: dict):
    # Keep the id of the W&B run in the workdir, so that a resumed run continues the same W&B run.
    id_file = workdir / "wandb_id"
    known = id_file.read_text().strip() if id_file.exists() else ""
    with _wandb(project) as wandb:
        run = wandb.init(project=project, id=known or None, resume="allow", dir=str(workdir), config=run_config)
    id_file.write_text(run.id)
    return run


def drop_after(path: Path, step: int) -> None:
    """Removes the records after `step`, where the run resumes, and broken lines from a metrics.jsonl."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def log_line(step: int, steps: int, values: dict) -> str:
    """Returns the line that is printed for a person at each log step."""
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values['grad_norm']:.2f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join([*parts, f"left {duration(values['seconds_left'])}"])


def duration(seconds: float) -> str:
    """Formats a duration as 1:02:03 or 2d 03:04:05."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {text:0>8}" if days else text


def fetch(metrics: dict) -> dict:
    """Copies the metrics of a step to the host, after waiting until the device has computed them."""
    return {name: np.asarray(value)[()] for name, value in jax.device_get(metrics).items()}
