"""Computes fingerprints of arrays, which reveal that a checkpoint does not hold what was saved.

The fingerprint of an array is the same on any mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of an array's elements modulo 2**32, and whether all of them are finite.

    The sum takes the bits of each element as an unsigned integer, so that it is the same on any mesh.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    infinity = None
    if jnp.issubdtype(x.dtype, jnp.floating):
        infinity = int(np.array(np.inf, x.dtype).view(unsigned))  # its exponent bits, which -inf and NaN have too

    def one(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        finite = jnp.bool_(True) if infinity is None else jnp.all(bits & infinity != infinity)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32), finite

    bits = jax.lax.bitcast_convert_type(x, unsigned)
    if x.ndim < 3:
        return one(bits)

    # XLA's CPU backend stores the elements that it sums up, in 32 bits each. Sum one layer at a time, so that this
    # takes the memory of one layer instead of all layers.
    def add(total: tuple[jax.Array, jax.Array], layer: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        found, finite = one(layer)
        return (total[0] + found, total[1] & finite), None

    return jax.lax.scan(add, (jnp.uint32(0), jnp.bool_(True)), bits)[0]


def fingerprint(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Computes the fingerprint of every array in a tree.

    Returns:
      A dict from the name of each array to its fingerprint, which changes if any single bit is flipped; and a list of
      the names of the arrays that hold values that are not finite.
    """
    sums, broken = {}, []
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Run one program per array: a single program for all arrays would need temporary memory for each of them.
        found, finite = jax.device_get(_sum(x))
        sums[name] = int(found)
        if not finite:
            broken.append(name)
    return sums, broken
