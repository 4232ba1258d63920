"""The rotary position embedding (RoPE, arXiv 2104.09864) of queries and keys.

The letters in names are those of transformer.py.
"""

import math

import jax
import jax.numpy as jnp


@jax.named_scope("attention")
def rope_table(
    length: int, head_width: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Returns what the rotations of the positions 0 to T - 1 multiply by: see `rope_at`, with shape (T, K)."""
    return rope_at(jnp.arange(length, dtype=jnp.float32), head_width, theta, scaling)


def rope_at(
    position: jax.Array, head_width: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and the sines of the angles of each component of a head, fp32 (..., K).

    The angle of the components i and i + K / 2, which are rotated together, is position * theta ** (-2 i / K). The
    first half of the sines has the opposite sign, so that a rotated head is x * cos + exchanged(x) * sin, where
    exchanged(x) is x with its halves exchanged.

    Args:
      position: Positions of any shape (...).
      head_width: K, which is even.
      theta: The base of the angles.
      scaling: Empty, or the values of config.model.rope_scaling; the frequencies are then those of `scaled`.
    """
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if scaling:
        frequency = scaled(frequency, *scaling)
    angle = position.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # XLA's CPU backend computes cosines again for each row, head and layer that needs them, but not concatenations.
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def scaled(frequency: jax.Array, factor: float, low: float, high: float, length: float) -> jax.Array:
    """Returns the frequencies of Llama 3.1, which stretch slow rotations for sequences longer than the original length.

    A component that turns at least `high` times within the original length keeps its frequency; one that turns at most
    `low` times has it divided by the factor. Between the two, the frequency is interpolated linearly in the turns.

    Args:
      frequency: fp32, radians per token.
      factor, low, high, length: The values of config.model.rope_scaling; the length is in tokens.
    """
    turns = length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / factor)


@jax.named_scope("attention")
def apply_rope(x_BTHK: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
    """Applies RoPE in fp32; component i of a head is rotated together with component i + K / 2 (rotate-half).

    cos and sin are those of `rope_table`, (T, K), or of `rope_at`, (B, T, K), where each row has positions of its own.
    """
    return _combined(x_BTHK, jnp.roll(x_BTHK, x_BTHK.shape[-1] // 2, axis=-1), cos_TK, sin_TK)


def _combined(x_BTHK: jax.Array, exchanged_BTHK: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
    x, exchanged = x_BTHK.astype(jnp.float32), exchanged_BTHK.astype(jnp.float32)
    return (x * cos_TK[..., None, :] + exchanged * sin_TK[..., None, :]).astype(x_BTHK.dtype)


@jax.custom_vjp
def apply_rope_on_tpu(x_BTHK: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
    """Computes `apply_rope` for TPUs, whose vector registers are as wide as a head and slow to work on half of one.

    The matrix unit exchanges the halves of each head, exactly for finite numbers: one term of each sum is not zero.
    """
    width = x_BTHK.shape[-1]
    exchange_KK = jnp.roll(jnp.eye(width, dtype=x_BTHK.dtype), width // 2, axis=0)
    exchanged_BTHK = jnp.einsum("bthk,kj->bthj", x_BTHK, exchange_KK, precision=jax.lax.Precision.HIGHEST)
    return _combined(x_BTHK, exchanged_BTHK, cos_TK, sin_TK)


def _turn(x_BTHK, cos_TK, sin_TK):
    # To remat, this call is one operation; written out here, policies that keep products would keep the exchanged one.
    return apply_rope_on_tpu(x_BTHK, cos_TK, sin_TK), (cos_TK, sin_TK)


def _turn_back(angle, gradient_BTHK):
    cos_TK, sin_TK = angle
    return apply_rope_on_tpu(gradient_BTHK, cos_TK, -sin_TK), None, None


apply_rope_on_tpu.defvjp(_turn, _turn_back)
