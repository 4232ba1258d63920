"""Resolves how the model is computed: the dtype, the attention kernel, and what the backward pass keeps (remat)."""

import dataclasses

import jax
import jax.numpy as jnp

from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.model.attention import choose_kernel
from llada_jax.model.cpu import ROTATED_NAME, SAVED_NAME


def _save_attention(primitive, *_, **params) -> bool:
    """Tells jax.checkpoint to keep what the backward passes of attention kernels need, so that no kernel runs twice."""
    # cuDNN's softmax statistics have no checkpoint_name, so they are recognized by the name of the primitive.
    return primitive.name.startswith("dot_product_attention_fwd") or (
        primitive.name == "name" and params["name"] == SAVED_NAME
    )


_both = jax.checkpoint_policies.save_from_both_policies
_save_rotated = jax.checkpoint_policies.save_only_these_names(ROTATED_NAME)

# What is kept of a layer's forward pass for the backward pass, in addition to the layer's input. The backward pass
# computes everything else again. The keys are the values of config.compute.remat.
REMAT = {
    "none": None,  # everything is kept
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save_attention,
    "rotated": _both(_save_attention, _save_rotated),
    # The backward pass needs queries and keys only as they are after the rotation, so they are kept only once.
    "dots": _both(_both(_save_attention, _save_rotated), jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def remat_policy(compute: ComputeConfig, rank: int):
    """Returns the remat policy, changed so that the products with the matrices B of adapters are never kept.

    Such a product is as large as the product that it is added to, but much cheaper to compute again, because it sums
    over the rank only.
    """
    policy = REMAT[compute.remat]
    if policy is None or not rank:
        return policy

    def keeps(primitive, *inputs, **params) -> bool:
        if primitive.name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            if [inputs[0].shape[axis] for axis in summed] == [rank]:
                return False
        return policy(primitive, *inputs, **params)

    return keeps


DTYPES = {"cpu": "float32"}  # what platforms compute in, by default; all others compute in bfloat16


def compute_dtype(compute: ComputeConfig, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype of activations and matmul operands.

    Unless config.compute.dtype is set, this is bfloat16 on accelerators and float32 on CPUs.

    Args:
      compute: The configuration of the computation.
      platform: The platform of the devices that compute. None means the platform of the default backend.

    Raises:
      UserError: If config.compute.dtype is neither float32 nor bfloat16.
    """
    name = compute.dtype or DTYPES.get(platform or jax.default_backend(), "bfloat16")
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.compute.dtype={name!r}: choose float32 or bfloat16")
    return jnp.dtype(name)


def resolve_compute(model: ModelConfig, compute: ComputeConfig, device: jax.Device | None = None) -> ComputeConfig:
    """Returns a copy of `compute` with the dtype and the attention kernel that are right for a device.

    Args:
      model: The configuration of the model.
      compute: The configuration of the computation.
      device: A device of the kind that computes. None means the default device.

    Raises:
      UserError: If the dtype or the kernel does not exist, or if the kernel cannot run on this kind of device.
    """
    device = device or jax.devices()[0]
    dtype = compute_dtype(compute, device.platform)
    kernel = choose_kernel(compute.attention, dtype, model.head_width, device, compute.deterministic)
    return dataclasses.replace(compute, dtype=dtype.name, attention=kernel)
