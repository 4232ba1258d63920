"""What XLA's CPU backend computes fast only when it is said in its own way: attention and projections.

Differentiated by JAX and compiled for a CPU, plain attention makes some ten passes over (B, H, T, T) arrays in
main memory, in single arrays larger than any cache, and keeps several of them. Here scores exist only for a few
heads and queries at a time, and the backward pass computes them again. Projections are differentiated by hand, so
that no gradient of an activation has to be transposed in memory, and multiply bfloat16 into fp32, for which there
are fast kernels. The mathematics is that of the plain forms.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED_OUT = -1e30  # finite, so that a row without any real key gives numbers, not NaN
SAVED_NAME = "attention"  # of what the backward pass of attention needs; a remat policy may keep it
SCORES = 2**19  # scores worked on at a time: with what is made of them they stay in the caches


def real_mask(real: jax.Array, keys: int) -> jax.Array:
    """Which keys may be attended to as bool (B, S): given so, or as int32 (B,), how many at each row's start."""
    return real if real.ndim == 2 else jnp.arange(keys) < real[:, None]


@jax.custom_vjp
def cpu_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v on one device, never more than about SCORES scores at a time.

    Args:
      q_BTHK, k_BSGK, v_BSGK: one float dtype, H divisible by G.
      real: which keys may be attended to: None = all, bool (B, S), or int32 (B,), how many at each row's start.

    Returns:
      (B, T, H, K) in the dtype of q; softmax and accumulation are fp32.
    """
    return _forward(q_BTHK, k_BSGK, v_BSGK, real)[0]


def _dot(a_NXY: jax.Array, b_NXY: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """One matrix product per n, in fp32."""
    return jax.lax.dot_general(a_NXY, b_NXY, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


class _Tiles:
    """How (B, T, H, K) is cut: `heads` key/value heads at a time and `rows` queries of each of them.

    Letters: Z turns, N heads of a turn, C chunks of queries, Q queries of a chunk (the R = H / G query heads of a
    key/value head one after the other).
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
        """(Z, N, S, K)."""
        return x_BSGK.swapaxes(1, 2).reshape(-1, self.heads, self.keys, self.width)

    def keys_out(self, x_ZNSK: jax.Array) -> jax.Array:
        return x_ZNSK.reshape(self.batch, self.kv_heads, self.keys, self.width).swapaxes(1, 2)

    def queries_in(self, x_BTHK: jax.Array) -> jax.Array:
        """(Z, C, N, Q, K), filled up with zeros."""
        x = x_BTHK.swapaxes(1, 2).reshape(-1, self.heads, self.chunks * self.rows - self.padding, self.width)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padding), (0, 0)))
        return x.reshape(-1, self.heads, self.chunks, self.rows, self.width).swapaxes(1, 2)

    def queries_out(self, x_ZCNQK: jax.Array) -> jax.Array:
        x = x_ZCNQK.swapaxes(1, 2).reshape(-1, self.heads, self.chunks * self.rows, self.width)
        x = x[:, :, : self.chunks * self.rows - self.padding]
        return x.reshape(self.batch, self.q_heads, self.length, self.width).swapaxes(1, 2)

    def bias(self, real: jax.Array | None) -> jax.Array:
        """(Z, N, S), added to the scores."""
        if real is None:
            return jnp.zeros((self.batch * self.kv_heads // self.heads, self.heads, self.keys), jnp.float32)
        bias_BS = jnp.where(real_mask(real, self.keys), 0.0, MASKED_OUT)
        return jnp.repeat(bias_BS, self.kv_heads, axis=0).reshape(-1, self.heads, self.keys)


def _forward(q_BTHK, k_BSGK, v_BSGK, real):
    tiles, scale = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5

    def turn(_, inputs):
        q_CNQK, k_NSK, v_NSK, bias_NS = inputs

        def chunk(_, q_NQK):
            scores_NQS = _dot(q_NQK, k_NSK, 2, 2) * scale + bias_NS[:, None, :]
            top_NQ = scores_NQS.max(axis=-1)
            exp_NQS = jnp.exp(scores_NQS - top_NQ[..., None])
            sum_NQ = exp_NQS.sum(axis=-1)
            out_NQK = _dot(exp_NQS.astype(v_NSK.dtype), v_NSK, 2, 1) / sum_NQ[..., None]
            return None, (out_NQK.astype(q_NQK.dtype), top_NQ, sum_NQ)

        return None, jax.lax.scan(chunk, None, q_CNQK)[1]

    inputs = (tiles.queries_in(q_BTHK), tiles.keys_in(k_BSGK), tiles.keys_in(v_BSGK), tiles.bias(real))
    _, (out, top, total) = jax.lax.scan(turn, None, inputs)
    out_BTHK, top, total = (checkpoint_name(x, SAVED_NAME) for x in (tiles.queries_out(out), top, total))
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total)


def _backward(residuals, dout_BTHK):
    q_BTHK, k_BSGK, v_BSGK, real, out_BTHK, top, total = residuals
    tiles, scale, dtype = _Tiles(q_BTHK.shape, k_BSGK.shape), q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype

    def turn(_, inputs):
        q_CNQK, dout_CNQK, out_CNQK, top_CNQ, sum_CNQ, k_NSK, v_NSK, bias_NS = inputs

        def chunk(sums, inputs):
            q_NQK, dout_NQK, out_NQK, top_NQ, sum_NQ = inputs
            mean_NQ = jnp.sum(dout_NQK.astype(jnp.float32) * out_NQK.astype(jnp.float32), axis=-1)
            # Keys first: two of the three products with these matrices then need no transposition.
            scores_NSQ = _dot(k_NSK, q_NQK, 2, 2) * scale + bias_NS[:, :, None]
            p_NSQ = jnp.exp(scores_NSQ - top_NQ[:, None, :]) * (1 / sum_NQ)[:, None, :]
            dscores_NSQ = p_NSQ * (_dot(v_NSK, dout_NQK, 2, 2) - mean_NQ[:, None, :]) * scale
            p_NSQ, dscores_NSQ = p_NSQ.astype(dtype), dscores_NSQ.astype(dtype)
            dk_NSK, dv_NSK = sums
            sums = (dk_NSK + _dot(dscores_NSQ, q_NQK, 2, 1), dv_NSK + _dot(p_NSQ, dout_NQK, 2, 1))
            return sums, _dot(dscores_NSQ, k_NSK, 1, 1).astype(dtype)

        zeros = jnp.zeros(k_NSK.shape, jnp.float32)
        inputs = (q_CNQK, dout_CNQK, out_CNQK, top_CNQ, sum_CNQ)
        (dk_NSK, dv_NSK), dq_CNQK = jax.lax.scan(chunk, (zeros, zeros), inputs)
        return None, (dq_CNQK, dk_NSK.astype(dtype), dv_NSK.astype(dtype))

    queries = [tiles.queries_in(x) for x in (q_BTHK, dout_BTHK, out_BTHK)]
    keys = (tiles.keys_in(k_BSGK), tiles.keys_in(v_BSGK), tiles.bias(real))
    _, (dq, dk, dv) = jax.lax.scan(turn, None, (*queries, top, total, *keys))
    return tiles.queries_out(dq), tiles.keys_out(dk), tiles.keys_out(dv), None


cpu_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(equation: str, x: jax.Array, weight: jax.Array, out_sharding: jax.sharding.PartitionSpec) -> jax.Array:
    """jnp.einsum(equation, x, weight, out_sharding=out_sharding) in the dtype of x, accumulated in fp32.

    equation: "btd,df->btf" and the like: x and weight share the letters that are summed over and no others.
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
    # x first: it is x that is transposed, once for all the projections it goes into, not each of the dy.
    return dx, project(f"{x_letters},{out}->{weight_letters}", x, dy, specs[1])


project.defvjp(_project_forward, _project_backward)
