"""Pre-training: python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

One run that reads from top to bottom. The order matters: what a user can get wrong is checked before a
device is touched, the data before the mesh, the mesh before the state, the state before the first
compilation. The same command started again goes on from the newest whole checkpoint.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from llada_jax import checkpoint, command_line, config_check, diffusion, likelihood, mesh, metrics, report, workdir
from llada_jax import config as configs
from llada_jax.attention import KERNELS
from llada_jax.config import Config, UserError
from llada_jax.data import pipeline
from llada_jax.data.manifest import TOKENIZER_FOLDER, load_manifest
from llada_jax.data.prepare import prepare
from llada_jax.model import REMAT, abstract_model, parameter_count, split
from llada_jax.optimizer import schedule_points
from llada_jax.tokenizer import load_tokenizer
from llada_jax.train_step import TrainState, make_state, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")


class NonFinite(Exception):
    """Too many steps in a row whose loss or gradients were not finite."""


def main() -> int:
    """Trains as the flags say; returns the exit code."""
    config = command_line.config_of(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: checkpoints, metrics and samples are written there")
    return train(config, _WORKDIR.value)


def train(config: Config, folder: str | os.PathLike) -> int:
    """Starts or resumes a training run.

    Args:
      config: the run; what it leaves to the tokenizer (special ids, vocabulary) is filled in.
      folder: its workdir, made if needed.

    Returns:
      0 finished, 1 stopped because of non-finite steps, 143 saved after SIGTERM.

    Raises:
      UserError: a mistake of the user's, found before any training.
    """
    config_check.validate(config)
    for name, value, known in (
        ("diffusion.objective", config.diffusion.objective, diffusion.OBJECTIVES),
        ("diffusion.t_sampling", config.diffusion.t_sampling, diffusion.T_SAMPLING),
        ("compute.remat", config.compute.remat, REMAT),
        ("compute.attention", config.compute.attention, KERNELS),
        ("compute.dtype", config.compute.dtype, ("", "float32", "bfloat16")),
    ):
        if value not in known:
            raise UserError(f"config.{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    schedule_points(config.optimizer, config.steps)
    folder = Path(folder)
    with workdir.locked(folder):
        try:
            return _train(config, folder)
        except NonFinite as error:
            log(f"stopped: {error}")
            return command_line.FAILURE


def log(message: str) -> None:
    """A line to stderr, from process 0 only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def _train(config: Config, folder: Path) -> int:
    # Data first: the longest wait and the likeliest mistake, and nothing of it needs a device.
    paths = _prepared_sets(config, folder)
    manifests = [load_manifest(path) for path in paths]
    tokenizer = load_tokenizer(os.path.join(paths[0], TOKENIZER_FOLDER))
    config_check.resolve_ids(config.model, tokenizer)
    config_check.validate(config)
    data = pipeline.TrainingData(
        paths,
        config.data.weights,
        seed=config.seed,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        random_length_every=config.diffusion.random_length_every,
        vocab_size=config.model.vocab_size,
    )
    held_out = None
    if config.validation.rows and any(manifest.validation.rows for manifest in manifests):
        held_out = pipeline.validation_rows(
            paths, config.validation.rows, config.sequence_length, config.model.vocab_size
        )
    identity = workdir.identity(config, manifests, tokenizer.sha256)
    resuming = (folder / "config.json").exists()
    if resuming:
        remedy = "take another --workdir, or set it back"
        changed = workdir.check_same_run(checkpoint.read_config(folder), (config, identity), str(folder), remedy)

    # The mesh, and what must divide by it.
    device_mesh = mesh.make_mesh(config.mesh)
    sizes = tuple(device_mesh.shape.values())
    mesh.check_model(config.model, sizes)
    mesh.check_batch(config, sizes)
    # From here on SIGTERM means: save and leave.
    stop = _StopSignal()
    log(
        f"{parameter_count(config.model):,} parameters, {tokenizer.size:,} tokens in the vocabulary, "
        f"mesh {dict(device_mesh.shape)} of {jax.devices()[0].device_kind}"
    )

    with jax.set_mesh(device_mesh), stop:
        # The state: of this run, of another one, or new.
        saved = checkpoint.Checkpoints(folder, config.checkpoint)
        restored = saved.restore(config, device_mesh, log)
        if restored:
            state, window_record = restored
            log(f"resuming {folder} at step {int(state.step)}")
            for name, (before, after) in changed.items() if resuming else ():
                log(f"  config.{name}: {before} -> {after}")
        else:
            state, window_record = _first_state(config, identity, device_mesh), None
        first_step = int(state.step)
        if first_step > config.steps:
            raise UserError(f"{folder} is at step {first_step}, beyond config.steps={config.steps}")
        if jax.process_index() == 0:
            workdir.keep_tokenizer(folder, Path(paths[0]) / TOKENIZER_FOLDER)
            checkpoint.write_config(folder, config, identity)
        workdir.record_start(folder, config, first_step)

        loop = _Loop(config, folder, device_mesh, saved, tokenizer, held_out, window_record, first_step)
        try:
            code = loop.run(state, data, stop)
        finally:
            loop.close()
    return code


