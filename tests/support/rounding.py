"""Tolerances of the numeric tests, derived from what is summed and not from what one machine happened to give.

Two machines that compute the same thing round differently: vector units of other widths sum in another order, some fuse
a multiplication with the addition that follows, a mesh sums partial sums, and exp or sin may be off by a unit in the
last place. Every bound below is for the difference of two such results, so it also holds for the difference of one
result from its exact value. It follows from three rules.

* A sum of n terms of size s with random signs has partial sums of up to sqrt(n) s. Each of its additions rounds by at
  most half an eps of the partial sum, and n independent errors of this kind add up to sqrt(n) times one of them. In
  numbers: if n terms are added one by one in one order and in the reverse order, the results differ by n s eps / 5
  (standard deviation). The bound `of_sum` is ten times that, 2 n s eps. Relative to the sum itself, whose size is
  sqrt(n) s, the bound is 2 sqrt(n) eps, and the latter also holds for terms of one sign.
  (What no sum can exceed is n eps times the sum of the absolute values of its terms, by Higham, "Accuracy and Stability
  of Numerical Algorithms", chapter 4. For 1,000 terms this is up to 500 times as much, and would hide mistakes.)
* Every other rounding is at most half an eps, relative, so that two results differ by at most one eps for each of
  their roundings. A function such as exp counts as FUNCTION roundings.
* The relative errors of steps that follow each other add up. This holds where no step makes the errors of its inputs
  larger, as in a model whose scores and hidden states are about 1. Where a step does, its bound says by how much.

"Relative" means relative to the size of the array, its root mean square: an element that is nearly zero, because its
terms cancel, has the error of the others. `assert_close` compares in this way.
"""

import math

import jax.numpy as jnp
import numpy as np

from llada_jax.config import ModelConfig

EPS = float(jnp.finfo(jnp.float32).eps)  # the distance from 1 to the next fp32 number, 1.2e-7
BF16_EPS = float(jnp.finfo(jnp.bfloat16).eps)  # the same for bfloat16, 0.0078
FUNCTION = 2  # exp, log, sin, a power or a square root: off by up to one unit in the last place

# What "equal" means in this project for losses of runs that differ only in their mesh, processes or micro-batches.
# These are promises to the users and not bounds: at the first step there is only the rounding of one loss, and in 20
# steps of Adam the differences grow, because the sign of a gradient that is nearly zero is that of its error.
FIRST_STEP = 1e-5
LATER_STEPS = 1e-3


def of_sum(terms: int, size: float = 1.0, eps: float = EPS) -> float:
    """Returns the absolute bound for a sum of `terms` terms whose root mean square is `size`."""
    return 2 * terms * size * eps


def of_chain(*terms: int, roundings: float = 0, eps: float = EPS) -> float:
    """Returns the relative bound for steps that follow each other.

    Args:
      *terms: The number of terms of each sum.
      roundings: The number of other roundings; each call of a function counts as FUNCTION of them.
      eps: The eps of the dtype in which the steps are rounded; half of it if only one of the two results is rounded.
    """
    return (sum(2 * math.sqrt(n) for n in terms) + roundings) * eps


def of_attention(keys: int, width: int, queries: int = 0, score: float = 1.0) -> dict[str, float]:
    """Returns rtol and atol for outputs and gradients of attention whose inputs are of size 1.

    A score is a sum over the head width, divided by its root; its error is the relative error of its weight, also in
    the gradients. The weights of a query are divided by their sum, and an output is the sum over the keys of values
    times weights. A gradient of keys or values is a sum over all queries of the group. Where a query sees a single key,
    the weight is 1 and each of the terms is of size 1. The gradient of a score contains a sum over the head width.

    Args:
      keys: The number of keys.
      width: The width of a head.
      queries: The number of queries of all heads that share a key/value head; 0 if no gradients are compared.
      score: The size of the largest scores. They are rounded twice more, when they are scaled and when their maximum
        is subtracted.
    """
    weight = of_chain(width, keys, keys, roundings=2 * FUNCTION + math.ceil(2 * score))
    return {"rtol": weight, "atol": weight + of_sum(queries) + of_sum(width)}


