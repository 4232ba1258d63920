"""Tests what is read from and written to a published config.json, and the expected names and shapes of tensors."""

import json
import math
import os
from pathlib import Path

import pytest
from paths import LLADA_8B
from published_folders import change_config, read

from llada_jax.config import UserError
from llada_jax.formats import huggingface, published, tensor_files, tensor_names

# A folder with config.json and the index of the published LLaDA-8B. Its weights are not needed.
FORMAT = Path(os.environ.get("LLADA_8B_METADATA", "nowhere"))


# The metadata of the published LLaDA-8B: its config.json, and the names of the tensors in its index as patterns.
LLADA_8B_FIELDS = json.loads((LLADA_8B / "config.json").read_text())
IN_A_LAYER = "attn_norm attn_out ff_norm ff_out ff_proj k_proj q_proj up_proj v_proj".split()
OUTSIDE = [f"model.transformer.{name}.weight" for name in ("ff_out", "ln_f", "wte")]
TOTAL_SIZE = 16031162368


def test_the_load_of_the_published_8b_is_planned():
    """A load reads exactly the tensors in the index of LLaDA-8B, and their shapes add up to the size in the index."""
    config = published.model_config(LLADA_8B_FIELDS)
    assert (config.mask_id, config.eos_id, config.token_count, config.vocab_size) == (126336, 126081, None, 126464)
    expected = tensor_names.expected_tensors(config)
    names = [f"model.transformer.blocks.{i}.{name}.weight" for i in range(32) for name in IN_A_LAYER]
    assert sorted(expected) == sorted(names + OUTSIDE) and len(expected) == 291
    assert sum(2 * math.prod(shape) for shape in expected.values()) == TOTAL_SIZE
    assert expected["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288)
    llama = tensor_names.expected_tensors(config, "llama")
    assert sorted(llama.values()) == sorted(expected.values()) and llama["lm_head.weight"] == (126464, 4096)
    assert published.model_config(LLADA_8B_FIELDS | {"vocab_size": 126349}).token_count == 126349
    assert published.model_config(LLADA_8B_FIELDS | {"n_kv_heads": None, "multi_query_attention": True}).kv_heads == 1
    assert published.model_config({k: v for k, v in LLADA_8B_FIELDS.items() if k != "n_kv_heads"}).kv_heads == 32
    assert set(LLADA_8B_FIELDS) <= set(published.published_config(config))


@pytest.mark.skipif(
    not FORMAT.is_dir(), reason="LLADA_8B_METADATA does not name a folder with the metadata of LLaDA-8B"
)
def test_the_published_8b_itself():
    assert json.loads((FORMAT / "config.json").read_text()) == LLADA_8B_FIELDS
    index = json.loads((FORMAT / tensor_files.INDEX).read_text())
    assert set(tensor_names.expected_tensors(published.model_config(LLADA_8B_FIELDS))) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == TOTAL_SIZE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, "alibi=true is not supported, only false"),
        ({"activation_type": "swiglu"}, 'activation_type="swiglu"'),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"block_type": "sequential"}, "block_type"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"head_dim": 8}, "LLaDA has no models with config.model.head_size"),
        ({"head_dim": 7}, "head_dim must be an even number below 65536, not 7"),
        ({"d_model": ...}, "d_model or hidden_size is missing"),
        ({"n_layers": "3"}, "n_layers or num_hidden_layers must be an integer"),
        ({"n_layers": True}, "n_layers or num_hidden_layers must be an integer, not true"),
        ({"n_layers": 10**9}, "n_layers or num_hidden_layers must be positive and below"),
        ({"d_model": [64]}, r"d_model or hidden_size must be an integer, not \[64\]"),
        ({"d_model": None}, "d_model or hidden_size is missing"),
        ({"d_model": 0}, "d_model or hidden_size must be positive"),
        ({"n_kv_heads": -1}, "n_kv_heads or num_key_value_heads must be positive"),
        ({"mlp_hidden_size": None, "mlp_ratio": "4"}, "mlp_ratio must be an integer"),
        ({"vocab_size": "512"}, "vocab_size must be an integer"),
        ({"weight_tying": "no"}, 'weight_tying or tie_word_embeddings must be true or false, not "no"'),
        ({"rope_theta": "1e4"}, 'rope_theta must be a positive number, not "1e4"'),
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters=.* is not supported"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters=.* is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters=.* is not supported"),
        ({"rope_parameters": {"rope_theta": 1e3}}, "rope_theta=500000.0 contradicts 1000.0 in rope_parameters"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, not 1000.*\\.\\.\\."),
        ({"mask_token_id": 10**400}, "mask_token_id must be below the vocabulary"),
        ({"num_attention_heads": 8}, "n_heads=4 and num_attention_heads=8 contradict"),
        ({"tie_word_embeddings": True}, "weight_tying=false and tie_word_embeddings=true contradict"),
        ({"multi_query_attention": True}, "multi_query_attention allows one key/value head, not 2"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2 is not supported, only 1 or null"),
        ({"logits_scaling": 8}, "logits_scaling=8 is not supported"),
        ({"embedding_multiplier": 12}, "embedding_multiplier=12 is not supported"),
        ({"attention_multiplier": 0.01}, "attention_multiplier=0.01 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"is_causal": True}, "is_causal=true is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        (
            {"architectures": ["GemmaForCausalLM"], "mask_token_id": ...},
            "architectures=.* is a causal model of a family",
        ),
        ({"vocab_size": 513}, "vocab_size=513 does not fit an embedding of 512 rows"),
        ({"vocab_size": 500}, "eos_token_id=500 must be below vocab_size=500"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"mask_token_id": {}}, "mask_token_id must be an integer"),
        ({"mask_token_id": 512}, "mask_token_id must be below the vocabulary of 512, not 512"),
        ({"eos_token_id": []}, r"eos_token_id must be an integer, not \[\]"),
        ({"quantization_config": {"bits": 4, "note": "x" * 200}}, "quantization_config=.*\\.\\.\\. is not supported"),
        ({"num_experts": 64}, "num_experts=64 is not supported"),
        ({"n_kv_heads": 3}, "4 heads are not divisible by 3"),
        ({"n_layers": 4}, "blocks.3.attn_norm.weight is missing"),
        ({"n_layers": 2}, "blocks.2.* is not part of the model"),
        ({"mlp_hidden_size": 180}, r"ff_proj.weight has shape \(176, 64\), expected \(180, 64\)"),
        ({"weight_tying": True}, "model.transformer.ff_out.weight is not part"),
    ],
)
def test_a_config_that_does_not_fit_is_named_before_a_tensor_is_read(make_mesh, folder, monkeypatch, changes, words):
    change_config(folder, **changes)
    monkeypatch.setattr(huggingface, "_read_parameter", lambda *_: pytest.fail("a tensor was read before the check"))
    with pytest.raises(UserError, match=words):
        read(folder, make_mesh())


def test_what_changes_nothing_is_accepted(folder):
    config = huggingface.inspect(folder).config
    neutral = {"residual_multiplier": 1.0, "logits_scaling": 1, "is_causal": False, "num_attention_heads": 4}
    neutral |= {"layer_types": ["full_attention"] * 3, "rope_full_precision": False, "tie_word_embeddings": False}
    neutral |= {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "default", "factor": None}}
    change_config(folder, **neutral)
    assert huggingface.inspect(folder).config == config
    change_config(folder, vocab_size=508)  # MASK (511) is never chosen, so it may be beyond vocab_size
    assert huggingface.inspect(folder).config.token_count == 508


def test_newer_folders_keep_ropes_base_elsewhere(folder):
    change_config(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    assert huggingface.inspect(folder).config.rope_theta == 1000.0
    change_config(folder, rope_theta=1000.0)
    assert huggingface.inspect(folder).config.rope_theta == 1000.0
