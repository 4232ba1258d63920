"""What is measured while training and where it is written; FLOP counting and MFU."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llada_jax.config import ComputeConfig, LoggingConfig, ModelConfig, UserError
from llada_jax.devices import distributed
from llada_jax.devices.hardware import chip_of
from llada_jax.model.transformer import MATRICES


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s, None if it is not known (a CPU, say)."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def flops_per_token(model: ModelConfig, sequence_length: float, head_share: float = 0.5) -> float:
    """FLOPs of a training step per token: 6 per matmul parameter and 12 L T D for attention, all of it real.

    With low-rank adapters 4 per matmul parameter, whose gradient is not formed, and 6 per parameter of theirs.

    Args:
      model: the architecture, with vocab_size known.
      sequence_length: T.
      head_share: part of the positions the head is applied to: half are masked on average; 1.0 = all.
    """
    attention = 2 * model.width * (model.heads + model.kv_heads) * model.head_width
    layer = attention + 3 * model.width * model.feed_forward
    head = head_share * model.width * model.vocab_size
    weights, adapters = model.layers * layer + head, model.layers * sum(_adapter_parameters(model).values())
    passes = 4 if adapters else 6
    return passes * weights + 6 * adapters + 12 * model.layers * sequence_length * model.width


def _adapter_parameters(model: ModelConfig) -> dict[str, int]:
    """Name in mesh.PARAMETERS -> number of parameters, of the adapters of one layer; {} if there are none."""
    heads, kv_heads = model.heads * model.head_width, model.kv_heads * model.head_width
    sizes, found = {"d": model.width, "hk": heads, "gk": kv_heads, "f": model.feed_forward}, {}
    for name in model.lora.targets if model.lora.rank else ():
        for part, letters in zip("ab", MATRICES[name], strict=True):
            found[f"{name}_{part}"] = model.lora.rank * sizes[letters]
    return found


def recomputed_flops_per_token(model: ModelConfig, sequence_length: int, compute: ComputeConfig) -> float:
    """FLOPs per token that a training step executes beyond `flops_per_token`, by compute.remat and the kernel.

    Counted: attention and the layers' matmuls, but not ff_out (nor its adapter's B): no gradient depends on its output.
    Not counted: the adapters' products that "dots" computes again.
    """
    attention = 4 * sequence_length * model.width
    # Every kernel but the plain one holds no scores for the backward pass: it makes them again, one matmul of two.
    again = 0 if compute.attention == "reference" else attention / 2
    projections = 2 * model.width * (model.heads + model.kv_heads) * model.head_width
    adapters = sum(size for name, size in _adapter_parameters(model).items() if name != "ff_out_b")
    matmuls = 2 * (projections + 2 * model.width * model.feed_forward + adapters)
    again += {"none": 0, "dots": 0, "attention": matmuls, "full": matmuls + attention}[compute.remat]
    return model.layers * again


class Window:
    """Sums over the steps since the last log line; part of a checkpoint, so that a resumed run logs the same."""

    def __init__(self, buckets: int, record: dict | None = None):
        empty = {"steps": 0, "loss": 0.0, "skipped": 0, "tokens": 0}
        self.sums = record or {**empty, "bucket_nll": [0.0] * buckets, "bucket_tokens": [0.0] * buckets}
        if len(self.sums["bucket_nll"]) != buckets:  # logging.buckets was changed on resume
            self.sums.update(bucket_nll=[0.0] * buckets, bucket_tokens=[0.0] * buckets)

    def add(self, metrics: dict) -> None:
        """Adds one step's fetched metrics; a skipped step counts only as skipped."""
        self.sums["skipped"] += int(metrics["skipped"])
        self.sums["tokens"] += int(metrics["tokens"])
        if metrics["skipped"]:
            return
        self.sums["steps"] += 1
        self.sums["loss"] += float(metrics["loss"])
        for name in ("bucket_nll", "bucket_tokens"):
            self.sums[name] = [a + float(b) for a, b in zip(self.sums[name], metrics[name], strict=True)]

    def summary(self) -> dict:
        """loss (mean nats per token), skipped, and loss_t of the mask-ratio buckets that were met.

        loss_t[k] is the mean nll of a masked token in rows whose mask ratio lies in [k, k + 1) / buckets.
        """
        sums, buckets = self.sums, len(self.sums["bucket_nll"])
        result = {"loss": sums["loss"] / sums["steps"] if sums["steps"] else math.nan, "skipped": sums["skipped"]}
        for k, (nll, tokens) in enumerate(zip(sums["bucket_nll"], sums["bucket_tokens"], strict=True)):
            if tokens:
                result[f"loss_t/{k / buckets:.2f}-{(k + 1) / buckets:.2f}"] = nll / tokens
        return result


