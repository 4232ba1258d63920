"""Pre-training: python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

One run that reads from top to bottom. The order matters: what a user can get wrong is checked before a
device computes, the mesh before the data, the data before the state, the state before the first
compilation. The same command started again goes on from the newest whole checkpoint.
"""

import dataclasses
import errno
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from llada_jax import config as configs
from llada_jax.cli import entry_point
from llada_jax.config import Config, ModelConfig, UserError
from llada_jax.data.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from llada_jax.data.pairs import template_hash
from llada_jax.data.read import remote
from llada_jax.data.sets import open_held_out, open_training, prepared_sets
from llada_jax.devices import distributed, mesh
from llada_jax.devices.distributed import log
from llada_jax.diffusion.forward import is_chat
from llada_jax.formats.folders import is_workdir, keep_published
from llada_jax.model import lora
from llada_jax.model.transformer import parameter_count, resolve_compute, split
from llada_jax.text.tokenizer import find_tokenizer, load_tokenizer
from llada_jax.training import checkpoint, config_check, workdir
from llada_jax.training.loop import Loop, NonFinite
from llada_jax.training.step import TrainState, check_choices, make_state

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several processes meet and no cluster announces them."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_INIT = ("init_from", "init_step", "init_weights_only")
_WEIGHTS_REMEDY = "set --config.init_weights_only to take its weights alone"


