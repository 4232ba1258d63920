"""Finds mistakes in a configuration before any device is used, and names each in a message of one line."""

import dataclasses
import importlib.util
import math
import types
import typing

from llada_jax.config import Config, DistributedConfig, LoraConfig, ModelConfig, UserError, leaves
from llada_jax.diffusion.forward import LOSS_WEIGHTS, OBJECTIVES, OF_CAUSAL, T_SAMPLING, is_chat
from llada_jax.model.attention import CHOICES
from llada_jax.model.compute import REMAT
from llada_jax.text.backends import MASK_LITERAL
from llada_jax.text.json_files import check_unicode
from llada_jax.training.optimizer import NAMES, STATE_DTYPES, schedule_points

_DISTRIBUTED = tuple(f"distributed.{field.name}" for field in dataclasses.fields(DistributedConfig))
_POSITIVE = (
    "steps", "batch_size", "sequence_length", "accumulation", "compute.query_chunk", "compute.loss_chunk",
    "checkpoint.every", "checkpoint.keep", "logging.every", "logging.buckets", "optimizer.max_nonfinite",
    "sampling.steps", "sampling.block_length", "validation.samples", "data.prefetch", "data.read_threads",
    "data.train_tokenizer", *_DISTRIBUTED,
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "validation.every", "validation.rows", "validation.seed", "sampling.every", "sampling.gen_length",
    "sampling.temperature", "checkpoint.permanent_every", "compute.unroll", "model.lora.rank",
    "diffusion.random_length_every", "optimizer.clip_norm", "optimizer.weight_decay", "optimizer.peak_learning_rate",
    "minutes", "data.workers", "profile.steps", "profile.first_step", "model.vocab_size", "model.layers",
    "optimizer.muon_scale",
)  # fmt: skip
# Settings that mean nothing to a causal model.
_ABOUT_MASKS = (
    "diffusion.eps", "diffusion.t_sampling", "diffusion.t_range", "diffusion.loss_weight", "diffusion.complementary",
    "validation.samples", "validation.seed", "sampling.steps", "sampling.block_length", "logging.buckets",
)  # fmt: skip
_ONE_OF = {
    "diffusion.objective": OBJECTIVES,
    "diffusion.t_sampling": T_SAMPLING,
    "diffusion.loss_weight": LOSS_WEIGHTS,
    "compute.remat": REMAT,
    "compute.attention": CHOICES,
    "compute.dtype": ("", "float32", "bfloat16"),
    "optimizer.name": NAMES,
    "optimizer.state_dtype": STATE_DTYPES,
}


def check_distributed(config: Config) -> None:
    """Checks config.distributed alone: the processes of a run need it in order to connect, before anything else.

    Raises:
      UserError: If a timeout is not a positive integer.
    """
    _check_types(config.distributed, "config.distributed")
    values = dict(leaves(config))
    for name in _DISTRIBUTED:
        _require(values[name] >= 1, name, values[name], "must be at least 1")


def validate(config: Config) -> None:
    """Checks the types, values and combinations of all settings. Touches no device and no file.

    If config.model.layers is 0, the architecture is not known yet: `check_architecture` checks it later.

    Raises:
      UserError: If a setting is wrong. The message is one line that names the setting.
    """
    _check_types(config, "config")
    values = dict(leaves(config))
    for name in _POSITIVE:
        _require(values[name] >= 1, name, values[name], "must be at least 1")
    for name in _NOT_NEGATIVE:
        _require(values[name] >= 0, name, values[name], "must not be negative")
    for name in ("optimizer.adam_eps", "model.lora.alpha"):
        _require(values[name] > 0, name, values[name], "must be positive")
    for name in ("seed", "validation.seed"):
        _require(values[name] < 2**32, name, values[name], "must be below 2**32")
    for name, known in _ONE_OF.items():
        if values[name] not in known:
            raise UserError(f"config.{name}={values[name]!r}: choose one of {', '.join(map(repr, known))}")
    if config.model.layers:
        check_architecture(config.model)
        check_objective(config)
    elif not config.init_from:
        raise UserError(
            "config.model.layers=0 takes the architecture of config.init_from, which is not set: set one of the two"
        )
    for prompt in config.sampling.prompts:
        check_unicode(prompt, f"config.sampling.prompts: {prompt!r:.60}")
    _check_lora(config)
    _check_optimizer(config)
    _check_data(config)
    _check_mesh(config)
    _check_diffusion(config)
    for name in ("init_step", "init_weights_only"):
        if values[name] not in (None, False) and not config.init_from:
            raise UserError(f"config.{name} is set, but config.init_from is not: set config.init_from as well")
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.logging.wandb_project needs wandb: pip install 'llada_jax[wandb]'")
    if config.checkpoint.permanent_every % config.checkpoint.every:
        raise UserError(
            f"config.checkpoint.permanent_every={config.checkpoint.permanent_every} is not a multiple of "
            f"config.checkpoint.every={config.checkpoint.every}"
        )


