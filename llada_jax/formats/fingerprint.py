"""A number per array by which a checkpoint that is not what was saved is recognised; the same on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the bits of an array modulo 2**32, and whether all of it is finite; the same on any mesh."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    infinity = None
    if jnp.issubdtype(x.dtype, jnp.floating):
        infinity = int(np.array(np.inf, x.dtype).view(unsigned))  # its exponent: infinities and NaN have it too

    def one(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        finite = jnp.bool_(True) if infinity is None else jnp.all(bits & infinity != infinity)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32), finite

    bits = jax.lax.bitcast_convert_type(x, unsigned)
    if x.ndim < 3:
        return one(bits)

    # XLA's CPU backend writes down what it sums up, in 32 bits: of one layer at a time, not of all.
    def add(total: tuple[jax.Array, jax.Array], layer: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        found, finite = one(layer)
        return (total[0] + found, total[1] & finite), None

    return jax.lax.scan(add, (jnp.uint32(0), jnp.bool_(True)), bits)[0]


def fingerprint(tree: Any) -> tuple[dict[str, int], list[str]]:
    """A number per array, by its name, that any flipped bit changes; and the names of those that are not finite."""
    sums, broken = {}, []
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Array by array: in one program they would all have memory of their own.
        found, finite = jax.device_get(_sum(x))
        sums[name] = int(found)
        if not finite:
            broken.append(name)
    return sums, broken
