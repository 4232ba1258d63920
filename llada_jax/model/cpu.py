"""Attention and projections, written so that XLA's CPU backend computes them fast.

If plain attention is differentiated by JAX and compiled for a CPU, it makes about ten passes over (B, H, T, T) arrays
in main memory. Each of these arrays is larger than any cache, and several of them are kept for the backward pass. In
this module, scores exist only for a few heads and queries at a time, and the backward pass computes them again.

The gradients of projections are written by hand, so that no gradient of an activation has to be transposed in memory.
Projections multiply bfloat16 operands and accumulate in fp32, for which the backend has fast kernels.

The mathematics is the same as in the plain forms. The letters in names are those of transformer.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED_OUT = -1e30  # score of a key that is not real; finite, so that a row without any real key does not give NaN
SAVED_NAME = "attention"  # checkpoint_name of the arrays that the backward pass needs; remat policies can keep them
ROTATED_NAME = "rotated"  # checkpoint_name of queries and keys after RoPE, in the form that the kernel takes them
SCORES = 2**19  # scores that are computed at a time; they and the arrays computed from them stay in the caches


def real_mask(real: jax.Array, keys: int) -> jax.Array:
    """Returns which keys may be attended to, as bool (B, S).

    Args:
      real: The mask itself, bool (B, S), or the number of real keys at the start of each row, int32 (B,).
      keys: S, the number of keys.
    """
    return real if real.ndim == 2 else jnp.arange(keys) < real[:, None]


def cpu_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None, *, causal: bool = False
) -> jax.Array:
    """Computes softmax(q k^T / sqrt(K)) v on one device, with no more than about SCORES scores at a time.

    Args:
      q_BTHK: The queries, of any float dtype.
      k_BSGK: The keys, of the same dtype. H must be divisible by G.
      v_BSGK: The values, of the same dtype.
      real: Which keys may be attended to: None for all keys, a mask, bool (B, S), or the number of real keys at the
        start of each row, int32 (B,).
      causal: Whether query i attends to the keys 0 to i only; T and S must be equal.

    Returns:
      The outputs (B, T, H, K) in the dtype of q. Softmax and accumulation are computed in fp32.
    """
    return _attention(q_BTHK, k_BSGK, v_BSGK, real, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTHK, k_BSGK, v_BSGK, real, causal):
    return _forward(q_BTHK, k_BSGK, v_BSGK, real, causal)[0]


def _dot(a_NXY: jax.Array, b_NXY: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Returns the matrix product of a and b for each n, summed over the given axes, in fp32."""
    return jax.lax.dot_general(a_NXY, b_NXY, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


class _Tiles:
    """Divides arrays (B, T, H, K) into tiles of `heads` key/value heads and `rows` queries of each of these heads.

    Letters in names: Z turns of the outer loop, N key/value heads of a turn, C chunks of queries, Q queries of a chunk.
    The queries of a key/value head are those of its R = H / G query heads, one query head after the other.
    """

    def __init__(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...]):
        self.batch, self.length, self.q_heads, self.width = q_shape
        self.keys, self.kv_heads = k_shape[1:3]
        queries, pairs = self.q_heads // self.kv_heads * self.length, self.batch * self.kv_heads
        self.rows = min(queries, max(8, SCORES // self.keys // 8 * 8))
        self.chunks = -(-queries // self.rows)
        self.padding = self.chunks * self.rows - queries
        fitting = max(1, SCORES // (self.rows * self.keys)) if self.chunks == 1 else 1
        self.heads = max(n for n in range(1, min(fitting, pairs) + 1) if pairs % n == 0)

    def keys_in(self, x_BSGK: jax.Array) -> jax.Array:
        """Reshapes keys or values to (Z, N, S, K)."""
        return x_BSGK.swapaxes(1, 2).reshape(-1, self.heads, self.keys, self.width)

    def keys_out(self, x_ZNSK: jax.Array) -> jax.Array:
        return x_ZNSK.reshape(self.batch, self.kv_heads, self.keys, self.width).swapaxes(1, 2)

    def queries_in(self, x_BTHK: jax.Array) -> jax.Array:
        """Reshapes queries to (Z, C, N, Q, K), padded with zeros."""
        x = x_BTHK.swapaxes(1, 2).reshape(-1, self.heads, self.chunks * self.rows - self.padding, self.width)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padding), (0, 0)))
        return x.reshape(-1, self.heads, self.chunks, self.rows, self.width).swapaxes(1, 2)

    def queries_out(self, x_ZCNQK: jax.Array) -> jax.Array:
        x = x_ZCNQK.swapaxes(1, 2).reshape(-1, self.heads, self.chunks * self.rows, self.width)
        x = x[:, :, : self.chunks * self.rows - self.padding]
        return x.reshape(self.batch, self.q_heads, self.length, self.width).swapaxes(1, 2)

    def bias(self, real: jax.Array | None) -> jax.Array:
        """Returns the bias (Z, N, S) that is added to the scores: 0 for real keys, MASKED_OUT for other keys."""
        if real is None:
            return jnp.zeros((self.batch * self.kv_heads // self.heads, self.heads, self.keys), jnp.float32)
        bias_BS = jnp.where(real_mask(real, self.keys), 0.0, MASKED_OUT)
        return jnp.repeat(bias_BS, self.kv_heads, axis=0).reshape(-1, self.heads, self.keys)

    def positions(self, causal: bool) -> jax.Array | None:
        """Returns the positions of the queries, int32 (C, Q), if these decide what is seen, and otherwise None."""
        if not causal:
            return None
        return (jnp.arange(self.chunks * self.rows, dtype=jnp.int32) % self.length).reshape(self.chunks, self.rows)


def _unseen(position_Q: jax.Array | None, keys: int) -> jax.Array | None:
    """Returns the bias (Q, S) of scores: MASKED_OUT for keys behind their query. None means that all are seen."""
    if position_Q is None:
        return None
    return jnp.where(jnp.arange(keys) <= position_Q[:, None], 0.0, MASKED_OUT)


def _forward(q_BTHK, k_BSGK, v_BSGK, real, causal):
    tiles, scale = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5

    def turn(_, inputs):
        q_CNQK, k_NSK, v_NSK, bias_NS = inputs

        def chunk(_, inputs):
            q_NQK, position_Q = inputs
            scores_NQS = _dot(q_NQK, k_NSK, 2, 2) * scale + bias_NS[:, None, :]
            if (bias_QS := _unseen(position_Q, tiles.keys)) is not None:
                scores_NQS += bias_QS
            top_NQ = scores_NQS.max(axis=-1)
            exp_NQS = jnp.exp(scores_NQS - top_NQ[..., None])
            sum_NQ = exp_NQS.sum(axis=-1)
            out_NQK = _dot(exp_NQS.astype(v_NSK.dtype), v_NSK, 2, 1) / sum_NQ[..., None]
            return None, (out_NQK.astype(q_NQK.dtype), top_NQ, sum_NQ)

        return None, jax.lax.scan(chunk, None, (q_CNQK, tiles.positions(causal)))[1]

    inputs = (tiles.queries_in(q_BTHK), tiles.keys_in(k_BSGK), tiles.keys_in(v_BSGK), tiles.bias(real))
    _, (out, top, total) = jax.lax.scan(turn, None, inputs)
    out_BTHK, top, total = (checkpoint_name(x, SAVED_NAME) for x in (tiles.queries_out(out), top, total))
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total)


def _backward(causal, residuals, dout_BTHK):
    q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total = residuals
    tiles, scale, dtype = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype

    def turn(_, inputs):
        q_CNQK, dout_CNQK, out_CNQK, top_CNQ, sum_CNQ, k_NSK, v_NSK, bias_NS = inputs

        def chunk(sums, inputs):
            q_NQK, dout_NQK, out_NQK, top_NQ, sum_NQ, position_Q = inputs
            mean_NQ = jnp.sum(dout_NQK.astype(jnp.float32) * out_NQK.astype(jnp.float32), axis=-1)
            # With keys as the first dimension, two of the three products with these matrices need no transposition.
            scores_NSQ = _dot(k_NSK, q_NQK, 2, 2) * scale + bias_NS[:, :, None]
            if (bias_QS := _unseen(position_Q, tiles.keys)) is not None:
                scores_NSQ += bias_QS.T
            p_NSQ = jnp.exp(scores_NSQ - top_NQ[:, None, :]) * (1 / sum_NQ)[:, None, :]
            dscores_NSQ = p_NSQ * (_dot(v_NSK, dout_NQK, 2, 2) - mean_NQ[:, None, :]) * scale
            p_NSQ, dscores_NSQ = p_NSQ.astype(dtype), dscores_NSQ.astype(dtype)
            dk_NSK, dv_NSK = sums
            sums = (dk_NSK + _dot(dscores_NSQ, q_NQK, 2, 1), dv_NSK + _dot(p_NSQ, dout_NQK, 2, 1))
            return sums, _dot(dscores_NSQ, k_NSK, 1, 1).astype(dtype)

        zeros = jnp.zeros(k_NSK.shape, jnp.float32)
        inputs = (q_CNQK, dout_CNQK, out_CNQK, top_CNQ, sum_CNQ, tiles.positions(causal))
        (dk_NSK, dv_NSK), dq_CNQK = jax.lax.scan(chunk, (zeros, zeros), inputs)
        return None, (dq_CNQK, dk_NSK.astype(dtype), dv_NSK.astype(dtype))

    queries = [tiles.queries_in(x) for x in (q_BTHK, dout_BTHK, out_BTHK)]
    keys = (tiles.keys_in(k_BSGK), tiles.keys_in(v_BSGK), tiles.bias(real))
    _, (dq, dk, dv) = jax.lax.scan(turn, None, (*queries, top, total, *keys))
    return tiles.queries_out(dq), tiles.keys_out(dk), tiles.keys_out(dv), None


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(equation: str, x: jax.Array, weight: jax.Array, out_sharding: jax.sharding.PartitionSpec) -> jax.Array:
    """Computes jnp.einsum(equation, x, weight, out_sharding=out_sharding) in the dtype of x, accumulated in fp32.

    Args:
      equation: An equation such as "btd,df->btf". The letters that x and weight share must be exactly those that are
        summed over.
      x: The activations.
      weight: The weights.
      out_sharding: The PartitionSpec of the result.

    Returns:
      The result in the dtype of x.
    """
    y = jnp.einsum(equation, x, weight, out_sharding=out_sharding, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _project_forward(equation, x, weight, out_sharding):
    return project(equation, x, weight, out_sharding), (x, weight)


def _project_backward(equation, out_sharding, residuals, dy):
    x, weight = residuals
    inputs, out = equation.split("->")
    x_letters, weight_letters = inputs.split(",")
    specs = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    dx = project(f"{out},{weight_letters}->{x_letters}", dy, weight, specs[0])
    # x comes first, so that x is transposed and not dy: x is transposed once for all projections that read it, but each
    # of them has its own dy.
    return dx, project(f"{x_letters},{out}->{weight_letters}", x, dy, specs[1])


project.defvjp(_project_forward, _project_backward)