def check_architecture(model: ModelConfig) -> None:
    """Checks the shapes and ids of a model. Raises UserError if one is impossible."""
    for name in ("layers", "width", "heads", "kv_heads", "feed_forward"):
        value = getattr(model, name)
        _require(value >= 1, f"model.{name}", value, "must be at least 1")
    for name in ("norm_eps", "rope_theta"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}", value, "must be positive")
    _require(model.head_size >= 0, "model.head_size", model.head_size, "must not be negative")
    _require(
        model.head_size > 0 or model.width % model.heads == 0,
        "model.heads",
        model.heads,
        f"does not divide model.width={model.width}",
    )
    _require(
        not (model.qkv_bias and model.qk_norm),
        "model.qk_norm",
        True,
        "with model.qkv_bias=True: no published family has both, so the model could never be published: leave out one",
    )
    name = "head_size" if model.head_size else "heads"
    _require(
        model.head_width % 2 == 0,
        f"model.{name}",
        getattr(model, name),
        "makes the head width odd, but RoPE rotates pairs of values",
    )
    scaling = model.rope_scaling
    # The model config is static data of compiled programs and must be hashable; a list is not.
    _require(isinstance(scaling, tuple), "model.rope_scaling", scaling, "must be a tuple")
    _require(
        not scaling or (len(scaling) == 4 and scaling[0] >= 1 and 0 < scaling[1] < scaling[2] and scaling[3] > 0),
        "model.rope_scaling",
        scaling,
        "must be () or (factor >= 1, low_freq_factor > 0, a larger high_freq_factor, original length > 0)",
    )
    _require(
        model.heads % model.kv_heads == 0,
        "model.kv_heads",
        model.kv_heads,
        f"does not divide model.heads={model.heads}",
    )
    for name in ("token_count", "mask_id", "bos_id", "eos_id", "eot_id"):
        value = getattr(model, name)
        if value is not None and model.vocab_size:
            limit = model.vocab_size + (name == "token_count")
            _require(0 <= value < limit, f"model.{name}", value, f"does not fit model.vocab_size={model.vocab_size}")
    _require(
        all(0 <= i < (model.vocab_size or i + 1) and i != model.mask_id for i in model.end_ids),
        "model.end_ids",
        model.end_ids,
        f"must name ids of model.vocab_size={model.vocab_size}, and not MASK",
    )


def check_objective(config: Config, source: str = "") -> None:
    """Checks that the objective suits the model, once its architecture is known. Raises UserError if it does not.

    Args:
      config: The configuration.
      source: The folder that the architecture was taken from; "" if config.model gives it.
    """
    objective, causal = config.diffusion.objective, config.model.causal
    if (objective in OF_CAUSAL) != causal:
        wanted = OF_CAUSAL if causal else [name for name in OBJECTIVES if name not in OF_CAUSAL]
        kind, known = "causal" if causal else "not causal", f", as in {source}" if source else ""
        raise UserError(
            f"config.diffusion.objective={objective}: the model is {kind} (config.model.causal={causal}{known}), so "
            f"choose {' or '.join(wanted)}"
        )
    if not causal:
        return
    values, defaults = dict(leaves(config)), dict(leaves(Config()))
    for name in _ABOUT_MASKS:
        _require(
            values[name] == defaults[name],
            name,
            values[name],
            f"is about MASK, which the objective {objective} does not know: leave it out",
        )
    _require(
        config.sequence_length > 1,
        "sequence_length",
        config.sequence_length,
        f"leaves nothing to predict: with the objective {objective} it must be at least 2",
    )
    for prompt in config.sampling.prompts:
        if MASK_LITERAL in prompt and not is_chat(config):
            raise UserError(
                f"config.sampling.prompts: {prompt!r:.60} has {MASK_LITERAL}, but a causal model fills in nothing"
            )


def _check_lora(config: Config) -> None:
    lora, known = config.model.lora, LoraConfig().targets
    # The model config is static data of compiled programs and must be hashable; a list is not.
    _require(isinstance(lora.targets, tuple), "model.lora.targets", lora.targets, "must be a tuple")
    named = set(lora.targets)
    _require(
        named <= set(known) and len(named) == len(lora.targets),
        "model.lora.targets",
        lora.targets,
        f"must name some of {', '.join(known)}, each once",
    )
    if not lora.rank:
        return
    _require(
        lora.targets != (),
        "model.lora.targets",
        "()",
        "leaves model.lora.rank nothing to adapt: name at least one matrix",
    )
    _require(
        config.optimizer.name == "adamw",
        "optimizer.name",
        config.optimizer.name,
        "cannot train the adapters of model.lora: set it to adamw",
    )
    _require(
        config.init_from != "",
        "model.lora.rank",
        lora.rank,
        "adapts the weights of an existing model: set config.init_from",
    )


