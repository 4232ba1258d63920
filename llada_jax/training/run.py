"""Runs one training, from the user's configuration to the exit code.

The order matters. What a user can get wrong is checked before a device computes. The mesh comes before the data,
because preparing text can take hours. The data comes before the state, because it decides the vocabulary. The state
comes before the first compilation.
"""

import os
import sys

import jax

from llada_jax import config as configs
from llada_jax.cli import entry_point, machine_errors, paths
from llada_jax.config import ComputeConfig, Config, NonFinite, UserError
from llada_jax.data import sets as prepared
from llada_jax.devices import distributed, mesh
from llada_jax.devices.distributed import log
from llada_jax.diffusion.forward import is_chat
from llada_jax.formats import weights, workdir
from llada_jax.formats.arrays import SaveFailed
from llada_jax.formats.companions import keep_companions
from llada_jax.model import lora
from llada_jax.model.compute import resolve_compute
from llada_jax.model.transformer import abstract_model, parameter_count, split
from llada_jax.storage import objects
from llada_jax.storage.lease import LeaseLost
from llada_jax.text.agreement import resolve_ids
from llada_jax.training import config_check, extension, goodput, metrics, minutes, ownership, samples, start
from llada_jax.training.checkpoint import Checkpoints
from llada_jax.training.home import Home
from llada_jax.training.loop import Loop


def train(config: Config, folder: str | os.PathLike, began: float | None = None) -> int:
    """Starts or resumes a training run.

    Args:
      config: The configuration of the run. The settings that it leaves to the tokenizer (special ids, vocabulary) and
        to config.init_from (the architecture) are filled in, in place.
      folder: The workdir of the run, which is created if needed.
      began: The time at which the process began, in seconds since 1970. None means now.

    Returns:
      The exit code: 0 if the run is finished, 1 if it stopped because of values that are not finite or of files that
      the machine cannot read or write, 143 if it was saved after SIGTERM.

    Raises:
      UserError: If the user made a mistake, which is found before any training, or if a row of the data is damaged.
    """
    paths.expand_settings(config)
    config_check.validate(config)
    objects.check(folder, "--workdir=")
    path = objects.place(paths.expanded(folder))
    started, watch = minutes.now(), goodput.Stopwatch(began)
    distributed.check_same(
        "config", configs.to_dict(config), lambda first: _difference(config, configs.from_dict(first))
    )
    try:
        with ownership.locked(path) as home:
            return _run(config, home, started, watch)
    except (NonFinite, SaveFailed, LeaseLost) as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in machine_errors.MACHINE:
            raise
        reason = f"{error.filename or path} cannot be written or read: {machine_errors.reason(error)}"
    if distributed.announce(entry_point.FAILURE):
        print(f"stopped: {reason}", file=sys.stderr, flush=True)
    return entry_point.FAILURE


def _difference(config: Config, first: Config) -> str:
    name, (theirs, ours) = next(iter(configs.differences(first, config).items()))
    return f"config.{name} is {ours}, but in process 0 it is {theirs}: start all processes with the same command"


