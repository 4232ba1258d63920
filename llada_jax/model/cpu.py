"""Attention and projections, written so that XLA's CPU backend computes them fast.

If plain attention is differentiated by JAX and compiled for a CPU, it makes about ten passes over (B, H, T, T) arrays
in main memory. Each of these arrays is larger than any cache, and several of them are kept for the backward pass. In
this module, scores exist only for a few heads and queries at a time, and the backward pass computes them again.

The gradients of projections are written by hand, so that little has to be transposed in memory.
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
SCORES = 2**20  # scores that are computed at a time; they and the arrays computed from them stay in the caches


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
    """Divides the work into turns, each of some rows of the batch and key/value heads, and their queries into chunks.

    Letters in names: N pairs of a row and a key/value head in a turn, C chunks of queries, Q queries of a chunk. The
    queries of a key/value head are those of its R = H / G query heads, one query head after the other.

    What a turn needs is cut out of the arrays, and its results are put into others, in their own layout: transposing
    whole arrays before the first turn and after the last one would take a sixth of attention's time.
    """

    def __init__(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...]):
        batch, self.keys, self.kv_heads, _ = k_shape
        self.length = q_shape[1]
        queries = q_shape[2] // self.kv_heads * self.length
        self.chunk = min(queries, max(8, SCORES // self.keys // 8 * 8))
        self.chunks = -(-queries // self.chunk)
        self.padding = self.chunks * self.chunk - queries
        fitting = SCORES // (self.chunk * self.keys) if self.chunks == 1 else 1
        self.heads = _largest_divisor(self.kv_heads, fitting)
        self.rows = _largest_divisor(batch, fitting // self.kv_heads)
        self.turns_per_row = self.kv_heads // self.heads
        self.turns = batch // self.rows * self.turns_per_row

    def _place(self, x_BTHK: jax.Array, turn: jax.Array) -> tuple[tuple, tuple]:
        """Returns where the part of a turn begins in an array of queries, keys or values, and its sizes."""
        sizes = (self.rows, x_BTHK.shape[1], x_BTHK.shape[2] // self.kv_heads * self.heads, x_BTHK.shape[3])
        return (turn // self.turns_per_row * self.rows, 0, turn % self.turns_per_row * sizes[2], 0), sizes

    def cut(self, x_BSGK: jax.Array, turn: jax.Array) -> jax.Array:
        """Returns the keys or values of a turn, (N, S, K), or its queries, one query head after the other."""
        x = jax.lax.dynamic_slice(x_BSGK, *self._place(x_BSGK, turn))
        return x.swapaxes(1, 2).reshape(self.rows * self.heads, -1, x.shape[-1])

    def put(self, x_BSGK: jax.Array, part_NSK: jax.Array, turn: jax.Array) -> jax.Array:
        """Returns x_BSGK with another part at the place of a turn."""
        start, (rows, length, heads, width) = self._place(x_BSGK, turn)
        part = part_NSK.reshape(rows, heads, length, width).swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(x_BSGK, part.astype(x_BSGK.dtype), start)

    def queries_in(self, x_BTHK: jax.Array, turn: jax.Array) -> jax.Array:
        """Returns the queries of a turn, (C, N, Q, K), padded with zeros."""
        x = jnp.pad(self.cut(x_BTHK, turn), ((0, 0), (0, self.padding), (0, 0)))
        return x.reshape(x.shape[0], self.chunks, self.chunk, x.shape[-1]).swapaxes(0, 1)

    def queries_out(self, x_BTHK: jax.Array, x_CNQK: jax.Array, turn: jax.Array) -> jax.Array:
        """Returns x_BTHK with x_CNQK, without its padding, at the place of the queries of a turn."""
        x = x_CNQK.swapaxes(0, 1).reshape(self.rows * self.heads, -1, x_CNQK.shape[-1])
        return self.put(x_BTHK, x[:, : x.shape[1] - self.padding], turn)

    def bias(self, real: jax.Array | None, turn: jax.Array) -> jax.Array | None:
        """Returns the bias (N, S) of a turn's scores: 0 for real keys, MASKED_OUT for others. None is no bias."""
        if real is None:
            return None
        bias_BS = jnp.where(real_mask(real, self.keys), 0.0, MASKED_OUT)
        bias_BS = jax.lax.dynamic_slice_in_dim(bias_BS, turn // self.turns_per_row * self.rows, self.rows)
        return jnp.repeat(bias_BS, self.heads, axis=0)

    def positions(self, causal: bool) -> jax.Array | None:
        """Returns the positions of the queries, int32 (C, Q), if these decide what is seen, and otherwise None."""
        if not causal:
            return None
        return (jnp.arange(self.chunks * self.chunk, dtype=jnp.int32) % self.length).reshape(self.chunks, self.chunk)


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, max(1, min(most, number)) + 1) if number % n == 0)


def _biases(bias_NS: jax.Array | None, position_Q: jax.Array | None, keys: int) -> list[jax.Array]:
    """Returns what is added to the scores of a chunk, in forms that can be broadcast to (N, Q, S)."""
    biases = [] if bias_NS is None else [bias_NS[:, None, :]]
    if position_Q is not None:
        biases.append(jnp.where(jnp.arange(keys) <= position_Q[:, None], 0.0, MASKED_OUT)[None])
    return biases