class Speed:
    """Tokens per second, MFU and time left, from the tokens of the steps between two log lines."""

    def __init__(self, model: ModelConfig, sequence_length: int, clock: Callable[[], float] = time.perf_counter):
        self._model, self._length = model, sequence_length
        self._devices = jax.device_count()
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._clock, self._since = clock, clock()

    def restart(self) -> None:
        """Starts the clock anew."""
        self._since = self._clock()

    def pause(self) -> Callable[[], None]:
        """Stops the clock (validation, sampling, saving); call the result to let it go on."""
        started = self._clock()

        def go_on() -> None:
            self._since += self._clock() - started

        return go_on

    def summary(self, steps: int, tokens: int, steps_left: int, rows: int | None = None) -> dict:
        """Rates since the last call: step_seconds, tokens_per_second, seconds_left, mfu where the peak is known.

        rows: how many the tokens lie in, where their lengths vary; None = all are of the sequence length. The head is
        counted as if half of all tokens were masked, prompts too: at 8B that makes up to 4 % more of it.
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
            # FLOPs of padding are not counted as useful.
            length = tokens / rows if rows else self._length
            for name, share in (("mfu", 0.5), ("mfu_full_head", 1.0)):
                result[name] = rate * flops_per_token(self._model, length, share) / self._devices / self._peak
        return result


class Writer:
    """metrics.jsonl, TensorBoard and Weights & Biases of one workdir; only process 0 writes."""

    def __init__(self, workdir: Path, config: LoggingConfig, first_step: int, run_config: dict):
        self._on = distributed.index() == 0
        self._board = self._wandb = None
        if not self._on:
            return
        path = workdir / "metrics.jsonl"
        drop_after(path, first_step or -1)  # what was written before the first step is written again
        self._file = path.open("a")
        if config.tensorboard:
            self._board = _Board(workdir / "tensorboard", first_step)
        if config.wandb_project:
            self._wandb = _start_wandb(config.wandb_project, workdir, run_config)

    def write(self, step: int, values: dict) -> None:
        """One record: {"step": step, **values}; floats that are not finite become null."""
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
        """A sample, to TensorBoard's text page."""
        if self._board:
            self._board.text(step, name, f"```\n{text}\n```")

    def sync(self) -> None:
        """Until the records are on the disk: a checkpoint must not run ahead of them, even if power fails."""
        if self._on:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes all files."""
        if self._on:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class _Board:
    """TensorBoard's event file, written at once and in this thread.

    tensorboardX's own SummaryWriter hands events to a thread: a killed process loses up to two minutes of them,
    and where the disk is full the thread dies and the training waits for it for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns() % 10**9:09}")
        # What earlier starts wrote beyond the step resumed at is no longer shown.
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


def _start_wandb(project: str, workdir: Path, run_config: dict):
    try:
        import wandb
    except ImportError:
        raise UserError("config.logging.wandb_project needs wandb: pip install 'llada_jax[wandb]'") from None
    # A resumed run goes on in the same W&B run: its id lives in the workdir.
    id_file = workdir / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.exists() else wandb.util.generate_id()
    id_file.write_text(run_id)
    return wandb.init(project=project, id=run_id, resume="allow", dir=str(workdir), config=run_config)


def drop_after(path: Path, step: int) -> None:
    """Removes from a metrics.jsonl what lies beyond `step` (the run is resumed there) and any torn last line."""
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
    """The one line per log step that a person reads."""
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
    """1:02:03, or 2d 03:04:05."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {text:0>8}" if days else text


def fetch(metrics: dict) -> dict:
    """The step's metrics on the host; waits until the device has made them."""
    return {name: np.asarray(value)[()] for name, value in jax.device_get(metrics).items()}
