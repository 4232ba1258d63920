"""Low-rank adaptation (LoRA, arXiv 2106.09685): a large model tuned by training small matrices beside its own.

A matrix W of a layer stays as it is and gives way to W + alpha / r A B, with A (inputs, r) and B (r, outputs) of a
small rank r; B starts at zero. The model computes x W + alpha / r (x A) B (model.py), so that the gradient of W is
never formed; gradients and the optimizer's state exist for A and B alone.
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
    """The config of the same model without adapters."""
    return dataclasses.replace(config, lora=LoraConfig())


def adapter_count(config: ModelConfig) -> int:
    """Number of the adapters' parameters, without allocating any."""
    return parameter_count(config) - parameter_count(plain(config))


def partition(params: dict) -> tuple[dict, dict]:
    """The parameters of a model as (trainable, frozen): its adapters and all else, both nested as `params` is."""
    blocks = params["blocks"]
    adapters = {name: x for name, x in blocks.items() if name in ADAPTERS}
    frozen = {name: x for name, x in blocks.items() if name not in ADAPTERS}
    return {"blocks": adapters}, {**params, "blocks": frozen}


def combine(trainable: dict, frozen: dict | None) -> dict:
    """The inverse of `partition`; without anything frozen ({} or None), `trainable` as it is."""
    return {**frozen, "blocks": {**frozen["blocks"], **trainable["blocks"]}} if frozen else trainable


@functools.partial(jax.jit, static_argnums=(0, 1))
def initialise(config: ModelConfig, compute: ComputeConfig, key: jax.Array) -> dict:
    """Fresh adapters, as `partition` gives them: A normal truncated at 3 sigma, sigma = 1 / sqrt(d_in), and B zero.

    Sharded over the mesh in use. Nothing else of the model is made: what is not returned is not computed.
    """
    return partition(split(Transformer(config, compute, key))[1])[0]


def merge(params: dict, config: ModelConfig) -> dict:
    """The parameters of the same model without adapters: W + alpha / r A B, in the dtype of W.

    Computed in fp32, matrix by matrix and layer by layer: beside the model there is memory for the largest one.

    Args:
      params: of a model with adapters, stacked along L, on the mesh in use. The matrices that have adapters are
        donated: they cannot be used afterwards.
      config: of that model.
    """
    blocks = {name: x for name, x in params["blocks"].items() if name not in ADAPTERS}
    for name in config.lora.targets if config.lora.rank else ():
        a, b = (params["blocks"][f"{name}_{part}"] for part in "ab")
        # Waited for: what is only dispatched has its memory already.
        blocks[name] = jax.block_until_ready(_merge_one(blocks[name], a, b, name, config.lora.alpha / config.lora.rank))
    return {**params, "blocks": blocks}


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _merge_one(w: jax.Array, a: jax.Array, b: jax.Array, name: str, scale: float) -> jax.Array:
    inputs, outputs = MATRICES[name]

    def layer(matrices: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b = (x.astype(jnp.float32) for x in matrices)
        # A and B lie as W's inputs and outputs do: nothing has to travel.
        product = jnp.einsum(
            f"{inputs}r,r{outputs}->{inputs}{outputs}",
            a,
            b,
            out_sharding=P(*mesh.PARAMETERS[name]),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (w + scale * product).astype(matrices[0].dtype)

    return jax.lax.map(layer, (w, a, b))
