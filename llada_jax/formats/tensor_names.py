"""Describes the tensors of the published formats: their names in the two namings, their shapes, and their order.

Nothing in this module reads a tensor; `huggingface.py` does that.
"""

import dataclasses

from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.devices import mesh
from llada_jax.formats.families import OWN
from llada_jax.model.transformer import abstract_model, split

# The names of the tensors in the two namings, by the names of our parameters. {} stands for the number of the layer.
LLADA = {
    "embedding": "model.transformer.wte.weight",
    "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    **{
        name: f"model.transformer.blocks.{{}}.{name}.weight"
        for name in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    },
}
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "attn_out": "model.layers.{}.self_attn.o_proj.weight",
    "ff_norm": "model.layers.{}.post_attention_layernorm.weight",
    "ff_proj": "model.layers.{}.mlp.gate_proj.weight",
    "up_proj": "model.layers.{}.mlp.up_proj.weight",
    "ff_out": "model.layers.{}.mlp.down_proj.weight",
    **{f"{name}_bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in ("q", "k", "v")},
    **{f"{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in ("q", "k")},
}
BIASES = ("q_bias", "k_bias", "v_bias")
NAMINGS = {"llada": LLADA, "llama": LLAMA}


def naming_of(config: ModelConfig) -> str:
    """Returns the naming of the tensors of a model that was not published before: LLaDA's wherever LLaDA has it all."""
    return "llama" if any(getattr(config, name) for name in OWN) else "llada"


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """One tensor of a published folder: one of our parameters, or the part of a stacked parameter for one layer."""

    name: str
    parameter: str  # a name in mesh.PARAMETERS
    layer: int | None  # None if the parameter does not belong to a layer
    shape: tuple[int, ...]


def published_tensors(config: ModelConfig, naming: str) -> list[PublishedTensor]:
    """Returns all tensors of a model in the order in which the model uses them, without allocating anything.

    Args:
      config: The architecture.
      naming: The naming of the tensors, "llada" or "llama".

    Raises:
      UserError: If models with this naming have no such architecture.
    """
    if naming == "llada" and naming_of(config) != naming:
        more = next(name for name in OWN if getattr(config, name))
        raise UserError(f"naming=llada: LLaDA has no models with config.model.{more}: choose llama")
    with mesh.without_devices():
        params = split(abstract_model(config, ComputeConfig()))[1]
    names, blocks = NAMINGS[naming], params.pop("blocks")
    inner = {name: _published_shape(name, target.shape[1:]) for name, target in blocks.items()}
    layers = [
        PublishedTensor(names[name].format(i), name, i, inner[name])
        for i in range(config.layers)
        for name in names
        if name in inner
    ]
    outer = {
        name: PublishedTensor(names[name], name, None, _published_shape(name, target.shape))
        for name, target in params.items()
    }
    return [outer.pop("embedding"), *layers, *(outer[name] for name in names if name in outer)]


def expected_tensors(config: ModelConfig, naming: str = "llada") -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in a published folder of this architecture, by name.

    This makes it possible to plan a load without having the weights.
    """
    return {tensor.name: tensor.shape for tensor in published_tensors(config, naming)}


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the published shape of one layer's parameter, which is (outputs, inputs) for a matrix."""
    if name in ("q_proj", "k_proj", "v_proj"):
        width, heads, head_width = shape
        return heads * head_width, width
    if name == "attn_out":
        heads, head_width, width = shape
        return width, heads * head_width
    if name in BIASES:
        heads, head_width = shape
        return (heads * head_width,)
    return shape if name == "embedding" or len(shape) == 1 else shape[::-1]
