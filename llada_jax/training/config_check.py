"""What is wrong with a config, said in one line before any device work."""

import dataclasses
import importlib.util
import math
import types
import typing

from llada_jax.config import Config, DistributedConfig, LoraConfig, ModelConfig, UserError, leaves
from llada_jax.diffusion.forward import is_chat

DISTRIBUTED = tuple(f"distributed.{field.name}" for field in dataclasses.fields(DistributedConfig))


def check_distributed(config: Config) -> None:
    """UserError for a timeout that is none: before the processes meet, which these settings are for."""
    _check_types(config.distributed, "config.distributed")
    values = dict(leaves(config))
    for name in DISTRIBUTED:
        _require(values[name] >= 1, name, values[name], "must be at least 1")


def validate(config: Config) -> None:
    """UserError, one line naming the setting, for a wrong type or an impossible combination. Touches no device."""
    _check_types(config, "config")
    positive = ("steps", "batch_size", "sequence_length", "accumulation", "model.width", "model.heads",
                "model.kv_heads", "model.feed_forward", "compute.query_chunk", "compute.loss_chunk", "checkpoint.every",
                "checkpoint.keep", "logging.every", "logging.buckets", "optimizer.max_nonfinite", "sampling.steps",
                "sampling.block_length", "validation.samples", "data.prefetch", "data.read_threads",
                "data.train_tokenizer", *DISTRIBUTED)  # fmt: skip
    values = dict(leaves(config))
    for name in positive:
        _require(values[name] >= 1, name, values[name], "must be at least 1")
    not_negative = ("seed", "validation.every", "validation.rows", "validation.seed", "sampling.every",
                    "sampling.gen_length", "sampling.temperature", "checkpoint.permanent_every", "compute.unroll",
                    "model.lora.rank",
                    "diffusion.random_length_every", "optimizer.clip_norm", "optimizer.weight_decay",
                    "optimizer.peak_learning_rate", "data.workers", "profile.steps", "profile.first_step",
                    "model.vocab_size", "model.layers")  # fmt: skip
    for name in not_negative:
        _require(values[name] >= 0, name, values[name], "must not be negative")
    if not values["model.layers"] and not config.init_from:
        raise UserError("config.model.layers=0 takes the architecture of config.init_from: set one of them")
    for name in ("optimizer.adam_eps", "model.norm_eps", "model.rope_theta", "model.lora.alpha"):
        _require(values[name] > 0, name, values[name], "must be positive")
    for name in ("seed", "validation.seed"):
        _require(values[name] < 2**32, name, values[name], "must be below 2**32")
    model = config.model
    _require(model.width % model.heads == 0, "model.heads", model.heads, f"does not divide model.width={model.width}")
    _require(model.head_width % 2 == 0, "model.heads", model.heads, "gives an odd head width: RoPE rotates pairs")
    _require(
        model.heads % model.kv_heads == 0, "model.kv_heads", model.kv_heads, f"does not divide heads={model.heads}"
    )
    _check_lora(config)
    for name in ("token_count", "mask_id", "bos_id", "eos_id", "eot_id"):
        value = getattr(model, name)
        if value is not None and model.vocab_size:
            limit = model.vocab_size + (name == "token_count")
            _require(0 <= value < limit, f"model.{name}", value, f"does not fit model.vocab_size={model.vocab_size}")
    _require(
        config.optimizer.state_dtype == "float32" or max(config.optimizer.beta1, config.optimizer.beta2) <= 0.99,
        "optimizer.state_dtype",
        config.optimizer.state_dtype,
        "needs optimizer.beta1 and beta2 of at most 0.99: smaller changes of the moments would be rounded away",
    )
    _require(0 < config.diffusion.eps < 1, "diffusion.eps", config.diffusion.eps, "must lie between 0 and 1")
    _require(
        0 <= config.data.validation_fraction < 1,
        "data.validation_fraction",
        config.data.validation_fraction,
        "must lie in [0, 1)",
    )
    for name in ("beta1", "beta2"):
        value = getattr(config.optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}", value, "must lie in [0, 1)")
    _require(
        config.batch_size % config.accumulation == 0,
        "accumulation",
        config.accumulation,
        f"does not divide batch_size={config.batch_size}",
    )
    if is_chat(config):
        _require(
            not config.report, "report", True, f"compares text, the objective {config.diffusion.objective} has none"
        )
        _require(
            config.diffusion.random_length_every == 0,
            "diffusion.random_length_every",
            config.diffusion.random_length_every,
            f"cuts rows of text: set it to 0 for the objective {config.diffusion.objective}",
        )
    if bool(config.data.path) == bool(config.data.input):
        raise UserError(
            "set exactly one of config.data.path (prepared sets) and config.data.input (text to prepare); "
            "what the config file sets is taken back by --config.data.input= or --config.data.path="
        )
    for name in ("init_step", "init_weights_only"):
        if values[name] not in (None, False) and not config.init_from:
            raise UserError(f"config.{name} is set without config.init_from")
    for name in ("data", "fsdp", "tensor"):
        value = getattr(config.mesh, name)
        _require(value == -1 or value >= 1, f"mesh.{name}", value, "must be positive, or -1 for what is left")
    tensor = config.mesh.tensor
    for name in ("heads", "kv_heads", "feed_forward", "vocab_size"):
        value = getattr(model, name)
        _require(tensor < 1 or value % tensor == 0, f"model.{name}", value, f"is not divisible by mesh.tensor={tensor}")
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.logging.wandb_project needs wandb: pip install 'llada_jax[wandb]'")
    if config.checkpoint.permanent_every % config.checkpoint.every:
        raise UserError(
            f"config.checkpoint.permanent_every={config.checkpoint.permanent_every} is not a multiple of "
            f"config.checkpoint.every={config.checkpoint.every}"
        )


def _check_lora(config: Config) -> None:
    lora, known = config.model.lora, LoraConfig().targets
    # It must be hashable: a list is not.
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
    _require(lora.targets != (), "model.lora.targets", "()", "leaves model.lora.rank nothing to adapt: name a matrix")
    _require(
        config.optimizer.name == "adamw", "optimizer.name", config.optimizer.name, "is not for model.lora: set adamw"
    )
    _require(
        config.init_from != "", "model.lora.rank", lora.rank, "adapts weights that are there: set config.init_from"
    )


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


def resolve_ids(model: ModelConfig, tokenizer) -> None:
    """Fills in what the model config leaves to the tokenizer: vocab_size, token_count and the special ids.

    Raises:
      UserError: the config and the tokenizer contradict each other, or the vocabulary is too small.
    """
    model.vocab_size = model.vocab_size or tokenizer.vocab_size
    if tokenizer.size > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer.size} tokens"
        )
    wanted = {"token_count": tokenizer.size}
    wanted.update((name, getattr(tokenizer, name)) for name in ("mask_id", "bos_id", "eos_id", "eot_id"))
    for name, value in wanted.items():
        if getattr(model, name) is None:
            setattr(model, name, value)
        elif getattr(model, name) != value:
            raise UserError(
                f"config.model.{name}={getattr(model, name)}, but the tokenizer has {value}: take the tokenizer that "
                "belongs to the config, or delete the setting from the config file"
            )
