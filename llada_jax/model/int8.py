"""Keeps the matrices of the layers as int8, with a scale per output of each matrix (weight-only quantization).

    W[i, o] = scale[o] Q[i, o]  (about),    scale[o] = max_i |W[i, o]| / 127.5,    Q = round(W / scale) in -127 ... 127

An element is off by at most half a scale. A product is made with Q in the compute dtype, which holds every int8
exactly, and then multiplied by the scales in fp32 (`Block.linear`). The embedding, the head and the norms keep their
dtype: they are a small part of a large model, and the head decides what is chosen. Such a model can be sampled from and
evaluated, but neither trained nor written.

The quantization itself is qwix's (pip install 'llada_jax[int8]').
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from flax import nnx

from llada_jax.config import UserError
from llada_jax.model.transformer import MATRICES, SCALE, Transformer

NAME = "int8"


def check(weights: str | None) -> None:
    """Raises UserError if `weights` is neither None nor "int8", or if qwix is missing for int8."""
    if weights not in (None, NAME):
        raise UserError(f"weights={weights}: choose int8, or leave it out to keep the weights as they are")
    if weights and importlib.util.find_spec("qwix") is None:
        raise UserError("weights=int8 needs the package qwix: pip install 'llada_jax[int8]'")


class Quantizer:
    """Quantizes the parameters of one model while they are read, so that no more than one of them is there twice."""

    def __init__(self):
        self.scales: dict[str, jax.Array] = {}

    def __call__(self, name: str, array: jax.Array) -> jax.Array:
        """Returns what takes the place of a parameter: int8 for a matrix of the layers, otherwise the parameter itself.

        Args:
          name: The name of the parameter, a key of `mesh.PARAMETERS`.
          array: The parameter, sharded over the mesh in use. The int8 array and its scales are sharded alike.
        """
        if name not in MATRICES:
            return array
        quantized, self.scales[name] = jax.block_until_ready(_quantize(array, len(MATRICES[name][0])))
        return quantized

    def finish(self, model: Transformer) -> Transformer:
        """Gives a model of such parameters the scales, and returns it."""
        for name, scale in self.scales.items():
            setattr(model.blocks, name + SCALE, nnx.Param(scale))
        return model


@functools.partial(jax.jit, static_argnums=1)
def _quantize(array: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    """Returns int8 (L, inputs..., outputs...) and the scales, fp32 (L, outputs...), of stacked matrices."""
    import qwix

    summed = range(1, 1 + inputs)
    outputs = [axis for axis in range(array.ndim) if axis not in summed]
    found = qwix.quantize(array.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)
    return found.qvalue, jnp.squeeze(found.scale, axis=tuple(summed))


def is_int8(model: Transformer) -> bool:
    """Returns whether the matrices of a model are int8."""
    return any(hasattr(model.blocks, name + SCALE) for name in MATRICES)


def in_dtype(model: Transformer, dtype: jnp.dtype) -> Transformer:
    """Returns the model with its parameters in a dtype, except that int8 matrices and their scales stay as they are."""

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        kept = x.dtype == jnp.int8 or any(str(getattr(key, "name", key)).endswith(SCALE) for key in path)
        return x if kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, model)