def _prepared_sets(config: Config, folder: Path) -> list[str]:
    """Folders of the prepared sets; text given as config.data.input is prepared into the workdir first."""
    data = config.data
    if data.path:
        return [path.strip() for path in data.path.split(",") if path.strip()]
    target = folder / "data"
    if not target.exists():
        log(f"preparing {data.input} in {target}")
        prepare(
            [item.strip() for item in data.input.split(",") if item.strip()],
            target,
            tokenizer=data.tokenizer or None,
            train_tokenizer=None if data.tokenizer else data.train_tokenizer,
            sequence_length=config.sequence_length,
            validation_fraction=data.validation_fraction,
            workers=data.workers,
        )
    return [str(target)]


def _first_state(config: Config, identity: dict, device_mesh: jax.sharding.Mesh) -> TrainState:
    """A new state, or one taken from config.init_from."""
    if not config.init_from:
        return make_state(config)
    source = Path(config.init_from)
    if (source / "config.json").exists() and not (source / checkpoint.FOLDER).exists():
        from llada_jax.huggingface import load_params as load_published

        log(f"starting from the weights of {source}")
        return _with_params(make_state(config), load_published(source, config.model, device_mesh))
    parent, parent_identity = checkpoint.read_config(source)
    step = checkpoint.choose_step(source, config.init_step)
    if config.init_weights_only:
        if parent.model != config.model:
            name, (before, after) = next(iter(configs.differences(parent, config).items()))
            raise UserError(f"config.{name} is {after}, but {source} has {before}: its weights do not fit")
        log(f"starting from the weights of {source} at step {step}")
        params = checkpoint.load_params(source, step, config, device_mesh)
        return _with_params(make_state(config), params)
    remedy = "set --config.init_weights_only to take its weights alone"
    workdir.check_same_run((parent, parent_identity), (config, identity), str(source), remedy)
    log(f"branching from {source} at step {step}")
    return checkpoint.load_state(source, step, config, device_mesh)


def _with_params(state: TrainState, params: dict) -> TrainState:
    return TrainState(state.step, params, state.opt_state)