def main() -> int:
    """Trains as the flags say; returns the exit code."""
    config = entry_point.config_of(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: checkpoints, metrics and samples are written there")
    config_check.check_distributed(config)
    others = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    return distributed.run(lambda: train(config, _WORKDIR.value), config.distributed, *others)


def train(config: Config, folder: str | os.PathLike) -> int:
    """Starts or resumes a training run.

    Args:
      config: the run; what it leaves to the tokenizer (special ids, vocabulary) is filled in.
      folder: its workdir, made if needed.

    Returns:
      0 finished; 1 stopped because of non-finite steps or a disk that cannot be written; 143 saved after SIGTERM.

    Raises:
      UserError: a mistake of the user's, found before any training, or a damaged row of the data.
    """
    config_check.validate(config)
    check_choices(config)
    if "://" in os.fspath(folder):
        raise UserError(f"--workdir={folder}: a local or mounted folder is needed")
    folder = Path(folder)
    distributed.check_same(
        "config", configs.to_dict(config), lambda first: _difference(config, configs.from_dict(first))
    )
    with workdir.locked(folder):
        try:
            return _train(config, folder)
        except (NonFinite, checkpoint.SaveFailed) as error:
            reason = str(error)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            reason = f"{error.filename or folder} cannot be written or read: {error.strerror}"
    if distributed.announce(entry_point.FAILURE):
        print(f"stopped: {reason}", file=sys.stderr, flush=True)
    return entry_point.FAILURE


def _difference(config: Config, first: Config) -> str:
    name, (theirs, ours) = next(iter(configs.differences(first, config).items()))
    return f"config.{name} is {ours}, in process 0 it is {theirs}: start all with the same command"


def _train(config: Config, folder: Path) -> int:
    # What is there already. Without a checkpoint nothing binds this run to an earlier one.
    stored = distributed.first_decides("stored run", lambda: _stored_run(folder))
    if stored:
        stored = configs.from_dict(stored[0]), stored[1]
    source = None if stored else distributed.first_decides("source", lambda: _find_source(config))
    if not config.model.layers:
        config.model = _architecture(config, stored and stored[0], source)
        config_check.validate(config)

    # What the devices can do, before the longest wait: text may have to be prepared.
    device_mesh = mesh.make_mesh(config.mesh)
    sizes = tuple(device_mesh.shape.values())
    mesh.check_model(config.model, sizes)
    mesh.check_batch(config, sizes)
    compute = resolve_compute(config.model, config.compute, device_mesh.devices.flat[0])
    if not stored:
        _check_source(config, source)

    # The data: nothing of it needs a device.
    paths = distributed.first_decides("prepared sets", lambda: prepared_sets(config, folder, stored and stored[0]))
    if any(map(remote.is_remote, paths)):
        paths = [remote.local_copy(path, config.data.cache, log) for path in paths]
        distributed.barrier("copied")  # some hosts are faster; nothing further on waits as long
    manifests = [load_manifest(path) for path in paths]
    tokenizer = load_tokenizer(os.path.join(paths[0], TOKENIZER_FOLDER))
    if tokenizer.sha256 != manifests[0].tokenizer_sha256:
        raise UserError(f"{paths[0]}/{TOKENIZER_FOLDER} is not the tokenizer that the set was prepared with")
    config_check.resolve_ids(config.model, tokenizer)
    config_check.validate(config)
    data = open_training(config, paths)
    held_out = open_held_out(config, paths)
    if is_chat(config):
        for path, (conversations, epochs) in data.epochs(config.steps * config.batch_size).items():
            log(f"{path}: {conversations:,} conversations, {epochs:.2f} epochs")
    if config.init_from and not stored:
        _same_template(manifests, config.init_from)
    if held_out is None and config.validation.rows:
        log("no validation: the prepared sets hold no rows out")
    identity = workdir.identity(config, manifests, tokenizer.sha256)
    distributed.check_same("data", identity, lambda _: f"{', '.join(paths)} is not what process 0 has under that name")
    changed = _check_resume(stored, (config, identity), folder) if stored else {}

    mesh.check_model(config.model, sizes)  # once more: now the vocabulary is known
    adapters = f" and {lora.adapter_count(config.model):,} of adapters" if config.model.lora.rank else ""
    log(
        f"{parameter_count(lora.plain(config.model)):,} parameters{adapters}, "
        f"{tokenizer.size:,} tokens in the vocabulary, "
        f"mesh {dict(device_mesh.shape)} of {device_mesh.devices.flat[0].device_kind}, "
        f"{compute.dtype}, attention {compute.attention}, remat {compute.remat}"
    )

    with jax.set_mesh(device_mesh):
        # The state: of this run, of another one, or new.
        saved = checkpoint.Checkpoints(folder, config.checkpoint)
        restored = saved.restore(config, device_mesh, log)
        if restored:
            state, record = restored
            frozen = checkpoint.load_base(folder, config, device_mesh, compute.dtype) if config.model.lora.rank else {}
            log(f"resuming {folder} at step {int(state.step)}")
            for name, (before, after) in changed.items():
                log(f"  config.{name}: {before} -> {after}")
        else:
            state, frozen = _first_state(config, identity, source, device_mesh, compute.dtype)
            record: dict = {}
        first_step = int(state.step)
        if first_step > config.steps:
            where = folder if restored else config.init_from
            raise UserError(f"{where} is at step {first_step}, beyond config.steps={config.steps}")
        if not restored:
            checkpoint.write_base(folder, frozen)
        if distributed.index() == 0:
            workdir.keep_tokenizer(folder, os.path.join(paths[0], TOKENIZER_FOLDER))
            if config.init_from and not restored:
                keep_published(folder, Path(config.init_from))  # what convert gives back
            workdir.write_config(folder, config, identity)
            workdir.record_start(folder, config, first_step)
        distributed.barrier("workdir is ready")  # no checkpoint without its config

        loop = Loop(config, folder, device_mesh, saved, tokenizer, held_out, state, frozen, record)
        whole = False
        try:
            code = loop.run(state, data)
            whole = True
        except NonFinite:
            whole = True  # all processes have seen the same losses
            raise
        finally:
            loop.close(whole)
    return code


def _stored_run(folder: Path) -> tuple[dict, dict] | None:
    """Config (as a dict) and identity of the run that has checkpoints in `folder`, None if there are none."""
    if not (steps := checkpoint.steps_in(folder)):
        return None
    if checkpoint.weights_record(folder, steps[-1]):
        raise UserError(
            f"{folder} holds weights alone, no run that could go on: take another --workdir, and start from them with "
            f"--config.init_from={folder}"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has checkpoints but no config.json that says of what: take another --workdir")
    config, identity = workdir.read_config(folder)
    return configs.to_dict(config), identity


def _check_resume(stored: tuple[Config, dict], now: tuple[Config, dict], folder: Path) -> dict[str, tuple]:
    """What has changed since the last start. UserError for what may not."""
    remedy = "take another --workdir, or set it back"
    changed = workdir.check_same_run(stored, now, str(folder), remedy)
    for name in _INIT:
        if name in changed:
            before, after = changed[name]
            raise UserError(f"config.{name} is {after!r}, but {folder} was started with {before!r}: {remedy}")
    return changed


def _find_source(config: Config) -> int | None:
    """The checkpoint's step in config.init_from; None for a published folder, or none at all. UserError if missing."""
    if not config.init_from:
        return None
    source = Path(config.init_from)
    if is_workdir(source, "config.init_from="):
        return checkpoint.choose_step(source, config.init_step)
    if config.init_step is not None:
        raise UserError(f"config.init_step={config.init_step}: {source} is a published folder, it has no steps")
    return None


def _architecture(config: Config, stored: Config | None, step: int | None) -> ModelConfig:
    """The model of the run in the workdir, or of config.init_from, with the adapters that this one is to have."""
    if stored:
        found = stored.model
    elif step is None:
        from llada_jax.formats import huggingface

        found = huggingface.inspect(config.init_from).config
    else:
        found = workdir.read_config(config.init_from)[0].model
    for field in dataclasses.fields(ModelConfig):
        value, theirs = getattr(config.model, field.name), getattr(found, field.name)
        if field.name not in ("layers", "lora") and value not in (getattr(ModelConfig(), field.name), theirs):
            raise UserError(
                f"config.model.{field.name} is {value}, but config.model.layers=0 takes the architecture of "
                f"{config.init_from}, which has {theirs}"
            )
    return dataclasses.replace(found, lora=config.model.lora)


def _check_source(config: Config, step: int | None) -> None:
    """UserError for what can be seen to be wrong with config.init_from before there is any data.

    What the model config leaves to the tokenizer of the data cannot: `_first_state` looks once more.
    """
    if not (source := config.init_from):
        return
    if step is None:
        from llada_jax.formats import huggingface

        found = huggingface.inspect(source).config
        _same_model(found, _filled(config.model, found), source)
        return
    parent, _ = workdir.read_config(source)
    early = dataclasses.replace(config, model=_filled(config.model, parent.model))
    if _weights_only(config, step, parent):
        _same_model(parent.model, early.model, source)
        return
    workdir.check_same_run((parent, {}), (early, {}), source, _WEIGHTS_REMEDY)


def _weights_only(config: Config, step: int, parent: Config) -> bool:
    """Whether this run takes the weights alone: it was told to, or there is nothing else that it could go on from.

    So of what convert wrote, and for adapters, of a run without any.
    """
    adapts_anew = config.model.lora.rank > 0 and parent.model.lora.rank == 0
    return config.init_weights_only or adapts_anew or checkpoint.weights_record(config.init_from, step) is not None


def _filled(wanted: ModelConfig, found: ModelConfig) -> ModelConfig:
    """`wanted`, with what it does not say taken from `found`."""
    unknown = [field.name for field in dataclasses.fields(ModelConfig) if getattr(wanted, field.name) is None]
    unknown += [] if wanted.vocab_size else ["vocab_size"]
    return dataclasses.replace(wanted, **{name: getattr(found, name) for name in unknown})


def _first_state(
    config: Config, identity: dict, step: int | None, device_mesh: jax.sharding.Mesh, compute_dtype: str
) -> tuple[TrainState, dict]:
    """A new state, or one taken from config.init_from (at `step`, None = a published folder), and the frozen weights.

    The latter, in the compute dtype, are all that low-rank adapters stand beside; without any they are {}.
    """
    if not config.init_from:
        return make_state(config), {}
    source, adapts = config.init_from, config.model.lora.rank > 0
    dtype = jnp.dtype(compute_dtype if adapts else jnp.float32)
    if step is None:
        from llada_jax.formats import huggingface

        if (tokenizer := find_tokenizer(source)) is not None:
            _same_tokenizer(tokenizer.sha256, identity, source)
        log(f"starting from the weights of {source}")
        wanted = lora.plain(config.model)
        weights = split(huggingface.load_model(source, dtype, lambda model: _same_model(model, wanted, source)))[1]
        return (make_state(config), weights) if adapts else (make_state(config, weights), {})
    parent, parent_identity = workdir.read_config(source)
    if _weights_only(config, step, parent):
        _same_model(parent.model, config.model, source)
        _same_tokenizer(parent_identity["tokenizer"], identity, source)
        log(f"starting from the weights of {source} at step {step}")
        weights = checkpoint.load_params(source, step, config, device_mesh, dtype)
        return (make_state(config), weights) if adapts else (make_state(config, weights), {})
    workdir.check_same_run((parent, parent_identity), (config, identity), source, _WEIGHTS_REMEDY)
    log(f"branching from {source} at step {step}")
    frozen = checkpoint.load_base(source, config, device_mesh, dtype) if adapts else {}
    return checkpoint.load_state(source, step, config, device_mesh), frozen


def _same_template(manifests: list[Manifest], source: str) -> None:
    """UserError if conversations were prepared with another chat template than that of the model to tune."""
    folder = Path(source)
    tokenizer = find_tokenizer(folder) or find_tokenizer(folder / "tokenizer")
    chat = manifests[0].chat
    if chat and tokenizer is not None and chat.template_sha256 != template_hash(tokenizer):
        raise UserError(
            f"the conversations were prepared with another chat template than that of {source}: "
            f"prepare them with --tokenizer={source}"
        )


def _same_tokenizer(theirs: str | None, identity: dict, source: str) -> None:
    """UserError unless the data was made with the tokenizer that the weights know; None = nobody knows which."""
    if theirs is not None and theirs != identity["tokenizer"]:
        raise UserError(f"the tokenizer differs from that of {source}: its weights know other tokens")


def _same_model(found: ModelConfig, wanted: ModelConfig, source: str) -> ModelConfig:
    """`wanted`. UserError unless weights of `found` fit it; what `found` does not know (None) fits.

    Adapters do not matter: weights are taken with those of `found` merged into them, and without any of `wanted`.
    """
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if theirs is not None and theirs != ours and field.name not in ("token_count", "lora"):
            raise UserError(f"config.model.{field.name} is {ours}, but {source} has {theirs}: its weights do not fit")
    return wanted


if __name__ == "__main__":
    entry_point.run(main)
