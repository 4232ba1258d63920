"""What the config.json of Llama, Qwen2 and Qwen3 says beyond sizes: whether tokens attend causally, biases, scaling.

Their folders have Llama's names of the tensors. A folder with a mask_token_id holds a masked diffusion model, whatever
its family; without one, the name of its class says that it is an autoregressive model.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from llada_jax.config import ModelConfig, UserError
from llada_jax.text.json_files import short


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family have in common."""

    name: str  # model_type in config.json
    causal_class: str  # the class of its autoregressive models, as in the field architectures
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    )
}
_CLASSES = {family.causal_class: family for family in FAMILIES.values()}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What config.json says beyond sizes and ids about the models of these families.
OWN = ("causal", "qkv_bias", "qk_norm", "head_size", "rope_scaling")


def family_of(published: Mapping[str, Any], source: str) -> tuple[Family | None, bool]:
    """Returns the family of a model, None if it is none of these, and whether the model attends causally.

    Raises:
      UserError: If the model is causal and of another family, or if it attends to a part of the tokens only.
    """
    classes = published.get("architectures") or []
    named = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    known = next((_CLASSES[c] for c in named if c in _CLASSES), None)
    causal = any(c.endswith("ForCausalLM") for c in named) and published.get("mask_token_id") is None
    if causal and known is None:
        raise UserError(
            f"{source}: architectures={short(classes)} is a causal model of a family that is not supported, only "
            f"{', '.join(_CLASSES)}; if this is a masked diffusion model, set mask_token_id"
        )
    layers = published.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise UserError(f'{source}: layer_types={short(layers)} is not supported, only "full_attention"')
    kind = published.get("model_type")
    return known or (FAMILIES.get(kind) if isinstance(kind, str) else None), causal


def ignored_fields(published: Mapping[str, Any], family: Family | None) -> set[str]:
    """Returns the names of fields that change nothing here, although their values would change other models."""
    windows = published.get("use_sliding_window")
    never = windows is False or (windows is None and family is not None and family.name.startswith("qwen"))
    return {"sliding_window"} if never else set()


def with_rope(published: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], tuple[float, ...]]:
    """Returns the fields with rope_theta at the top level, and the scaling of RoPE as config.model.rope_scaling.

    Newer folders keep both in rope_parameters; in older ones, rope_scaling has the scaling.

    Raises:
      UserError: If the scaling is another one than that of Llama 3, or if the two fields contradict each other.
    """
    rope = published.get("rope_parameters")
    scaling = _scaling(published.get("rope_scaling"), "rope_scaling", source)
    if rope is None:
        return published, scaling
    more = _scaling(rope, "rope_parameters", source)
    if scaling and more != scaling:
        raise UserError(f"{source}: rope_scaling={short(published['rope_scaling'])} contradicts rope_parameters")
    inner, outer = rope.get("rope_theta"), published.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise UserError(f"{source}: rope_theta={short(outer)} contradicts {short(inner)} in rope_parameters")
    return {**published, "rope_theta": inner if outer is None else outer}, more


def _scaling(fields: Any, name: str, source: str) -> tuple[float, ...]:
    if fields is None:
        return ()
    refused = UserError(f"{source}: {name}={short(fields)} is not supported, only plain RoPE and Llama 3's scaling")
    if not isinstance(fields, dict):
        raise refused
    kinds = {fields[key] for key in ("rope_type", "type") if isinstance(fields.get(key), str)} or {"default"}
    given = {key: value for key, value in fields.items() if value is not None and key not in ("rope_type", "type")}
    given.pop("rope_theta", None)
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if kinds == {"default"} and not given:
        return ()
    if kinds != {"llama3"} or given.keys() != set(_SCALING):
        raise refused
    values = tuple(given[key] for key in _SCALING)
    # Compare instead of converting to a float: an integer may be larger than any float.
    numbers = (isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not all(numbers) or not all(0 < value <= sys.float_info.max for value in values):
        raise refused
    factor, low, high, _ = values
    if factor < 1 or low >= high:
        raise refused
    return tuple(map(float, values))


def fields_of(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of config.json, with Llama's names, that say what `OWN` lists.

    A class is named for a causal model only: one that expects these names would attend causally.

    Raises:
      UserError: If no family has such models.
    """
    parts = (model.qkv_bias, model.qk_norm)
    family = next((each for each in FAMILIES.values() if (each.qkv_bias, each.qk_norm) == parts), None)
    if family is None:
        raise UserError("no published family has both config.model.qkv_bias and config.model.qk_norm: leave out one")
    fields: dict[str, Any] = {"model_type": family.name, "rope_scaling": None}
    if model.head_size or model.causal:
        fields["head_dim"] = model.head_width
    if model.rope_scaling:
        values = (*model.rope_scaling[:-1], int(model.rope_scaling[-1]))
        fields["rope_scaling"] = {"rope_type": "llama3", **dict(zip(_SCALING, values, strict=True))}
    if model.causal:
        # A reader would take a model with a mask_token_id for a masked diffusion model.
        fields |= {"architectures": [family.causal_class], "mask_token_id": None, "use_cache": True}
    return fields