class _StopSignal:
    """Remembers SIGTERM, so that the loop can save and leave; a context manager that restores the handler."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "_StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)


class _Loop:
    """The steps, and what happens between them."""

    def __init__(self, config, folder, device_mesh, saved, tokenizer, held_out, window_record, first_step):
        self.config, self.folder, self.mesh = config, folder, device_mesh
        self.saved, self.tokenizer, self.held_out = saved, tokenizer, held_out
        self.graphdef, _ = split(abstract_model(config.model, config.compute))
        self.window = metrics.Window(config.logging.buckets, window_record)
        self.speed = metrics.Speed(config.model, config.sequence_length)
        self.writer = metrics.Writer(folder, config.logging, first_step, configs.to_dict(config))
        self.skipped_in_a_row = 0
        self.steps_since_log = self.tokens_since_log = 0
        self.bits_per_byte = float("nan")

    def run(self, state: TrainState, data: pipeline.TrainingData, stop: _StopSignal) -> int:
        """Trains to config.steps; returns the exit code."""
        config, first_step = self.config, int(state.step)
        train_step = make_train_step(config, self.graphdef)
        batches = data.iterate(
            first_step,
            mesh.local_rows(self.mesh, config.batch_size),
            prefetch=config.data.prefetch,
            threads=config.data.read_threads,
        )
        pending = None  # (step, metrics) dispatched but not yet looked at: the host stays one step behind the device
        done = first_step
        try:
            while done < config.steps:
                if stop.received or self.saved.reached_preemption(done):
                    self._settle(pending)
                    return self._leave(state)
                self._profile(done)
                _, batch = next(batches)
                batch = mesh.place_batch(batch, self.mesh, config.batch_size)
                if done == first_step:
                    log(report.first_batch(config, batch, self.tokenizer, done))
                    log("compiling the train step ...")
                state, device_metrics = train_step(state, batch)
                self._settle(pending)
                if done == first_step:
                    self._settle((done + 1, device_metrics))
                    pending = None
                    self.speed.restart()  # the first step is mostly compilation
                else:
                    pending = (done + 1, device_metrics)
                done += 1
                pending = self._events(done, state, pending)
        finally:
            batches.close()
        self._settle(pending)
        if first_step == config.steps:
            log(f"{self.folder} is finished: nothing to train up to step {config.steps}")
            self._validate(state)
        self.saved.save(state, self.window.sums)
        self._sample(done, state)
        self.saved.wait()
        if config.report and self.held_out is not None and jax.process_index() == 0:
            marks = report.yardsticks(self.held_out, self.tokenizer)
            held_out_bytes = int(self.held_out[2].sum())
            print(report.final_report(str(self.folder), self.bits_per_byte, marks, held_out_bytes))
        return command_line.FINISHED

    def _events(self, done: int, state: TrainState, pending):
        """Validation, samples and checkpoints that fall on this step; settles `pending` if there are any."""
        config, last = self.config, done == self.config.steps
        validates = self.held_out is not None and _falls_on(done, config.validation.every, last)
        samples = _falls_on(done, config.sampling.every, False)
        saves = self.saved.due(done)
        if not (validates or samples or saves):
            return pending
        extra = {}
        if validates:
            go_on = self.speed.pause()
            jax.block_until_ready(state.step)
            extra = self._validate(state)
            go_on()
        self._settle(pending, extra)
        go_on = self.speed.pause()
        if samples and not last:
            self._sample(done, state)
        if saves:
            self.saved.save(state, self.window.sums)
        go_on()
        return None

    def _settle(self, pending, extra: dict | None = None) -> None:
        """Looks at a step's metrics: sums, one line and one record per log step, the count of skipped steps."""
        if pending is None:
            return
        step, values = pending[0], metrics.fetch(pending[1])
        self.window.add(values)
        self.steps_since_log += 1
        self.tokens_since_log += int(values["tokens"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if values["skipped"] else 0
        record = dict(extra or {})
        if step % self.config.logging.every == 0 or step == self.config.steps:
            record |= self.window.summary()
            record |= {name: float(values[name]) for name in ("learning_rate", "grad_norm")}
            record |= self.speed.summary(self.steps_since_log, self.tokens_since_log, self.config.steps - step)
            self.window = metrics.Window(self.config.logging.buckets)
            self.steps_since_log = self.tokens_since_log = 0
            log(metrics.log_line(step, self.config.steps, record))
        if record:
            self.writer.write(step, record)
        if self.skipped_in_a_row >= self.config.optimizer.max_nonfinite:
            raise NonFinite(
                f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row, up to step {step}; "
                "none of them was applied. Branch from an earlier checkpoint (--config.init_from, "
                "--config.init_step) with a lower learning rate, or look at the data of these steps"
            )

    def _validate(self, state: TrainState) -> dict:
        if self.held_out is None:
            return {}
        config = self.config
        values = likelihood.validate(
            self.graphdef,
            state.params,
            self.held_out,
            config.validation,
            batch_size=config.batch_size // config.accumulation,
            chunk=config.compute.loss_chunk,
            mask_id=config.model.mask_id,
        )
        self.bits_per_byte = values["bits_per_byte"]
        log(
            f"step {int(state.step)}  validation {values['nats_per_token']:.4f} nats/token  "
            f"{values['bits_per_byte']:.4f} bits/byte  perplexity {values['perplexity']:.2f}"
        )
        return {f"validation/{name}": value for name, value in values.items()}

    def _sample(self, step: int, state: TrainState) -> None:
        if not self.config.sampling.prompts:
            return
        samples = report.sample_texts(
            self.graphdef, state.params, self.tokenizer, self.config.sampling, self.config.seed
        )
        text = report.show_samples(samples)
        log(f"samples at step {step}:\n{text}")
        if jax.process_index() == 0:
            with (self.folder / "samples.txt").open("a") as file:
                file.write(f"--- step {step}\n{text}\n")
            self.writer.text(step, "samples", text)

    def _leave(self, state: TrainState) -> int:
        self.saved.save(state, self.window.sums)
        self.saved.wait()
        log(f"stopped by SIGTERM: saved step {int(state.step)}; the same command goes on from there")
        return command_line.PREEMPTED

    def _profile(self, step: int) -> None:
        profile = self.config.profile
        if profile.steps and step == profile.first_step:
            jax.profiler.start_trace(str(self.folder / "profile"))
        elif profile.steps and step == profile.first_step + profile.steps:
            jax.profiler.stop_trace()
            log(f"profile of steps {profile.first_step}..{step - 1} in {self.folder / 'profile'}")

    def close(self) -> None:
        """Finishes what is being written."""
        self.saved.close()
        self.writer.close()


def _falls_on(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    command_line.run(main)
