import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llada_jax import huggingface
from llada_jax.config import UserError

PARITY = Path(__file__).parent / "parity"
Q_PROJ = "model.transformer.blocks.1.q_proj.weight"


def read(directory, mesh, dtype=jnp.float32):
    with jax.set_mesh(mesh):
        return huggingface.load_model(directory, dtype)


@pytest.fixture
def folder(tmp_path):
    """A copy of the GQA model, to be changed."""
    shutil.copytree(PARITY / "gqa", tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split_shards(folder, shards=3):
    """The same model as several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    return weight_map


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))


def test_parameters_lie_where_the_mesh_says(make_mesh, folder):
    whole, sharded = read(folder, make_mesh()), read(folder, make_mesh(2, 2, 2))
    same(whole, sharded)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        fresh = huggingface.abstract_model(whole.config, whole.compute)
    wanted = [leaf.sharding.spec for leaf in jax.tree.leaves(fresh)]
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(sharded)] == wanted
    tensor_HK_D = load_file(folder / "model.safetensors")[Q_PROJ]
    np.testing.assert_array_equal(whole.blocks.q_proj[1], tensor_HK_D.T.reshape(64, 4, 16))


def test_shards_with_an_index_are_the_same(make_mesh, folder):
    split_shards(folder)
    same(read(folder, make_mesh()), read(PARITY / "gqa", make_mesh()))


def test_llamas_names_are_the_same(make_mesh, folder):
    pairs = [(huggingface.LLADA[name], huggingface.LLAMA[name]) for name in huggingface.LLADA]
    pairs = {old.format(i): new.format(i) for old, new in pairs for i in range(3)}

    def rename(tensors):
        for old in list(tensors):
            tensors[pairs[old]] = tensors.pop(old)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    change_tensors(folder, rename)
    llama = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    llama |= {"intermediate_size": 176, "vocab_size": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    llama |= {"hidden_act": "silu", "eos_token_id": [500, 501], "mask_token_id": 511}
    (folder / "config.json").write_text(json.dumps(llama))
    model = read(folder, make_mesh())
    assert model.config == read(PARITY / "gqa", make_mesh()).config
    same(model, read(PARITY / "gqa", make_mesh()))


def test_tied_embeddings(make_mesh, folder):
    head, embedding = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    change_tensors(folder, lambda tensors: tensors.update({head: tensors[embedding]}))
    untied = read(folder, make_mesh())
    change_tensors(folder, lambda tensors: tensors.pop(head))
    change_config(folder, weight_tying=True)
    tied = read(folder, make_mesh())
    assert tied.head is None
    tokens_BT = jnp.arange(40)[None]
    np.testing.assert_allclose(tied(tokens_BT), untied(tokens_BT), atol=1e-5)


def test_bfloat16_and_float32(make_mesh, folder):
    exact = read(folder, make_mesh())
    rounded = read(folder, make_mesh(), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
    same(rounded, jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact))

    def to_bfloat16(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    change_tensors(folder, to_bfloat16)
    same(read(folder, make_mesh(), jnp.bfloat16), rounded)
    widened = read(folder, make_mesh())
    assert widened.embedding[...].dtype == jnp.float32
    same(widened, jax.tree.map(lambda p: p.astype(jnp.float32), rounded))


def test_the_published_8b_config_and_index_are_accounted_for():
    """Every tensor that LLaDA-8B's index names would be read, and no other; the count is the paper's."""
    names = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    published = {
        "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
        "block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_size": 126464,
        "eos_token_id": 126081, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
        "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336, "mlp_hidden_size": 12288,
        "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "rms_norm_eps": 1e-05,
        "rope": True, "rope_theta": 500000.0, "scale_logits": False, "vocab_size": 126464, "weight_tying": False,
    }  # fmt: skip
    config = huggingface.model_config(published)
    assert (config.mask_id, config.eos_id, config.token_count, config.vocab_size) == (126336, 126081, None, 126464)
    assert {huggingface.LLADA[name] for name in names} == {f"model.transformer.blocks.{{}}.{n}.weight" for n in names}
    assert huggingface.model_config(published | {"vocab_size": 126349}).token_count == 126349
    assert huggingface.model_config(published | {"n_kv_heads": None, "multi_query_attention": True}).kv_heads == 1
    assert huggingface.model_config({k: v for k, v in published.items() if k != "n_kv_heads"}).kv_heads == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, "alibi=true is not supported, only false"),
        ({"activation_type": "swiglu"}, 'activation_type="swiglu"'),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"block_type": "sequential"}, "block_type"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"d_model": ...}, "d_model or hidden_size is missing"),
        ({"n_layers": "3"}, "n_layers or num_hidden_layers must be an integer"),
        ({"n_kv_heads": 3}, "4 heads cannot share 3"),
        ({"n_layers": 4}, "blocks.3.attn_norm.weight is missing"),
        ({"n_layers": 2}, "blocks.2.* is not part of the model"),
        ({"mlp_hidden_size": 180}, r"ff_out.weight has shape \(64, 176\), expected \(64, 180\)"),
        ({"weight_tying": True}, "model.transformer.ff_out.weight is not part"),
    ],
)
def test_a_config_that_does_not_fit_is_named(make_mesh, folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=words):
        read(folder, make_mesh())


def test_damaged_folders_are_named(make_mesh, folder):
    def refused(words):
        with pytest.raises(UserError, match=words):
            read(folder, make_mesh())

    weight_map = split_shards(folder)
    shard = folder / weight_map[Q_PROJ]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(f"{shard.name} is truncated")
    shard.unlink()
    refused(f"{shard.name} is missing")
    shard.write_bytes(content)
    index = folder / huggingface.INDEX
    index.write_text(json.dumps({"weight_map": weight_map | {"model.more": shard.name}}))
    refused("tensor model.more is missing")
    index.unlink()
    refused("3 .safetensors files, expected one")
    index.write_text("{")
    refused("is not JSON")


def test_a_mesh_that_does_not_divide_is_named(make_mesh, folder):
    with pytest.raises(UserError, match="kv_heads=2 is not divisible by config.mesh.tensor=4"):
        read(folder, make_mesh(1, 1, 4))
