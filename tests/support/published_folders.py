"""Helpers that read published folders, change them, and rename their tensors."""

import json
import math

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from llada_jax.formats import huggingface, published, tensor_files, tensor_names


def read(directory, mesh, dtype=jnp.float32):
    with jax.set_mesh(mesh):
        return huggingface.load_model(directory, dtype)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def spoil(folder):
    """Writes NaN into one weight of a model."""

    def change(tensors):
        tensors[next(name for name in tensors if "ff_out" in name or "down_proj" in name)][0, 0] = math.nan

    change_tensors(folder, change)


def split_shards(folder, shards=3):
    """Splits the model of a folder into several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / tensor_files.INDEX).write_text(json.dumps(index))
    return weight_map


def tensors_of(folder):
    """Returns all tensors of a folder, as the safetensors library reads them."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rename_to_llama(config, tensors):
    """Returns the fields and tensors of the same model under Llama's names."""
    pairs = [(tensor_names.LLADA[name], tensor_names.LLAMA[name]) for name in tensor_names.LLADA]
    names = {old.format(i): new.format(i) for old, new in pairs for i in range(config["n_layers"])}
    fields = {new: config[old] for old, new in (pair for pair in published.FIELDS.values() if len(pair) == 2)}
    fields |= {name: config[name] for name in ("rms_norm_eps", "rope_theta", "mask_token_id", "torch_dtype")}
    fields |= {"hidden_act": "silu", "eos_token_id": [config["eos_token_id"], 501]}
    return fields, {names[name]: tensor for name, tensor in tensors.items()}
