"""Computes the output head and the cross-entropy together, over the masked positions only.

The vocabulary is large (126,464), and about half of all positions have no loss. Therefore the positions whose weight is
not 0 are sorted to the front and processed in chunks until none is left; the gradients are computed in the same pass.
Only the logits of one chunk exist at a time, no logits are computed twice, and positions of weight 0 cost nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.devices import mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    h_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Computes sum(weight * nll) and nll, where nll = -log softmax(h @ head)[target].

    Args:
      h_BTD: The hidden states in the compute dtype, with rows split over the batch axes.
      head_DV: The fp32 output matrix, sharded as mesh.PARAMETERS["head"] specifies. It is cast to the dtype of h.
      targets_BT: The int32 ids of the correct tokens, in [0, V).
      weight_BT: The fp32 weights of the positions, 0 where there is no loss.
      chunk: The number of positions per chunk on each device. A device holds (chunk, V / tensor) fp32 logits at a time.

    Returns:
      The sum over all rows, an fp32 scalar that is differentiable with respect to h and head.
      The negative log-likelihoods nll in nats, fp32 (B, T), which are 0 where the weight is 0 and have no gradient.
    """
    return _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients=False)[:2]


def _forward(h_BTD, head_DV, targets_BT, weight_BT, chunk):
    total, nll_BT, dh_BTD, dhead_DV = _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients=True)
    return (total, nll_BT), (dh_BTD, dhead_DV)


@jax.named_scope("head_and_loss")
def _backward(chunk, residuals, cotangents):
    dh_BTD, dhead_DV = residuals
    scale, _ = cotangents
    return (dh_BTD * scale.astype(dh_BTD.dtype), dhead_DV * scale, None, None)


linear_cross_entropy.defvjp(_forward, _backward)


@jax.named_scope("head_and_loss")  # llada_jax.plan knows this part of the model, and the gradients, by the names
def _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients):
    # The matrix is gathered once, before the loop, and in the dtype that the products need.
    head_DV = jax.reshard(head_DV.astype(h_BTD.dtype), P(None, "tensor"))
    out_specs = [P(), mesh.TOKENS_BT]
    if gradients:
        out_specs += [mesh.HIDDEN_BTD, mesh.PARAMETERS["head"]]
    return jax.shard_map(
        functools.partial(_local, chunk=chunk, gradients=gradients),
        in_specs=(mesh.HIDDEN_BTD, P(None, "tensor"), mesh.TOKENS_BT, mesh.TOKENS_BT),
        out_specs=tuple(out_specs),
        check_vma=False,  # JAX does not differentiate this: the gradients are written by hand
    )(h_BTD, head_DV, targets_BT, weight_BT)


def _head_gradient(h_CD, dlogits_CV):
    """Returns the fp32 gradient (D, V) of the head for the positions of one chunk."""

    def on_cpu(h_CD, dlogits_CV):
        # XLA's CPU backend takes twice the time for a sum over the first dimension of both matrices. The barrier keeps
        # XLA from turning the product back into that form.
        h_DC = jax.lax.optimization_barrier(h_CD.T)
        return jnp.einsum("dc,cv->dv", h_DC, dlogits_CV, preferred_element_type=jnp.float32)

    def elsewhere(h_CD, dlogits_CV):
        return jnp.einsum("cd,cv->dv", h_CD, dlogits_CV, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(h_CD, dlogits_CV, cpu=on_cpu, default=elsewhere)


def _local(h_BTD, head_DV, targets_BT, weight_BT, *, chunk, gradients):
    """Processes the rows and the vocabulary slice of one device; its loop communicates over 'tensor' only."""
    batch, length, width = h_BTD.shape
    count = batch * length
    chunk = min(chunk, count)
    h_ND, targets_N, weight_N = h_BTD.reshape(count, width), targets_BT.reshape(count), weight_BT.reshape(count)
    order_N = jnp.argsort(weight_N == 0, stable=True)
    weighted = jnp.count_nonzero(weight_N)
    # All devices must make the same number of turns, or the collectives in the loop would hang.
    turns = jax.lax.pmax(-(-weighted // chunk), mesh.AXES)
    first_id = jax.lax.axis_index("tensor") * head_DV.shape[1]

    def turn(carry):
        i, nll_N, dh_ND, dhead_DV = carry
        position_C = i * chunk + jnp.arange(chunk)
        valid_C = position_C < weighted
        index_C = order_N[jnp.minimum(position_C, count - 1)]
        h_CD, weight_C = h_ND[index_C], jnp.where(valid_C, weight_N[index_C], 0.0)
        target_C = targets_N[index_C] - first_id
        here_C = (target_C >= 0) & (target_C < head_DV.shape[1])
        target_C = jnp.where(here_C, target_C, 0)

        logits_CV = jnp.einsum("cd,dv->cv", h_CD, head_DV, preferred_element_type=jnp.float32)
        top_C = jax.lax.pmax(logits_CV.max(axis=-1), "tensor")
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        sum_C = jax.lax.psum(exp_CV.sum(axis=-1), "tensor")
        target_logit_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
        target_logit_C = jax.lax.psum(jnp.where(here_C, target_logit_C, 0.0), "tensor")
        nll_C = jnp.log(sum_C) + top_C - target_logit_C

        # An index of `count` is out of bounds, so the results of positions after the last weighted one are dropped.
        write_C = jnp.where(valid_C, index_C, count)
        nll_N = nll_N.at[write_C].set(nll_C, mode="drop")
        if gradients:
            with jax.named_scope("gradients"):
                # d nll / d logits = softmax - one-hot. A comparison gives the one-hot in the pass over the rest; for a
                # scatter, TPUs would copy the whole fp32 array into another layout and back.
                one_hot_CV = jnp.arange(exp_CV.shape[1]) == jnp.where(here_C, target_C, -1)[:, None]
                dlogits_CV = exp_CV * (weight_C / sum_C)[:, None] - jnp.where(one_hot_CV, weight_C[:, None], 0.0)
                dlogits_CV = dlogits_CV.astype(h_CD.dtype)
                dh_CD = jnp.einsum("cv,dv->cd", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
                dh_ND = dh_ND.at[write_C].set(jax.lax.psum(dh_CD, "tensor").astype(h_ND.dtype), mode="drop")
                dhead_DV += _head_gradient(h_CD, dlogits_CV)
        return i + 1, nll_N, dh_ND, dhead_DV

    carry = (
        jnp.int32(0),
        jnp.zeros(count, jnp.float32),
        jnp.zeros_like(h_ND) if gradients else None,
        jnp.zeros(head_DV.shape, jnp.float32) if gradients else None,
    )
    _, nll_N, dh_ND, dhead_DV = jax.lax.while_loop(lambda carry: carry[0] < turns, turn, carry)
    total = jax.lax.psum(jnp.sum(nll_N * weight_N), mesh.BATCH)
    nll_BT = nll_N.reshape(batch, length)
    if not gradients:
        return total, nll_BT
    # The gradient is reduced once, after the loop: over the replicas, and over the fsdp shards, each of which keeps its
    # slice.
    with jax.named_scope("gradients"):
        dhead_DV = jax.lax.psum_scatter(dhead_DV, "fsdp", scatter_dimension=0, tiled=True)
        return total, nll_BT, dh_ND.reshape(batch, length, width), jax.lax.psum(dhead_DV, "data")
