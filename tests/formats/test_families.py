"""Tests that folders of Llama, Qwen2 and Qwen3 are read and written, with what transformers computes with them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from paths import PARITY, PARITY_AR
from published_folders import change_config, read, tensors_of

import llada_jax
from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.formats import families, huggingface, published
from llada_jax.formats.conversion import convert
from llada_jax.model.transformer import initialise

NAMES = ("llama", "qwen2", "qwen3")
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def family_folder(tmp_path):
    """Returns a function that makes a copy of one of the causal models, with changed fields in its config.json."""

    def make(name, **changes):
        shutil.copytree(PARITY_AR / name, tmp_path / name)
        change_config(tmp_path / name, **changes)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    cases = np.load(PARITY_AR / name / "cases.npz")
    for attention, wanted in ((None, "causal"), ("full", "full")):
        model, tokenizer = llada_jax.load(PARITY_AR / name, attention=attention)
        assert tokenizer is None and model.config.causal == (attention is None)
        logits_BTV = np.asarray(model(cases["tokens"].astype(np.int32)))
        np.testing.assert_allclose(logits_BTV, cases[wanted], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_folder_lie_where_the_mesh_says(make_mesh, name):
    whole, sharded = (read(PARITY_AR / name, make_mesh(*sizes)) for sizes in ((1, 1, 1), (2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(make_mesh, tmp_path, name):
    convert(PARITY_AR / name, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    model = read(PARITY_AR / name, make_mesh(1, 2, 2))
    huggingface.save_model(model, tmp_path / "new", naming="llama")
    wanted = tensors_of(PARITY_AR / name)
    for folder in ("back", "new"):
        written = tensors_of(tmp_path / folder)
        assert written.keys() == wanted.keys()
        assert all(written[each].tobytes() == wanted[each].tobytes() for each in wanted)
    fields = json.loads((PARITY_AR / name / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    same = ("architectures", "model_type", "num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling")
    assert all(new[each] == fields[each] for each in same) and new["mask_token_id"] is None
    assert huggingface.inspect(tmp_path / "new").config == model.config


def test_transformers_reads_what_is_written(make_mesh, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for kind in ({}, {"qkv_bias": True}, {"qk_norm": True, "head_size": 12}):
        scaling = () if kind else (8.0, 1.0, 4.0, 16.0)
        config = ModelConfig(2, 32, 4, 2, feed_forward=48, vocab_size=64, causal=True, rope_scaling=scaling, **kind)
        with jax.set_mesh(make_mesh()):
            model = initialise(config, ComputeConfig(dtype="float32", attention="cpu"), jax.random.key(1))
        folder = tmp_path / "-".join(["model", *kind])
        huggingface.save_model(model, folder, naming="llama")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__name__ == published.read_json(folder / "config.json")["architectures"][0]
        tokens_BT = np.random.default_rng(3).integers(0, 64, (2, 40)).astype(np.int32)
        with torch.no_grad():
            wanted = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
        np.testing.assert_allclose(np.asarray(model(tokens_BT)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"architectures": ["GemmaForCausalLM"]}, r"GemmaForCausalLM.* is a causal model of a family"),
        ("llama", {"sliding_window": 16}, "sliding_window=16 is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": LLAMA_3 | {"factor": "8"}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": LLAMA_3 | {"factor": 10**400}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": LLAMA_3 | {"attention_factor": 2.0}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling=.* is not supported"),
        ("llama", {"rope_scaling": LLAMA_3, "rope_parameters": {"rope_theta": 1e4}}, "contradicts rope_parameters"),
        ("llama", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("qwen3", {"num_experts": 8}, "num_experts=8 is not supported"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM.* is a causal model of a family"),
        ("qwen3", {"head_dim": 23}, "head_dim must be an even number"),
        ("qwen3", {"head_dim": 16}, r"q_proj.weight has shape \(96, 64\), expected \(64, 64\)"),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, "self_attn.k_proj.bias is not part of the model"),
        ("llama", {"architectures": ["Qwen3ForCausalLM"]}, r"self_attn.\w_norm.weight is missing"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(family_folder, name, changes, words):
    with pytest.raises(UserError, match=words):
        huggingface.inspect(family_folder(name, **changes))


def test_what_changes_nothing_is_accepted(family_folder):
    """Qwen2.5 states a window that it does not use; newer folders keep the scaling elsewhere."""
    windows = family_folder("qwen2", sliding_window=131072, use_sliding_window=False, max_window_layers=70)
    assert huggingface.inspect(windows).config == huggingface.inspect(PARITY_AR / "qwen2").config
    scaled = family_folder("llama", rope_scaling=LLAMA_3)
    config = huggingface.inspect(scaled).config
    assert config.rope_scaling == (8.0, 1.0, 4.0, 64.0)
    change_config(scaled, rope_scaling=..., rope_theta=..., rope_parameters=LLAMA_3 | {"rope_theta": 10_000.0})
    assert huggingface.inspect(scaled).config == config
    assert published.published_config(config, "llama")["rope_scaling"] == LLAMA_3


def test_a_model_with_mask_is_no_causal_model(family_folder):
    config = huggingface.inspect(family_folder("qwen2", mask_token_id=319)).config
    assert (config.causal, config.qkv_bias, config.mask_id) == (False, True, 319)
    fields = published.published_config(config, "llama")
    assert fields["model_type"] == "qwen2" and "architectures" not in fields and fields["mask_token_id"] == 319


def test_what_no_folder_can_hold_is_refused(make_mesh, tmp_path):
    model = read(PARITY_AR / "llama", make_mesh())
    with pytest.raises(UserError, match="naming=llada: LLaDA has no models with config.model.causal: choose llama"):
        huggingface.save_model(model, tmp_path / "out", naming="llada")
    with pytest.raises(UserError, match="naming=llada"):
        convert(PARITY_AR / "llama", tmp_path / "out", "huggingface", naming="llada")
    original = json.loads((PARITY_AR / "llama" / "config.json").read_text())
    model.config = dataclasses.replace(model.config, causal=False)
    with pytest.raises(UserError, match="the model has causal=False, but the original config.json says True"):
        huggingface.save_model(model, tmp_path / "out", naming="llama", original=original)
    with pytest.raises(UserError, match="no published family has both"):
        families.fields_of(ModelConfig(qkv_bias=True, qk_norm=True))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="attention=causal: choose full"):
        llada_jax.load(PARITY / "gqa", attention="causal")
