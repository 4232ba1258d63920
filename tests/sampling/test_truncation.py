import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.sampling.truncation import truncate


def plain(logits_V, top_k, top_p):
    """Sorts one row, as libraries for text generation do; the kept tokens of one position as a set."""
    order = sorted(np.flatnonzero(logits_V > -np.inf), key=lambda v: -logits_V[v])
    if top_k is not None:
        order = [v for v in order if logits_V[v] >= logits_V[order[min(top_k, len(order)) - 1]]]
    weight = {v: np.exp(np.float64(logits_V[v]) - np.float64(logits_V[order[0]])) for v in order}
    if top_p is None:
        return set(order)
    share = top_p * sum(weight.values())
    return {v for v in order if sum(weight[u] for u in order if logits_V[u] > logits_V[v]) < share}


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.9), (None, 0.05), (7, 0.6), (10**6, 1e-6)])
def test_kept_tokens_are_those_of_sorting(top_k, top_p):
    rng = np.random.default_rng(0)
    logits_BCV = (rng.standard_normal((4, 9, 50)) * rng.choice([0.1, 1, 8], (4, 9, 1))).astype(np.float32)
    logits_BCV[0, 0] = np.repeat(logits_BCV[0, 0, :10], 5)  # each value five times
    logits_BCV[1, :, 20:] = -np.inf
    logits_BCV[2, 3] *= -1e30
    logits_BCV[3, 5] = 0.0
    kept_BCV = jax.jit(truncate)(
        logits_BCV,
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
    )
    for b, c in itertools.product(range(4), range(9)):
        kept = set(np.flatnonzero(np.asarray(kept_BCV[b, c]) > -np.inf).tolist())
        # No cumulative sum of these rows is within rounding of its bound.
        assert kept == plain(logits_BCV[b, c], top_k, top_p), (b, c)
    held = np.asarray(kept_BCV) > -np.inf
    np.testing.assert_array_equal(np.asarray(kept_BCV)[held], logits_BCV[held])