def _forward(q_BTHK, k_BSGK, v_BSGK, real, causal):
    tiles, scale = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5

    def turn(out_BTHK, i):
        k_NSK, v_NSK, bias_NS = tiles.cut(k_BSGK, i), tiles.cut(v_BSGK, i), tiles.bias(real, i)

        def chunk(_, inputs):
            q_NQK, position_Q = inputs
            scores_NQS = _dot(q_NQK, k_NSK, 2, 2)
            for bias_NQS in _biases(bias_NS, position_Q, tiles.keys):
                scores_NQS += bias_NQS
            top_NQ = scores_NQS.max(axis=-1)
            exp_NQS = jnp.exp((scores_NQS - top_NQ[..., None]) * scale)
            sum_NQ = exp_NQS.sum(axis=-1)
            out_NQK = _dot(exp_NQS.astype(v_NSK.dtype), v_NSK, 2, 1) / sum_NQ[..., None]
            return None, (out_NQK, top_NQ, sum_NQ)

        inputs = (tiles.queries_in(q_BTHK, i), tiles.positions(causal))
        _, (out_CNQK, top_CNQ, sum_CNQ) = jax.lax.scan(chunk, None, inputs)
        return tiles.queries_out(out_BTHK, out_CNQK, i), (top_CNQ, sum_CNQ)

    out_BTHK, (top, total) = jax.lax.scan(turn, jnp.zeros_like(q_BTHK), jnp.arange(tiles.turns))
    out_BTHK, top, total = (checkpoint_name(x, SAVED_NAME) for x in (out_BTHK, top, total))
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total)


def _backward(causal, residuals, dout_BTHK):
    q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total = residuals
    tiles, scale, dtype = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype
    # The mean gradient of the weights of each query, weighted by the weights.
    mean_BTH1 = jnp.sum(dout_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1, keepdims=True)

    def turn(gradients, inputs):
        i, top_CNQ, sum_CNQ = inputs
        k_NSK, v_NSK, bias_NS = tiles.cut(k_BSGK, i), tiles.cut(v_BSGK, i), tiles.bias(real, i)

        def chunk(sums, inputs):
            q_NQK, dout_NQK, mean_NQ, top_NQ, position_Q = inputs
            # With keys as the first dimension, two of the three products with these matrices need no transposition.
            scores_NSQ = _dot(k_NSK, q_NQK, 2, 2)
            for bias_NQS in _biases(bias_NS, position_Q, tiles.keys):
                scores_NSQ += bias_NQS.swapaxes(1, 2)
            exp_NSQ = jnp.exp((scores_NSQ - top_NQ[:, None, :]) * scale)
            dscores_NSQ = (exp_NSQ * (_dot(v_NSK, dout_NQK, 2, 2) - mean_NQ[:, None, :])).astype(dtype)
            dk_NSK, dv_NSK = sums
            dk_NSK += _dot(dscores_NSQ, q_NQK, 2, 1)
            dv_NSK += _dot(exp_NSQ.astype(dtype), dout_NQK, 2, 1)
            return (dk_NSK, dv_NSK), _dot(dscores_NSQ, k_NSK, 1, 1) * scale

        # The softmax is exp / sum. There are fewer gradients of outputs than scores to divide.
        dout_CNQK = (tiles.queries_in(dout_BTHK, i) / sum_CNQ[..., None]).astype(dtype)
        mean_CNQ = tiles.queries_in(mean_BTH1, i)[..., 0] / sum_CNQ
        inputs = (tiles.queries_in(q_BTHK, i), dout_CNQK, mean_CNQ, top_CNQ, tiles.positions(causal))
        zeros = jnp.zeros(k_NSK.shape, jnp.float32)
        (dk_NSK, dv_NSK), dq_CNQK = jax.lax.scan(chunk, (zeros, zeros), inputs)
        dq_BTHK, dk_BSGK, dv_BSGK = gradients
        dq_BTHK = tiles.queries_out(dq_BTHK, dq_CNQK, i)
        return (dq_BTHK, tiles.put(dk_BSGK, dk_NSK * scale, i), tiles.put(dv_BSGK, dv_NSK, i)), None

    zeros = tuple(jnp.zeros_like(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    (dq_BTHK, dk_BSGK, dv_BSGK), _ = jax.lax.scan(turn, zeros, (jnp.arange(tiles.turns), top, total))
    return dq_BTHK, dk_BSGK, dv_BSGK, None


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
    if out != "btd" or x.size <= dy.size + weight.size:
        # x comes first, so that x is transposed and not dy: x is transposed once for all projections that read it, but
        # each of them has its own dy.
        return dx, project(f"{x_letters},{out}->{weight_letters}", x, dy, specs[1])
    # Only one projection reads this x, and dy and the result are smaller, so these are transposed. The barriers keep
    # XLA from undoing this.
    dy_DBT = jax.lax.optimization_barrier(jnp.moveaxis(dy, -1, 0))
    equation, spec = f"dbt,{x_letters}->d{weight_letters[:-1]}", jax.P(specs[1][-1], *specs[1][:-1])
    dweight = jax.lax.optimization_barrier(project(equation, dy_DBT, x, spec))
    return dx, jnp.moveaxis(dweight, 0, -1)


project.defvjp(_project_forward, _project_backward)