def of_logits(config: ModelConfig, positions: int, score: float = 1.0) -> float:
    """Returns the relative bound for the logits of a model.

    Args:
      config: The sizes of the model.
      positions: The length of the rows, which is the number of keys of a query.
      score: The size of the scores of attention. Above 1, a relative error of queries and keys is multiplied by it,
        because the absolute error of a score is the relative error of its weight.
    """
    d, f, k = config.width, config.feed_forward, config.head_width
    # RMSNorm, the queries and keys, RoPE and the scores. The fastest of the k / 2 pairs of components turns by about p
    # radians at position p, with an error of p roundings; the others turn much less.
    scores = of_chain(d, d, d, k, roundings=3 * FUNCTION + positions / math.sqrt(k / 2))
    # The softmax, the values, their mean, and the output matrix.
    attention = of_chain(positions, d, positions, d, roundings=2 * FUNCTION)
    feed_forward = of_chain(d, d, d, f, roundings=3 * FUNCTION)
    layer = max(score, 1.0) * scores + attention + feed_forward
    return config.layers * layer + of_chain(d, d, roundings=FUNCTION)  # the last norm and the head


def of_nll(config: ModelConfig, positions: int, tokens: int = 1, score: float = 1.0) -> float:
    """Returns the relative bound for a loss: a negative log-likelihood, or a sum or mean of several.

    It holds where the loss is not smaller than the logits, whose error is its absolute error. The logarithm of a sum
    over the vocabulary has the relative error of this sum.

    Args:
      config, positions, score: See `of_logits`.
      tokens: The number of independent terms of the sum or mean: rows, tokens, or maskings of a row. The mean of n
        errors is smaller than one of them by a factor of sqrt(n).
    """
    one = of_logits(config, positions, score) + of_chain(config.vocab_size, roundings=3 * FUNCTION)
    return one / math.sqrt(tokens) + of_chain(tokens)


def of_gradient(config: ModelConfig, positions: int, tokens: int) -> float:
    """Returns the relative bound for the gradient of a loss of `tokens` tokens.

    Each sum of the forward pass, in which the gradient is evaluated, has a counterpart in the backward pass. The sums
    over the vocabulary, in the softmax and in the product with the head, and the sum over all tokens come on top.
    """
    return 2 * of_logits(config, positions) + of_chain(config.vocab_size, config.vocab_size, tokens)


def of_adam(error: float, gradient: np.ndarray, second_moment: np.ndarray) -> np.ndarray:
    """Returns the absolute bound for each element of an update of Adam, without the learning rate.

    An update is m / sqrt(v). Both m and sqrt(v) are means of the gradients, so both have at most the error of a
    gradient. m / sqrt(v) is about 1 at most, so that the error of the update is twice that of the gradient divided by
    sqrt(v). An element whose gradients are smaller than their error can have either sign: the update is off by 2. The
    update itself takes about ten operations.

    Args:
      error: The relative bound for the gradients, as of `of_gradient`.
      gradient: The gradient of a parameter, whose size the error is relative to.
      second_moment: v, with bias correction.
    """
    off = (error * size(gradient)) / np.maximum(np.sqrt(second_moment), 1e-30)
    return np.minimum(2 * off, 2.0) + 10 * EPS


def of_newton_schulz(matrices: np.ndarray, steps: int = 5) -> float:
    """Returns the relative bound for matrices that Newton-Schulz steps have made nearly orthogonal.

    The steps take each singular value to about 1, at most 1.2, and multiply errors in its direction by as much as the
    value itself. The smallest singular value grows most, by a factor of 3.4 in each step at first, so that the errors
    of the later steps grow less: all together count as much as 1.4 errors of the first step, and one for each step.

    Args:
      matrices: The matrices before the steps, (..., rows, columns).
      steps: The number of steps.
    """
    values = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    rows, columns = sorted(matrices.shape[-2:])
    growth = 1.2 * (np.sqrt((values**2).sum(axis=-1)) / values.min(axis=-1)).max()
    # A step consists of three products. An error is relative to the norm of the matrix, which is 1 before the first
    # step and sqrt(rows) at the end.
    return (1.4 * growth + steps) * of_chain(columns, rows, rows, roundings=4) / math.sqrt(rows)


def size(x) -> float:
    """Returns the root mean square of an array."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_within(got, wanted, bound) -> None:
    """Checks that no element of `got` differs from that of `wanted` by more than its own absolute bound."""
    off, bound = np.broadcast_arrays(np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64)), bound)
    wrong = ~(off <= bound)  # also True for NaN
    assert not wrong.any(), f"{wrong.sum()} of {off.size} are off, by up to {off[wrong].max()}; bounds {bound[wrong]}"


def assert_close(got, wanted, relative: float) -> None:
    """Checks that two arrays are equal up to `relative` times the size of the array, or of an element if it is larger.

    Args:
      got: An array.
      wanted: An array of the same shape, to whose size the bound is relative.
      relative: The bound, from one of the functions above.
    """
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=relative * size(wanted))
