"""Reads and writes the config.json of published models, whose fields describe the architecture and the special ids.

`tensor_names.py` describes their tensors.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_jax.config import ModelConfig, UserError
from llada_jax.formats import families
from llada_jax.text.json_files import read_object, short
from llada_jax.text.named_ids import END_IDS, is_id, listed, others

CONFIG = "config.json"

# Fields of ModelConfig and their names in config.json: first LLaDA's own name, then the usual name in other models.
FIELDS = {
    "layers": ("n_layers", "num_hidden_layers"),
    "width": ("d_model", "hidden_size"),
    "heads": ("n_heads", "num_attention_heads"),
    "kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "feed_forward": ("mlp_hidden_size", "intermediate_size"),
    "vocab_size": ("embedding_size", "vocab_size"),
    "tied_embeddings": ("weight_tying", "tie_word_embeddings"),
    "rope_theta": ("rope_theta",),
    "norm_eps": ("rms_norm_eps",),
    "mask_id": ("mask_token_id",),
    "bos_id": ("bos_token_id",),
    "eos_id": ("eos_token_id",),
}
SIZES = ("layers", "width", "heads", "feed_forward", "vocab_size")
REQUIRED = (*SIZES, "rope_theta", "norm_eps")  # no default is safe: model families differ in what a missing field means

# Fields that change what a model computes, and the values for which it computes the same as the model of this package.
# A field may be missing.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "hidden_act": ("silu",),
    "alibi": (False,),
    "attention_bias": (False, None),
    "attention_layer_norm": (False,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "is_causal": (False, None),
    "is_decoder": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "mlp_bias": (False, None),
    "multi_query_attention": (False, True, None),
    "n_routed_experts": (None, 0),
    "norm_after": (False, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (1, None),
    "qk_norm": (False, None),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (1, None),
    "rope": (True,),
    "rope_interleaved": (False, None),
    "rotary_pct": (1, None),
    "scale_depth": (None,),
    "scale_emb": (1, None),
    "scale_logits": (False,),
    "sliding_window": (None,),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
}
# rope_full_precision is not listed, because RoPE is always computed in fp32 here. That is what rope_full_precision=true
# asks for, and more precise than what a model without the field asks for.


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises UserError if the file is missing or holds anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return read_object(content, str(path))


def as_json(fields: Mapping[str, Any]) -> bytes:
    """Returns the content of a JSON file with these fields, in the form in which published folders have it."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def model_config(published: Mapping[str, Any], source: str = CONFIG) -> ModelConfig:
    """Returns the architecture that a published config.json describes.

    Args:
      published: The fields of config.json. Their types are checked here.
      source: The name of the config.json in error messages.

    Raises:
      UserError: If a field is missing, has a wrong type, or has a value that this package does not support.
    """
    published, rope_scaling = families.with_rope(published, source)
    family, causal = families.family_of(published, source)
    ignored = families.ignored_fields(published, family)
    for name, values in SUPPORTED.items():
        if name in published and published[name] not in values and name not in ignored:
            wanted = " or ".join(json.dumps(value) for value in values)
            raise UserError(f"{source}: {name}={short(published[name])} is not supported, only {wanted}")
    found: dict[str, Any] = {"causal": causal, "rope_scaling": rope_scaling}
    if family is not None:
        found |= {"qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
    for field, names in FIELDS.items():
        values = {name: published[name] for name in names if published.get(name) is not None}
        if values:
            found[field] = next(iter(values.values()))
        if field != "vocab_size" and len(values) > 1 and any(value != found[field] for value in values.values()):
            named = " and ".join(f"{name}={short(value)}" for name, value in values.items())
            raise UserError(f"{source}: {named} contradict each other")
    if isinstance(found.get("eos_id"), list) and found["eos_id"]:
        found["eos_id"] = found["eos_id"][0]
    found["end_ids"] = tuple(i for name in END_IDS for i in listed(published.get(name)))
    if "feed_forward" not in found and published.get("mlp_ratio") is not None and _is_int(found.get("width")):
        if not _is_int(published["mlp_ratio"]):
            raise UserError(f"{source}: mlp_ratio must be an integer, not {short(published['mlp_ratio'])}")
        found["feed_forward"] = published["mlp_ratio"] * found["width"]
    for field in REQUIRED:
        if field not in found:
            raise UserError(f"{source}: {' or '.join(FIELDS[field])} is missing")
    if published.get("multi_query_attention") and found.setdefault("kv_heads", 1) != 1:
        raise UserError(f"{source}: multi_query_attention allows one key/value head, not {short(found['kv_heads'])}")
    found.setdefault("kv_heads", found["heads"])
    found.setdefault("tied_embeddings", False)
    _check_values(found, source)
    found["end_ids"] = others(found["end_ids"], (found.get("eos_id"),))
    config = ModelConfig(**found)
    if config.heads % config.kv_heads:
        raise UserError(f"{source}: {config.heads} heads are not divisible by {config.kv_heads} key/value heads")
    _take_head_width(config, published.get("head_dim"), source)
    config.token_count = _token_count(published, config, source)
    return config


def _take_head_width(config: ModelConfig, stated: Any, source: str) -> None:
    """Sets the width of the heads, in place, if it is another than their share of the model's."""
    if stated is None:
        if config.width % (2 * config.heads):
            raise UserError(
                f"{source}: width {config.width} cannot be split into {config.heads} heads of an even width"
            )
        return
    if not _is_int(stated) or not 0 < stated < 2**16 or stated % 2:
        raise UserError(f"{source}: head_dim must be an even number below {2**16}, not {short(stated)}")
    if stated * config.heads != config.width:
        config.head_size = stated


def _token_count(published: Mapping[str, Any], config: ModelConfig, source: str) -> int | None:
    """Returns the number of tokens if the embedding has more rows than tokens, and None otherwise."""
    name = "token_count" if published.get("token_count") is not None else "vocab_size"
    tokens = published.get(name)
    if tokens is None:
        return None
    if not _is_int(tokens):
        raise UserError(f"{source}: {name} must be an integer, not {short(tokens)}")
    if not 0 < tokens <= config.vocab_size:
        raise UserError(f"{source}: {name}={short(tokens)} does not fit an embedding of {config.vocab_size} rows")
    # The sampler never chooses MASK, so MASK may be one of the rows beyond the tokens.
    if (last := max((config.eos_id or 0, *config.end_ids))) >= tokens:
        raise UserError(f"{source}: eos_token_id={last} must be below {name}={tokens}")
    return None if tokens == config.vocab_size else tokens


def _check_values(found: Mapping[str, Any], source: str) -> None:
    def require(condition: bool, field: str, what: str) -> None:
        if not condition:
            raise UserError(f"{source}: {' or '.join(FIELDS[field])} must be {what}, not {short(found[field])}")

    for field in (*SIZES, "kv_heads"):
        limit = 2**31 if field != "layers" else 2**16
        require(_is_int(found[field]), field, "an integer")
        require(0 < found[field] < limit, field, f"positive and below {limit}")
    for field in ("rope_theta", "norm_eps"):
        value = found[field]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compare instead of converting to a float: an integer may be larger than any float.
        require(number and 0 < value <= sys.float_info.max, field, "a positive number")
    require(isinstance(found["tied_embeddings"], bool), "tied_embeddings", "true or false")
    for field in ("mask_id", "bos_id", "eos_id"):
        if field in found:
            require(_is_int(found[field]), field, "an integer")
            require(0 <= found[field] < found["vocab_size"], field, f"below the vocabulary of {found['vocab_size']}")
    ends = " or ".join(END_IDS)
    for i in found["end_ids"]:
        if not is_id(i) or i >= found["vocab_size"]:
            raise UserError(
                f"{source}: {ends} must be ids below the vocabulary of {found['vocab_size']}, not {short(i)}"
            )
        if i == found.get("mask_id"):
            raise UserError(f"{source}: {i} is mask_token_id, but also an end of a text ({ends}): correct one of them")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def published_config(
    model: ModelConfig, naming: str = "llada", dtype: str = "float32", sequence_length: int = 4096
) -> dict[str, Any]:
    """Returns all fields of config.json for a model that has no published config.json.

    With the naming "llada" these are all the fields that the published LLaDA-8B has. auto_map points at the code that
    was published with LLaDA-8B, which transformers fetches from the Hugging Face Hub (trust_remote_code). With the
    naming "llama" these are the fields that belong to Llama's names of the tensors. Only a causal model then has the
    field architectures, because a class that expects these names attends causally.

    Args:
      model: The architecture.
      naming: The naming of the tensors, "llada" or "llama".
      dtype: The dtype of the tensors.
      sequence_length: The longest sequence length that the model was trained on, in tokens.

    Raises:
      UserError: If models with these names have no such architecture.
    """
    fields = {
        names[-1] if naming == "llama" else names[0]: getattr(model, field) for field, names in FIELDS.items()
    } | {"torch_dtype": dtype, "use_cache": False}
    if model.end_ids:
        fields["eos_token_id"] = [i for i in (model.eos_id, *model.end_ids) if i is not None]
    if naming == "llama":
        fields |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        # Llama's vocab_size is the number of rows of the embedding, so the number of tokens needs its own field.
        tokens = {} if model.token_count is None else {"token_count": model.token_count}
        return fields | tokens | {"max_position_embeddings": sequence_length} | families.fields_of(model)
    code = "GSAI-ML/LLaDA-8B-Base--"
    return fields | {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": f"{code}configuration_llada.LLaDAConfig",
            "AutoModel": f"{code}modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": f"{code}modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": sequence_length,
        "mlp_ratio": 4,  # unused if there is a mlp_hidden_size
        "model_type": "llada",
        "multi_query_attention": None,
        "pad_token_id": model.eos_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "transformers_version": "4.46.3",  # the version that the published code was written for
        "vocab_size": model.token_count or model.vocab_size,
    }


def own_names(naming: str) -> set[str]:
    """Returns the names of the fields that only a config.json for this naming has. vocab_size is in both namings."""
    place = 1 if naming == "llama" else 0
    return {names[place] for names in FIELDS.values() if len(names) == 2} - {"vocab_size"}


def sequence_length(published: Mapping[str, Any]) -> int | None:
    """Returns the longest sequence length, in tokens, that config.json states for its model, or None if it has none."""
    found = (published.get(name) for name in ("max_sequence_length", "max_position_embeddings"))
    return next((value for value in found if _is_int(value) and value > 0), None)