def _check_diffusion(config: Config) -> None:
    diffusion = config.diffusion
    _require(0 < diffusion.eps < 1, "diffusion.eps", diffusion.eps, "must lie between 0 and 1")
    # As in config.json, or a resumed run would be told that the setting has changed.
    low, high = diffusion.t_range = tuple(map(float, diffusion.t_range))
    _require(0 <= low < high <= 1, "diffusion.t_range", diffusion.t_range, "must be two ascending numbers in [0, 1]")
    if not diffusion.complementary:
        return
    _require(diffusion.eps < 0.5, "diffusion.eps", diffusion.eps, "must be below 0.5 with diffusion.complementary")
    _require(
        math.isclose(low + high, 1),
        "diffusion.t_range",
        diffusion.t_range,
        "must be symmetric, such as (0.2, 0.8), with diffusion.complementary: the second row of a pair has 1 - t",
    )
    _require(
        config.batch_size % 2 == 0,
        "batch_size",
        config.batch_size,
        "must be even with diffusion.complementary: each sequence takes two rows",
    )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}", value, "must lie in [0, 1)")
    _require(
        optimizer.state_dtype == "float32" or max(optimizer.beta1, optimizer.beta2) <= 0.99,
        "optimizer.state_dtype",
        optimizer.state_dtype,
        "needs optimizer.beta1 and optimizer.beta2 of at most 0.99, or rounding would undo changes of the moments",
    )
    _require(
        optimizer.muon_scale == 1.0 or optimizer.name == "muon",
        "optimizer.muon_scale",
        optimizer.muon_scale,
        f"changes nothing with optimizer.name={optimizer.name}: set it back to 1.0",
    )
    schedule_points(optimizer, config.steps)
    for position, _ in optimizer.schedule if config.minutes else ():
        _require(
            not isinstance(position, int) or position == 0,
            "optimizer.schedule",
            optimizer.schedule,
            f"counts steps (position {position}), but config.minutes={config.minutes:g} leaves their number open: "
            "write positions as fractions of the run, such as 0.05",
        )


def _check_data(config: Config) -> None:
    _require(
        0 <= config.data.validation_fraction < 1,
        "data.validation_fraction",
        config.data.validation_fraction,
        "must lie in [0, 1)",
    )
    if bool(config.data.path) == bool(config.data.input):
        raise UserError(
            "set exactly one of config.data.path (prepared sets) and config.data.input (text to prepare); "
            "to clear the one in the config file, pass --config.data.input= or --config.data.path="
        )
    if is_chat(config):
        objective = config.diffusion.objective
        _require(
            not config.report,
            "report",
            True,
            f"compares text, but the objective {objective} has conversations: set it to False",
        )
        _require(
            config.diffusion.random_length_every == 0,
            "diffusion.random_length_every",
            config.diffusion.random_length_every,
            f"cuts rows of text: set it to 0 for the objective {objective}, which has conversations",
        )


def _check_mesh(config: Config) -> None:
    _require(
        config.batch_size % config.accumulation == 0,
        "accumulation",
        config.accumulation,
        f"does not divide batch_size={config.batch_size}",
    )
    for name in ("data", "fsdp", "tensor"):
        value = getattr(config.mesh, name)
        _require(value == -1 or value >= 1, f"mesh.{name}", value, "must be positive, or -1 for all remaining devices")
    tensor = config.mesh.tensor
    for name in ("heads", "kv_heads", "feed_forward", "vocab_size") if config.model.layers else ():
        value = getattr(config.model, name)
        _require(tensor < 1 or value % tensor == 0, f"model.{name}", value, f"is not divisible by mesh.tensor={tensor}")


def _require(condition: bool, name: str, value, problem: str) -> None:
    if not condition:
        raise UserError(f"config.{name}={value} {problem}")


def _check_types(node, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, hint, name = getattr(node, field.name), hints[field.name], f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise UserError(f"{name} must be a {hint.__name__}, not {value!r}")
            _check_types(value, name)
        elif not _is_a(value, hint):
            wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            raise UserError(f"{name}={value!r} must be of type {wanted}")


def _is_a(value, hint) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is_a(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if arguments[-1] is Ellipsis:
            return all(_is_a(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_is_a, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
