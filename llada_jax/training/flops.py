"""Counts the floating-point operations (FLOPs) of a train step per token, and looks up the peak of a device."""

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices.hardware import chip_of
from llada_jax.model.transformer import MATRICES


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of one device in FLOP/s, or None if it is unknown, as for a CPU."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def flops_per_token(model: ModelConfig, sequence_length: float, head_share: float = 0.5) -> float:
    """Returns the FLOPs of a training step per token: 6 per matmul parameter, and 12 L T H K for attention.

    Attention is bidirectional, so all of its FLOPs count; of a causal model, half of them do. With low-rank adapters,
    the model's matmul parameters take only 4 FLOPs each, because their gradients are not computed, and the adapters'
    parameters take 6 FLOPs each.

    Args:
      model: The architecture. Its vocab_size must be set.
      sequence_length: The length T of the sequences.
      head_share: The share of the positions that the output head is applied to; `diffusion.forward.masked_share` is
        the one of a run. The default is that of the paper's runs, where half of the positions are masked on average;
        1.0 means all positions.
    """
    attention = 2 * model.width * (model.heads + model.kv_heads) * model.head_width
    layer = attention + 3 * model.width * model.feed_forward
    head = head_share * model.width * model.vocab_size
    weights, adapters = model.layers * layer + head, model.layers * sum(_adapter_parameters(model).values())
    passes = 4 if adapters else 6
    seen = sequence_length / 2 if model.causal else sequence_length
    return passes * weights + 6 * adapters + 12 * model.layers * seen * model.heads * model.head_width


def _adapter_parameters(model: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters of each adapter matrix in one layer, by its name in mesh.PARAMETERS.

    The result is empty if the model has no adapters.
    """
    heads, kv_heads = model.heads * model.head_width, model.kv_heads * model.head_width
    sizes, found = {"d": model.width, "hk": heads, "gk": kv_heads, "f": model.feed_forward}, {}
    for name in model.lora.targets if model.lora.rank else ():
        for part, letters in zip("ab", MATRICES[name], strict=True):
            found[f"{name}_{part}"] = model.lora.rank * sizes[letters]
    return found


def recomputed_flops_per_token(model: ModelConfig, sequence_length: int, compute: ComputeConfig) -> float:
    """Returns the FLOPs per token that a training step executes in addition to `flops_per_token`.

    These are the FLOPs of the forward pass that the backward pass computes again. They depend on compute.remat and on
    the attention kernel. Attention and the layers' matmuls are counted, except for ff_out and its adapter's matrix B,
    because no gradient depends on their output. The products of adapters that remat "dots" computes again are not
    counted.

    Args:
      model: The architecture.
      sequence_length: The length T of the sequences.
      compute: The compute settings, with the name of the kernel that runs in compute.attention.
    """
    attention = 4 * sequence_length * model.heads * model.head_width / (2 if model.causal else 1)
    # Every kernel except the reference kernel computes the attention scores again in the backward pass instead of
    # keeping them. That is one of the two matmuls of attention. The reference kernel keeps the scores, but remat "dots"
    # and "attention" do not; with "full", all of its attention is counted below.
    again = 0 if compute.attention == "reference" and compute.remat in ("none", "full") else attention / 2
    projections = 2 * model.width * (model.heads + model.kv_heads) * model.head_width
    adapters = sum(size for name, size in _adapter_parameters(model).items() if name != "ff_out_b")
    matmuls = 2 * (projections + 2 * model.width * model.feed_forward + adapters)
    # Half of the projections are those to queries and keys: width x (heads + kv_heads) x head_width numbers.
    rotated = matmuls - projections
    again += {"none": 0, "dots": 0, "rotated": rotated, "attention": matmuls, "full": matmuls + attention}[
        compute.remat
    ]
    return model.layers * again
