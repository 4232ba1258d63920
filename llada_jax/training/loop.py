"""Runs the training loop: the steps of a run, and the validation, samples and checkpoints between them.

The host stays one step behind the device: the metrics of step s are read after step s + 1 was dispatched, so that
neither waits for the other. The metrics of a step are read before anything else that is due at this step (validation,
samples, a checkpoint). A checkpoint therefore is never ahead of metrics.jsonl, and never holds a state whose metrics
were not read.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax

from llada_jax import config as configs
from llada_jax.cli import entry_point
from llada_jax.config import ComputeConfig, Config, NonFinite
from llada_jax.data.read.pipeline import Data
from llada_jax.data.rows import HeldOut
from llada_jax.devices import distributed, mesh
from llada_jax.devices.distributed import log
from llada_jax.devices.hardware import compiler_options
from llada_jax.devices.preemption import StopSignal
from llada_jax.diffusion.forward import is_chat, masked_share
from llada_jax.model import lora
from llada_jax.model.transformer import abstract_model, split
from llada_jax.scoring import bound
from llada_jax.storage.lease import LeaseLost
from llada_jax.storage.retries import StorageFailed
from llada_jax.text.tokenizer import Tokenizer
from llada_jax.training import goodput, metrics, samples, spikes, summary
from llada_jax.training.checkpoint import Checkpoints
from llada_jax.training.home import Home
from llada_jax.training.hosts import Hosts
from llada_jax.training.step import TrainState, make_train_step


class Loop:
    """Trains in this process, from the first step after the start to the last step of the run."""

    def __init__(
        self,
        config: Config,
        home: Home,
        device_mesh: jax.sharding.Mesh,
        compute: ComputeConfig,
        saved: Checkpoints,
        tokenizer: Tokenizer,
        held_out: HeldOut | None,
        state: TrainState,
        frozen: dict,
        record: dict,
        watch: goodput.Stopwatch,
    ):
        """Opens the output files, and removes from them what earlier starts wrote beyond the step of `state`.

        Args:
          config: The configuration of the run.
          home: The workdir of the run.
          device_mesh: The mesh of the run, which must be in use.
          compute: The resolved config.compute (`compute.resolve_compute`).
          saved: The checkpoints of the workdir.
          tokenizer: The tokenizer of the data.
          held_out: The rows for validation. None means that there is no validation.
          state: The state at the first step. The caller then passes it to `run`.
          frozen: The parameters that the model has beside state.params and that are not trained (`lora.partition`), or
            {} if there are none.
          record: The record of the loop that `_save` put into the checkpoint, or {} at the start of a run.
          watch: Counts where the time of this start goes.
        """
        self.config, self.home, self.mesh = config, home, device_mesh
        self.folder = folder = home.folder
        self.saved, self.tokenizer, self.held_out = saved, tokenizer, held_out
        self.graphdef, _ = split(abstract_model(config.model, compute))
        self.frozen, self.watch, self.device = frozen, watch, goodput.Device()
        self.first_step = self.done = int(state.step)
        self.pending: tuple[int, dict] | None = None  # (step, metrics) that are dispatched and not read yet
        self.window = metrics.Window(config.logging.buckets, record.get("window"))
        self.spikes, self.hosts = spikes.Spikes(record.get("spikes")), Hosts()
        self.skipped_in_a_row = record.get("skipped_in_a_row", 0)
        self.speed = metrics.Speed(config.model, config.sequence_length, masked_share=masked_share(config.diffusion))
        self.steps_since_log = self.tokens_since_log = 0
        self.widths: set[int] = set()  # widths of batches for which the train step is compiled
        self.untimed: set[int] = set()  # steps whose time was mostly compilation
        self.extra: dict = {}  # values that wait for the next record of a log line
        self.bits_per_byte = float("nan")
        self.tracing = False
        self.stop = StopSignal()
        self.writer = metrics.Writer(folder, config.logging, self.first_step, configs.to_dict(config))
        if distributed.index() == 0:
            finished = self.first_step == config.steps  # the last samples of a finished run are written again
            samples.drop_samples(folder / "samples.txt", self.first_step - finished)
        profile = config.profile
        if profile.steps and profile.first_step < self.first_step:
            log(f"no profile: config.profile.first_step={profile.first_step} lies before step {self.first_step}")
        elif profile.steps and profile.first_step >= config.steps:
            log(f"no profile: config.profile.first_step={profile.first_step} is not below config.steps={config.steps}")

    def run(self, state: TrainState, data: Data) -> int:
        """Trains up to config.steps, and finishes everything that is being written.

        Args:
          state: The state that was given to `__init__`. Its buffers are donated.
          data: The rows to train on.

        Returns:
          FINISHED, or PREEMPTED if the run was saved after SIGTERM.

        Raises:
          NonFinite: After optimizer.max_nonfinite steps in a row whose loss or gradients were not finite, or if the
            model's output is not finite in a validation or a sample.
          SaveFailed: If a checkpoint could not be written.
          UserError: If a row of the data is damaged.
        """
        self.data = data
        together = False  # whether all processes end in the same way
        try:
            code = self._train(state, data)
            together = True
        except NonFinite:
            together = True  # all processes have seen the same losses
            raise
        finally:
            self._close(together)
        return code

    def _train(self, state: TrainState, data: Data) -> int:
        config = self.config
        train_step = make_train_step(
            config, self.graphdef, compiler_options(self.mesh.devices.flat[0], config.compute.deterministic)
        )
        batches = data.iterate(
            self.first_step,
            mesh.local_rows(self.mesh, config.batch_size),
            prefetch=config.data.prefetch,
            threads=config.data.read_threads,
        )
        self.watch.switch("train")
        try:
            if self.first_step == 0 and config.init_from and self.held_out is not None:
                self.writer.write(0, self._validate(state))  # how good the weights are before this run trains them
            while self.done < config.steps:
                self.home.check()
                if self.stop.received(self.done):
                    return self._leave(state)
                self._profile(state)
                state = self._step(train_step, state, batches)
                self._between_steps(state)
        finally:
            batches.close()
        return self._finish(state)

    def _step(self, train_step, state: TrainState, batches) -> TrainState:
        first = self.done == self.first_step
        asked = time.perf_counter()
        rows = next(batches)[1]
        waited = self.device.idle(asked)
        self.watch.move(waited, "data")
        width = rows["tokens"].shape[1]
        compiles = width not in self.widths  # batches of conversations have a few different widths
        self.widths.add(width)
        before = self.watch.switch("compile" if compiles else "train")
        if compiles and not first:
            log(f"compiling the train step for rows of {width} tokens ...")
            go_on = self.speed.pause()
        # Once the step is compiled, only explicit transfers between host and device are allowed.
        with jax.transfer_guard("allow" if compiles else "disallow"):
            batch = mesh.place_batch(rows, self.mesh, self.config.batch_size)
            if first:
                log(summary.first_batch(self.config, batch, self.tokenizer, self.done))
                log("compiling the train step ...")
            if not compiles:
                self.hosts.add(waited, self.device.idle(asked))
            state, values = train_step(state, batch, self.frozen)
            self.device.follow(values["loss"])
            self._look()
        self.done += 1
        self.pending = (self.done, values)
        if first:
            jax.block_until_ready(values)
            self.stop.listen()
            if not self._logs(self.done):
                self.speed.restart()  # this step was mostly compilation
        elif compiles:
            jax.block_until_ready(values)
            self.untimed.add(self.done)
            go_on()
        self.watch.switch(before)
        return state

    def _logs(self, step: int) -> bool:
        return step % self.config.logging.every == 0 or step == self.config.steps

    def _look(self, extra: dict | None = None) -> None:
        """Reads the metrics of the pending step: adds them up, writes a line if one is due, counts skipped steps."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        values = metrics.fetch(values)
        self.window.add(values)
        first = step == self.first_step + 1  # this step is timed only if a log line is due at it
        if step not in self.untimed and (not first or self._logs(step)):
            self.steps_since_log += 1
            self.tokens_since_log += int(values["tokens"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if values["skipped"] else 0
        record = dict(extra or {}) | self._spike(step, values)
        if self._logs(step):
            record |= self.window.summary()
            record |= {name: float(values[name]) for name in ("learning_rate", "grad_norm")}
            rows = self.steps_since_log * self.config.batch_size if is_chat(self.config) else None
            record |= self.speed.summary(self.steps_since_log, self.tokens_since_log, self.config.steps - step, rows)
            self.window = metrics.Window(self.config.logging.buckets)
            self.steps_since_log = self.tokens_since_log = 0
            late, line = self.hosts.look(record["step_seconds"])
            record |= self.extra | late | self.watch.record()
            if line:
                log(line)
            self.extra = {}
            log(metrics.log_line(step, self.config.steps, record))
            self.saved.check()
        if record:
            self.writer.write(step, record)
        if self.skipped_in_a_row >= self.config.optimizer.max_nonfinite:
            raise NonFinite(
                f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row, up to step {step}; "
                "none of them was applied. Branch from an earlier checkpoint (--config.init_from, "
                "--config.init_step) with a lower learning rate, or check the data of these steps"
            )

    def _spike(self, step: int, values: dict) -> dict:
        """Tells of a spike of the loss or the gradient norm at this step; returns what its record says of it."""
        found = self.spikes.look(step, values)
        if found is None or distributed.index() != 0:
            return {}
        rows = self.data.origins(step - 1)  # steps of the data are counted from 0
        before = max((saved for saved in self.saved.steps() if saved < step), default=None)
        log(spikes.advice(found["spike/text"], rows, self.config, self.home.path, before, step, sys.argv))
        return found | {"spike/rows": rows}

    def _between_steps(self, state: TrainState) -> None:
        """Does what is due at this step: validation, samples, a checkpoint."""
        config, last = self.config, self.done == self.config.steps
        validates = self.held_out is not None and (last or _falls_on(self.done, config.validation.every))
        samples_due = _falls_on(self.done, config.sampling.every) and not last
        saves = self.saved.due(self.done)
        if not (validates or samples_due or saves or last):
            return
        jax.block_until_ready(state.step)  # the time of the step itself still counts
        go_on = self.speed.pause()
        extra = self._validate(state) if validates else {}
        go_on()
        self._look(extra)
        go_on = self.speed.pause()
        if samples_due:
            self._sample(state)
        if saves:
            self._save(state)
        go_on()

    def _save(self, state: TrainState) -> None:
        begin = time.perf_counter()
        with self.watch.of("checkpoint"):
            self.writer.sync()
            self.home.upload()
            record = {"window": self.window.sums, "skipped_in_a_row": self.skipped_in_a_row}
            self.saved.save(state, record | {"spikes": self.spikes.sums})
        self.extra["checkpoint_stall_seconds"] = time.perf_counter() - begin

    def _leave(self, state: TrainState) -> int:
        self._look()
        self._save(state)
        self.saved.wait()
        log(f"stopped by SIGTERM: saved step {self.done}; the same command goes on from there")
        return entry_point.PREEMPTED

    def _finish(self, state: TrainState) -> int:
        if self.first_step == self.config.steps:
            log(f"{self.home.path} is finished: nothing to train up to step {self.config.steps}")
            if self.held_out is not None:
                self._validate(state)
        self._save(state)
        self._sample(state)
        self.saved.wait()
        if self.config.report and self.held_out is not None and distributed.index() == 0:
            marks = summary.yardsticks(self.held_out, self.tokenizer)
            held_out_bytes = int(self.held_out.bytes_N.sum())
            causal = self.config.model.causal
            print(summary.final_report(str(self.home.path), self.bits_per_byte, marks, held_out_bytes, causal))
        return entry_point.FINISHED

    def _validate(self, state: TrainState) -> dict:
        config = self.config
        with self._named("validation"), self.watch.of("evaluate"):
            values = bound.validate(
                self.graphdef,
                lora.combine(state.params, self.frozen),
                self.held_out,
                config.validation,
                batch_size=config.batch_size // config.accumulation,
                chunk=config.compute.loss_chunk,
                mask_id=config.model.mask_id,
            )
        self.bits_per_byte = values["bits_per_byte"]
        log(
            f"step {self.done}  validation {values['nats_per_token']:.4f} nats/token  "
            f"{values['bits_per_byte']:.4f} bits/byte  perplexity {values['perplexity']:.2f}"
        )
        return {f"validation/{name}": value for name, value in values.items()}

    def _sample(self, state: TrainState) -> None:
        if not self.config.sampling.prompts:
            return
        chat = is_chat(self.config)
        params = lora.combine(state.params, self.frozen)
        with self._named("samples"), self.watch.of("evaluate"):
            found = samples.sample_texts(
                self.graphdef, params, self.tokenizer, self.config.sampling, self.config.seed, chat
            )
        text = samples.show_samples(found, chat)
        log(f"samples at step {self.done}:\n{text}")
        if distributed.index() == 0:
            samples.append_samples(self.folder / "samples.txt", self.done, text)
            self.writer.text(self.done, "samples", text)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Adds to the message of `NonFinite` where in the run it was raised."""
        try:
            yield
        except NonFinite as error:
            raise NonFinite(f"{what} at step {self.done}: {error}") from error

    def _profile(self, state: TrainState) -> None:
        profile = self.config.profile
        if distributed.index() != 0:
            return  # all processes do the same work, so that one trace is enough
        if profile.steps and self.done == profile.first_step:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True
        elif self.tracing and self.done >= profile.first_step + profile.steps:
            jax.block_until_ready(state.step)
            self._end_profile()

    def _end_profile(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            log(f"profile from step {self.config.profile.first_step} to {self.done} in {self.home.path / 'profile'}")

    def _close(self, together: bool) -> None:
        """Finishes what is being written. Raises SaveFailed if a checkpoint could not be written.

        Args:
          together: Whether all processes close the run. If False, perhaps only this process does, so it does not wait
            for work that needs all processes.
        """
        try:
            self.device.close()
            self._end_profile()
            if together or distributed.count() == 1:
                self.saved.close()
        finally:
            self.writer.close()
            self.stop.close()
            with contextlib.nullcontext() if together else contextlib.suppress(LeaseLost, StorageFailed):
                self.home.upload()


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
