"""Defines `llada_jax.load`, which loads the model in any kind of model folder."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from llada_jax.cli.paths import expanded
from llada_jax.config import ComputeConfig, UserError
from llada_jax.devices import distributed
from llada_jax.devices import mesh as meshes
from llada_jax.formats import workdir
from llada_jax.formats.generation_config import with_ends_of_source
from llada_jax.model import int8
from llada_jax.model.compute import compute_dtype, resolve_compute
from llada_jax.model.transformer import Transformer
from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.text.agreement import fitted, notes_of, with_tokenizer
from llada_jax.text.tokenizer import Tokenizer, find_tokenizer


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    step: int | None = None,
    weights: str | None = None,
    attention: str | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """Loads the model in a folder and its tokenizer.

    A folder of Llama, Qwen2 or Qwen3 holds an autoregressive model: `model.config.causal` is True, and each token sees
    itself and the tokens before it only.

    Lines on stderr say what in the folder is not used, and where config.json and the tokenizer disagree.

    Args:
      path: A training workdir, a published folder (config.json and *.safetensors), or a folder from `convert`. A
        leading ~ stands for a home folder. It may lie in a bucket (gs:// or s3://); a published folder is then
        copied to ~/.cache/llada_jax/models first.
      mesh: The mesh that the parameters are placed on. None means the mesh in use, or a mesh of one device if none is
        set.
      dtype: The dtype of the parameters and of the computation. None means float32 on a CPU and bfloat16 on
        accelerators.
      step: The step of the checkpoint of a workdir. None means the newest.
      weights: "int8" keeps the matrices of the layers as int8 with a scale per output, see `model.int8`; the model can
        then be used, but neither trained nor written. They are quantized one at a time while they are read. None means
        that they have `dtype`.
      attention: "full" lets every token see all tokens, also with the weights of an autoregressive model. None means
        that the folder decides.

    Returns:
      The model, and its tokenizer, which uses the model's own special ids. The tokenizer is None if the folder has
      none.

    Raises:
      UserError: If there is no model in the folder, or if it cannot be used. The message says why in one line.
    """
    int8.check(weights)
    if attention not in (None, "full"):
        raise UserError(f"attention={attention}: choose full, or leave it out to take what the folder says")
    path = objects.place(expanded(path))
    trained_here = workdir.is_workdir(path, "model ")
    if not trained_here and step is not None:
        raise UserError(f"{path} is a published folder: it has no step {step}")
    try:
        dtype = compute_dtype(ComputeConfig(dtype="" if dtype is None else jnp.dtype(dtype).name))
    except (TypeError, UserError) as error:
        raise UserError(f"dtype={dtype}: choose float32 or bfloat16") from error
    if mesh is None and jax.sharding.get_abstract_mesh().empty:
        mesh = meshes.one_device_mesh()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        quantizer = int8.Quantizer() if weights else None
        if trained_here:
            model, tokenizer = _from_workdir(path, dtype, step, quantizer)
        else:
            model, tokenizer = _from_published(path, dtype, quantizer)
        if quantizer is not None:
            model = quantizer.finish(model)
        # The attention kernel is chosen for the devices that hold the model, which need not be those of its training.
        # Layers are scanned: unrolling them can speed up training on a CPU, but slows down the forward pass alone.
        if attention == "full":
            model.config = dataclasses.replace(model.config, causal=False)
        compute = dataclasses.replace(model.compute, attention="auto", unroll=1)
        model.compute = resolve_compute(model.config, compute, jax.sharding.get_mesh().devices.flat[0])
        return model, tokenizer


def _from_workdir(
    path: Place, dtype: jnp.dtype, step: int | None, quantizer: int8.Quantizer | None
) -> tuple[Transformer, Tokenizer | None]:
    # Imported here because Orbax takes a second to load, which a published folder does not need.
    from llada_jax.formats import weights

    files = workdir.local_files(path, distributed.log)
    config = with_ends_of_source(workdir.read_config(files)[0].model, files / workdir.PUBLISHED_FILES)
    tokenizer = fitted(find_tokenizer(files / workdir.TOKENIZER), config, path)
    _tell(notes_of(tokenizer, path))
    model = weights.load_model(path, step, jax.sharding.get_mesh(), dtype, quantizer)
    model.config = with_tokenizer(dataclasses.replace(model.config, end_ids=config.end_ids), tokenizer)
    return model, tokenizer


def _from_published(
    path: Place, dtype: jnp.dtype, quantizer: int8.Quantizer | None
) -> tuple[Transformer, Tokenizer | None]:
    from llada_jax.formats import huggingface

    path = workdir.local_files(path, distributed.log)
    found = huggingface.inspect(path)
    tokenizer = fitted(find_tokenizer(path), found.config, path)
    _tell([*found.notes, *notes_of(tokenizer, path)])
    model = huggingface.load_model(path, dtype, lambda config: with_tokenizer(config, tokenizer), change=quantizer)
    return model, tokenizer


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        distributed.log(line)


def load_with_tokenizer(
    path: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    step: int | None = None,
    weights: str | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model as `load` does. Raises UserError also if the folder has no tokenizer."""
    model, tokenizer = load(path, mesh, dtype, step, weights)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer: put its tokenizer.json or tokenizer.model into this folder")
    return model, tokenizer
