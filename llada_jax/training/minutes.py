"""Decides how many steps a run of config.minutes takes: it tries out a few steps, and what happens between steps.

The state and the files of the trial are thrown away, so that a run is bitwise the run of the same config.steps. The
decided number is kept with the run (config.steps in its config.json), and a resumed run takes it from there.

It is an estimate. Steps are timed on the first batch, although batches of conversations differ in width. The number of
steps is in the compiled program: if the trial's comes from the cache, the run's may still have to be compiled.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from llada_jax.config import CheckpointConfig, Config, UserError
from llada_jax.data.read.pipeline import Data
from llada_jax.data.rows import HeldOut
from llada_jax.devices import distributed, mesh
from llada_jax.devices.distributed import log
from llada_jax.devices.hardware import compiler_options
from llada_jax.diffusion.forward import is_chat
from llada_jax.model import lora
from llada_jax.scoring import bound
from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.text.tokenizer import Tokenizer
from llada_jax.training.checkpoint import Checkpoints
from llada_jax.training.samples import sample_texts
from llada_jax.training.step import TrainState, make_train_step

WARM_UP = 2  # steps before the timed ones; the first of them is mostly compilation
MOST_STEPS, ENOUGH_SECONDS = 40, 5.0  # how long steps are timed, whichever comes first
TRIAL = ".trial-"  # how the name of a folder begins that a trial writes into


def now() -> float:
    """Returns the seconds of the clock that config.minutes is compared with."""
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    compilation: float  # of the train step
    step: float
    validation: float = 0.0
    samples: float = 0.0
    save: float = 0.0

    def between_steps(self, config: Config, steps: int) -> float:
        """Returns the seconds that a run of so many steps spends on validation, samples and checkpoints."""
        return (
            self.validation * (_times(steps, config.validation.every) + bool(config.init_from))  # also before a step
            + self.samples * _times(steps, config.sampling.every)
            + self.save * _times(steps, config.checkpoint.every)
        )

    def of_run(self, config: Config, steps: int) -> float:
        """Returns the seconds of a run of so many steps, without what comes before its first step is compiled."""
        return self.compilation + steps * self.step + self.between_steps(config, steps)


def _times(steps: int, every: int) -> int:
    """Returns how often something happens that is due at the multiples of `every` (0: none) and at the last step."""
    return 1 + (steps - 1) // every if every else 1


def most_steps(config: Config, costs: Costs, seconds: float) -> int:
    """Returns the largest number of steps that a run can take in so many seconds; 0 if there is no time for one."""
    low, high = 0, max(0, int((seconds - costs.compilation) / max(costs.step, 1e-9)))
    while low < high:
        middle = (low + high + 1) // 2
        if costs.of_run(config, middle) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def check(config: Config, earlier: Config | None, branches: bool) -> None:
    """Checks that config.minutes can decide the steps of a run. The steps of a resumed run are filled in, in place.

    Args:
      config: The configuration of the run, with config.minutes > 0.
      earlier: The configuration with which a resumed run was started; None for any other run.
      branches: Whether the run continues from the state of another run.

    Raises:
      UserError: If the steps were decided in another way before, or if they are not counted from 0.
    """
    if branches:
        raise UserError(
            f"config.minutes={config.minutes:g} counts steps from 0, but this run continues from the state of "
            "config.init_from: set config.steps instead (with --config.minutes=0), or --config.init_weights_only"
        )
    if earlier is None:
        return
    if earlier.minutes != config.minutes:
        before = f"minutes={earlier.minutes:g}" if earlier.minutes else f"steps={earlier.steps}"
        raise UserError(
            f"config.minutes is {config.minutes:g}, but this run was last started with {before}, and has "
            f"{earlier.steps} steps: set it back, or give --config.steps=N instead of minutes to train longer"
        )
    config.steps = earlier.steps


def decide(config: Config, seconds: float, costs: Costs) -> int:
    """Returns the number of steps, the same for all processes, and logs it in one line.

    Args:
      config: The configuration of the run.
      seconds: The seconds that are left of config.minutes.
      costs: What the parts of the run take in this process. Those of process 0 decide.

    Raises:
      UserError: If there is no time for a single step.
    """
    steps = distributed.first_decides("steps", lambda: most_steps(config, costs, seconds))
    gone = 60 * config.minutes - seconds
    if steps < 1:
        raise UserError(
            f"config.minutes={config.minutes:g} is too short: {gone:.0f} s are gone, and compilation, a validation, "
            f"samples and a checkpoint take {costs.of_run(config, 1):.0f} s more; set more minutes, or config.steps"
        )
    log(
        f"config.minutes={config.minutes:g}: {steps} steps of {costs.step:.3g} s, after {gone:.0f} s before the first; "
        f"{costs.between_steps(config, steps):.0f} s are for validation, samples and checkpoints"
    )
    return steps


def measure(
    config: Config,
    graphdef: nnx.GraphDef,
    folder: Place,
    state: TrainState,
    frozen: dict,
    data: Data,
    held_out: HeldOut | None,
    tokenizer: Tokenizer,
) -> Costs:
    """Tries out the parts of a run, each once to compile it and again to time it.

    Args:
      config: The configuration of the run.
      graphdef: The static part of the model.
      folder: The workdir, in which a checkpoint is written and removed again.
      state: A state to begin with. Its buffers are donated.
      frozen: The parameters that the model has beside state.params and that are not trained.
      data: The rows to train on.
      held_out: The rows for validation, or None.
      tokenizer: The tokenizer of the data.
    """
    log("timing a few steps, because config.minutes decides their number ...")
    validation = samples = 0.0
    params = lora.combine(state.params, frozen)
    batch_size = config.batch_size // config.accumulation
    if held_out is not None:
        first = HeldOut(*(x[:batch_size] for x in held_out))
        once = dataclasses.replace(config.validation, samples=1)
        options = {"chunk": config.compute.loss_chunk, "mask_id": config.model.mask_id, "batch_size": batch_size}
        batches = -(-len(held_out.tokens_NT) // batch_size) * config.validation.samples
        validation = batches * _second(lambda: bound.validate(graphdef, params, first, once, **options))
    if config.sampling.prompts:
        chat = is_chat(config)
        samples = _second(lambda: sample_texts(graphdef, params, tokenizer, config.sampling, config.seed, chat))
    save = _time_save(folder, state)
    compilation, step = _time_steps(config, graphdef, state, frozen, data)
    return Costs(compilation, step, validation, samples, save)


def _second(run: Callable[[], object]) -> float:
    """Returns the seconds of the second call; the first one compiles."""
    run()
    begin = now()
    run()
    return now() - begin


def _time_save(folder: Place, state: TrainState) -> float:
    name = distributed.first_decides("trial", lambda: _new_folder(folder))
    try:
        saved = Checkpoints(folder / name, CheckpointConfig())
        begin = now()
        saved.save(state, {})
        saved.wait()
        seconds = now() - begin
        saved.close()
        distributed.barrier("trial is not in use")
    finally:
        if distributed.index() == 0:
            _remove(folder / name)
    return seconds


def _remove(folder: Place) -> None:
    if objects.is_bucket(folder):
        objects.delete_all(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(folder: Place) -> str:
    """Returns the name of a new folder for a trial, and removes those of trials that were killed."""
    if objects.is_bucket(folder):
        _remove(folder / f"{TRIAL}save")
        return f"{TRIAL}save"
    for killed in folder.glob(f"{TRIAL}*"):
        _remove(killed)
    return Path(tempfile.mkdtemp(prefix=TRIAL, dir=folder)).name


def _time_steps(
    config: Config, graphdef: nnx.GraphDef, state: TrainState, frozen: dict, data: Data
) -> tuple[float, float]:
    """Returns the seconds of the compilation, and of one step: the median of the steps after the first WARM_UP.

    Something else that the machine does for a second or two must not decide the length of the whole run.
    """
    device_mesh = jax.sharding.get_mesh()
    train_step = make_train_step(
        config, graphdef, compiler_options(device_mesh.devices.flat[0], config.compute.deterministic)
    )
    batch = mesh.place_batch(
        data.batch(0, mesh.local_rows(device_mesh, config.batch_size)), device_mesh, config.batch_size
    )

    def run(state: TrainState) -> tuple[TrainState, float]:
        begin = now()
        state, values = train_step(state, batch, frozen)
        jax.block_until_ready(values)
        return state, now() - begin

    state, compilation = run(state)
    for _ in range(WARM_UP - 1):
        state, _ = run(state)
    times: list[float] = []
    enough = False
    while len(times) < MOST_STEPS and not enough:
        state, seconds = run(state)
        times.append(seconds)
        # All processes must take the same number of steps, but each of them has a clock of its own.
        enough = distributed.first_decides("timed", lambda: sum(times) >= ENOUGH_SECONDS)
    return compilation, statistics.median(times)
