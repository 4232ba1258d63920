"""One way in for every kind of model folder."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.devices import mesh as meshes
from llada_jax.formats import published
from llada_jax.formats.folders import is_workdir
from llada_jax.model.transformer import Transformer, compute_dtype, resolve_compute
from llada_jax.text.tokenizer import Tokenizer, find_tokenizer


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    step: int | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """The model in a folder and its tokenizer (None if the folder has none), which knows the model's own ids.

    Args:
      path: a training workdir, a published folder (config.json and *.safetensors), or what convert wrote.
      mesh: where the parameters go. None = the mesh that is set, else one of a single device.
      dtype: of the parameters and of the computation. None = float32 on CPU, bfloat16 on accelerators.
      step: of a workdir's checkpoint. None = its newest.

    Raises:
      UserError: no model there, or not one that can be used; says what is wrong in one line.
    """
    path = Path(path)
    trained_here = is_workdir(path, "model ")
    if not trained_here and step is not None:
        raise UserError(f"{path} is a published folder: it has no step {step}")
    try:
        dtype = compute_dtype(ComputeConfig(dtype="" if dtype is None else jnp.dtype(dtype).name))
    except (TypeError, UserError) as error:
        raise UserError(f"dtype={dtype}: choose float32 or bfloat16") from error
    if mesh is None and jax.sharding.get_abstract_mesh().empty:
        mesh = meshes.one_device_mesh()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if trained_here:
            model, tokenizer = _from_workdir(path, dtype, step)
        else:
            model, tokenizer = _from_published(path, dtype)
        # For the devices it lies on, whatever the default ones are, or those that it was trained on. One layer after
        # the other: where training is faster with them unrolled, on a CPU, the forward pass alone is not.
        compute = dataclasses.replace(model.compute, attention="auto", unroll=1)
        model.compute = resolve_compute(model.config, compute, jax.sharding.get_mesh().devices.flat[0])
        return model, tokenizer


def _from_workdir(path: Path, dtype: jnp.dtype, step: int | None) -> tuple[Transformer, Tokenizer | None]:
    # Here, not above: Orbax takes a second to import, which a published folder does not need.
    from llada_jax.training import checkpoint, workdir

    tokenizer = fitted(find_tokenizer(path / "tokenizer"), workdir.read_config(path)[0].model, path)
    return checkpoint.load_model(path, step, jax.sharding.get_mesh(), dtype), tokenizer


def _from_published(path: Path, dtype: jnp.dtype) -> tuple[Transformer, Tokenizer | None]:
    from llada_jax.formats import huggingface

    tokenizer = fitted(find_tokenizer(path), huggingface.inspect(path).config, path)
    model = huggingface.load_model(path, dtype, lambda config: with_tokenizer(config, tokenizer))
    return model, tokenizer


def fitted(tokenizer: Tokenizer | None, config: ModelConfig, source: str | Path) -> Tokenizer | None:
    """The tokenizer with the ids of MASK, BOS and EOS that the model's config states.

    Args:
      tokenizer: as its files say; None = there is none.
      config: of the model.
      source: the folder of both, for messages.

    Raises UserError: the tokenizer has tokens that the model has no embedding for.
    """
    if tokenizer is None:
        return None
    if tokenizer.own_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.own_size} tokens, the model's embedding {config.vocab_size}: "
            "they do not belong together"
        )
    return tokenizer.of_model(config.mask_id, config.bos_id, config.eos_id)


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config with what it does not say itself taken from the (fitted) tokenizer: number of tokens, special ids.

    An id beyond the vocabulary is no token of the model: it stays unknown.
    """
    if tokenizer is None:
        return config
    missing = {"token_count": min(tokenizer.size, config.vocab_size)}
    for name in ("mask_id", "bos_id", "eos_id", "eot_id"):
        if (found := getattr(tokenizer, name)) < config.vocab_size:
            missing[name] = found
    return dataclasses.replace(
        config, **{name: value for name, value in missing.items() if getattr(config, name) is None}
    )


def trained_length(folder: str | Path) -> int | None:
    """The tokens that the model in a folder was trained with, by its config.json; None if that does not say."""
    try:
        record = json.loads((Path(folder) / "config.json").read_text())
        run = record.get("config")  # of a training workdir
        return published.sequence_length(record) if run is None else run.get("sequence_length")
    except (OSError, ValueError, AttributeError):
        return None
