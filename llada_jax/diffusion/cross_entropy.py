"""Output head and cross-entropy together, over the masked positions only.

The vocabulary is large (126,464) and about half of all positions carry no loss. So the positions
with a weight are brought to the front and worked off in chunks until none is left; the gradients are
formed in the same pass. Never are there logits of more than one chunk, none is computed twice, and
positions without weight cost nothing.
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
    """sum(weight * nll) and nll, where nll = -log softmax(h @ head)[target].

    Args:
      h_BTD: hidden states in the compute dtype, rows split over the batch axes.
      head_DV: fp32 output matrix as mesh.PARAMETERS["head"] places it; used in the dtype of h.
      targets_BT: int32 ids in [0, V).
      weight_BT: fp32, 0 where there is no loss.
      chunk: positions per chunk on each device; (chunk, V / tensor) fp32 logits are held at once.

    Returns:
      The fp32 scalar sum over all rows, differentiable in h and head, and the fp32 (B, T) negative
      log-likelihoods in nats, 0 where the weight is 0, without gradient.
    """
    return _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients=False)[:2]


def _forward(h_BTD, head_DV, targets_BT, weight_BT, chunk):
    total, nll_BT, dh_BTD, dhead_DV = _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients=True)
    return (total, nll_BT), (dh_BTD, dhead_DV)


def _backward(chunk, residuals, cotangents):
    dh_BTD, dhead_DV = residuals
    scale, _ = cotangents
    return (dh_BTD * scale.astype(dh_BTD.dtype), dhead_DV * scale, None, None)


linear_cross_entropy.defvjp(_forward, _backward)


def _run(h_BTD, head_DV, targets_BT, weight_BT, chunk, gradients):
    # Gathered once, before the loop, in the dtype it is used in.
    head_DV = jax.reshard(head_DV.astype(h_BTD.dtype), P(None, "tensor"))
    out_specs = [P(), mesh.TOKENS_BT]
    if gradients:
        out_specs += [mesh.HIDDEN_BTD, mesh.PARAMETERS["head"]]
    return jax.shard_map(
        functools.partial(_local, chunk=chunk, gradients=gradients),
        in_specs=(mesh.HIDDEN_BTD, P(None, "tensor"), mesh.TOKENS_BT, mesh.TOKENS_BT),
        out_specs=tuple(out_specs),
        check_vma=False,  # gradients are written out by hand: nothing differentiates through this
    )(h_BTD, head_DV, targets_BT, weight_BT)


def _local(h_BTD, head_DV, targets_BT, weight_BT, *, chunk, gradients):
    """One device's rows and its slice of the vocabulary; inside the loop only 'tensor' communicates."""
    batch, length, width = h_BTD.shape
    count = batch * length
    chunk = min(chunk, count)
    h_ND, targets_N, weight_N = h_BTD.reshape(count, width), targets_BT.reshape(count), weight_BT.reshape(count)
    order_N = jnp.argsort(weight_N == 0, stable=True)
    weighted = jnp.count_nonzero(weight_N)
    # All devices make the same number of turns, or the collectives in the loop would hang.
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

        # Positions beyond the last weighted one are written nowhere.
        write_C = jnp.where(valid_C, index_C, count)
        nll_N = nll_N.at[write_C].set(nll_C, mode="drop")
        if gradients:
            # d nll / d logits = softmax - one-hot
            dlogits_CV = exp_CV * (weight_C / sum_C)[:, None]
            dlogits_CV = dlogits_CV.at[jnp.arange(chunk), target_C].add(-jnp.where(here_C, weight_C, 0.0))
            dlogits_CV = dlogits_CV.astype(h_CD.dtype)
            dh_CD = jnp.einsum("cv,dv->cd", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
            dh_ND = dh_ND.at[write_C].set(jax.lax.psum(dh_CD, "tensor").astype(h_ND.dtype), mode="drop")
            dhead_DV += jnp.einsum("cd,cv->dv", h_CD, dlogits_CV, preferred_element_type=jnp.float32)
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
    # Reduced once, after the loop: over the replicas, and over the fsdp shards into the slice each keeps.
    dhead_DV = jax.lax.psum_scatter(dhead_DV, "fsdp", scatter_dimension=0, tiled=True)
    return total, nll_BT, dh_ND.reshape(batch, length, width), jax.lax.psum(dhead_DV, "data")
