"""Low-rank adaptation (LoRA, arXiv 2106.09685): tunes a large model by training small matrices beside its own.

A matrix W of a layer is replaced by W + alpha / r A B, where W is frozen, and A (inputs, r) and B (r, outputs) have a
small rank r. B starts at zero. The model computes x W + alpha / r (x A) B (see transformer.py), so that the gradient of
W is never formed. Gradients and the state of the optimizer exist for A and B only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, LoraConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model.transformer import MATRICES, Transformer, parameter_count, split

ADAPTERS = frozenset(f"{name}_{part}" for name in MATRICES for part in "ab")


def plain(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of the same model without adapters."""
    return dataclasses.replace(config, lora=LoraConfig())


def adapter_count(config: ModelConfig) -> int:
    """Returns the number of parameters of the adapters, without allocating any parameters."""
    return parameter_count(config) - parameter_count(plain(config))


def partition(params: dict) -> tuple[dict, dict]:
    """Splits the parameters of a model into (trainable, frozen): its adapters and all other parameters.

    Both parts are nested dicts like `params`.
    """
    blocks = params["blocks"]
    adapters = {name: x for name, x in blocks.items() if name in ADAPTERS}
    frozen = {name: x for name, x in blocks.items() if name not in ADAPTERS}
    return {"blocks": adapters}, {**params, "blocks": frozen}


def combine(trainable: dict, frozen: dict | None) -> dict:
    """Undoes `partition`. If nothing is frozen ({} or None), the result is `trainable` itself."""
    return {**frozen, "blocks": {**frozen["blocks"], **trainable["blocks"]}} if frozen else trainable


@functools.partial(jax.jit, static_argnums=(0, 1))
def initialise(config: ModelConfig, compute: ComputeConfig, key: jax.Array) -> dict:
    """Returns newly initialized adapters, nested as `partition` returns them and sharded over the mesh in use.

    A is drawn from a normal distribution that is truncated at 3 sigma, with sigma = 1 / sqrt(d_in). B is zero. The
    other parameters of the model are not computed, because this jitted function does not return them.
    """
    return partition(split(Transformer(config, compute, key))[1])[0]


def merge(params: dict, config: ModelConfig) -> dict:
    """Adds the adapters of a model to its matrices: every W becomes W + alpha / r A B, in the dtype of W.

    The sum is computed in fp32, one matrix and one layer at a time. In addition to the model, this needs memory only
    for the largest matrix.

    Args:
      params: The parameters of a model with adapters, stacked along L, on the mesh in use. The matrices that have
        adapters are donated, so they cannot be used afterwards.
      config: The configuration of this model.

    Returns:
      The parameters of the same model without adapters.
    """
    blocks = {name: x for name, x in params["blocks"].items() if name not in ADAPTERS}
    for name in config.lora.targets if config.lora.rank else ():
        a, b = (params["blocks"][f"{name}_{part}"] for part in "ab")
        # Wait for the result: a computation that is dispatched but not finished already takes up its memory.
        blocks[name] = jax.block_until_ready(_merge_one(blocks[name], a, b, name, config.lora.alpha / config.lora.rank))
    return {**params, "blocks": blocks}


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _merge_one(w: jax.Array, a: jax.Array, b: jax.Array, name: str, scale: float) -> jax.Array:
    inputs, outputs = MATRICES[name]

    def layer(matrices: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b = (x.astype(jnp.float32) for x in matrices)
        # A is sharded like the inputs of W and B like its outputs, so that no data moves between devices.
        product = jnp.einsum(
            f"{inputs}r,r{outputs}->{inputs}{outputs}",
            a,
            b,
            out_sharding=P(*mesh.PARAMETERS[name]),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (w + scale * product).astype(matrices[0].dtype)

    return jax.lax.map(layer, (w, a, b))