def _run(config: Config, home: Home, started: float, watch: goodput.Stopwatch) -> int:
    path, folder = home.path, home.folder

    # Decide where the run begins.
    begin = start.decide(config, path)
    config.model = begin.architecture(config.model)
    config_check.check_objective(config, begin.source)
    if config.minutes:
        minutes.check(config, begin.earlier, begin.kind is start.Kind.BRANCHED)
    begin.check(config)

    if config.logging.wandb_project and distributed.index() == 0:
        metrics.check_wandb(config.logging.wandb_project)

    # Check that the devices suit the model and the batch.
    device_mesh = mesh.make_mesh(config.mesh)
    compute = _check_devices(config, device_mesh)

    # Open the data, which decides the vocabulary and the special ids.
    sets = prepared.find_sets(config, path, begin.earlier, begin.told, folder)
    resolve_ids(config.model, sets.tokenizer, is_chat(config), "" if begin.resumes else begin.source)
    mesh.check_model(config.model, tuple(device_mesh.shape.values()))
    samples.check_prompts(sets.tokenizer, config, is_chat(config))
    data, held_out = _open_data(config, sets)
    identity = sets.identity(config)
    distributed.check_same(
        "data",
        identity,
        lambda _: f"{', '.join(sets.paths)} is not the same data as in process 0: give all hosts the same sets",
    )
    changed = begin.check(config, sets)
    log(_summary(config, sets, device_mesh, compute))

    with jax.set_mesh(device_mesh):
        # Make the state that the first step is computed from.
        saved = Checkpoints(path, config.checkpoint)
        loading = minutes.now()
        state, frozen, record = begin.first_state(config, device_mesh, compute.dtype, saved)
        if config.minutes and not begin.resumes:
            loading = minutes.now() - loading
            graphdef, _ = split(abstract_model(config.model, compute))
            costs = minutes.measure(config, graphdef, path, state, frozen, data, held_out, sets.tokenizer)
            gone = minutes.now() - started + loading  # the trial has used the state up: it is made once more
            config.steps = minutes.decide(config, 60 * config.minutes - gone, costs)
            state = frozen = None  # or there would be two of them
            state, frozen, record = begin.first_state(config, device_mesh, compute.dtype, saved)
        if is_chat(config):
            for name, (conversations, epochs) in data.epochs(config.steps * config.batch_size).items():
                log(f"{name}: {conversations:,} conversations, {epochs:.2f} epochs")
        first_step = int(state.step)
        if first_step > config.steps:
            raise UserError(
                f"{begin.source} is at step {first_step}, beyond config.steps={config.steps}: set more steps"
            )
        for name, (before, after) in changed.items():
            if begin.resumes or extension.told(name):
                log(f"  config.{name}: {before} -> {after}")
        for line in extension.effects(begin.config, config, first_step) if changed else ():
            log(f"  {line}")

        # Fill the workdir first, so that no checkpoint is ever without the files that explain it.
        if not begin.resumes:
            weights.save_frozen(path, frozen)
        if distributed.index() == 0:
            ownership.keep_tokenizer(folder, sets.tokenizer_folder)
            if begin.source and not begin.resumes:
                keep_companions(folder, workdir.local_files(begin.source, log))
            workdir.write_config(folder, config, identity)
            lines = [goodput.read_lines(folder / name) for name in ("starts.jsonl", "metrics.jsonl")]
            watch.earlier = goodput.account(*lines, first_step, watch.began)
            ownership.record_start(folder, config, first_step, watch.start())
            home.upload()
        distributed.barrier("workdir is ready")

        # Train.
        loop = Loop(config, home, device_mesh, compute, saved, sets.tokenizer, held_out, state, frozen, record, watch)
        return loop.run(state, data)


def _check_devices(config: Config, device_mesh: jax.sharding.Mesh) -> ComputeConfig:
    """Returns the resolved compute config. Raises UserError if the model or the batch does not fit the mesh."""
    sizes = tuple(device_mesh.shape.values())
    mesh.check_model(config.model, sizes)
    mesh.check_batch(config, sizes)
    return resolve_compute(config.model, config.compute, device_mesh.devices.flat[0])


def _open_data(config: Config, sets: prepared.PreparedSets) -> tuple[prepared.Data, prepared.HeldOut | None]:
    """Opens the rows for training and for validation, and logs if there are none for validation."""
    data = prepared.open_training(config, sets.paths)
    held_out = prepared.open_held_out(config, sets.paths)
    if held_out is None and config.validation.rows:
        log("no validation: the prepared sets hold no rows out")
    return data, held_out


def _summary(
    config: Config, sets: prepared.PreparedSets, device_mesh: jax.sharding.Mesh, compute: ComputeConfig
) -> str:
    """Returns the line that describes the model and the devices."""
    adapters = f" and {lora.adapter_count(config.model):,} of adapters" if config.model.lora.rank else ""
    return (
        f"{parameter_count(lora.plain(config.model)):,} parameters{adapters}, "
        f"{sets.tokenizer.size:,} tokens in the vocabulary, "
        f"mesh {dict(device_mesh.shape)} of {device_mesh.devices.flat[0].device_kind}, "
        f"{compute.dtype}, attention {compute.attention}, remat {compute.remat}"
    )
