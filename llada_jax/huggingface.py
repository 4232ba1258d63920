"""Published LLaDA folders: config.json and safetensors, read tensor by tensor into sharded arrays.

A layer's tensor goes from the (memory-mapped) file to its devices and into the stacked parameter
there, in place, before the next one is read: the host never holds more than one of them.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from llada_jax import mesh
from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.model import Transformer, abstract_model, merge, split

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

# Our fields and what config.json calls them: LLaDA's own name, then the one common to other models.
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
REQUIRED = ("layers", "width", "heads", "feed_forward", "vocab_size")

# Fields that change the mathematics, and the values with which it is ours. A missing field is fine.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "hidden_act": ("silu",),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "rope": (True,),
    "rope_scaling": (None,),
    "scale_logits": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
}

# Names of the tensors in the two namings, by the names of our parameters.
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
}
DTYPES = ("F32", "BF16", "F16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError if the file is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def model_config(published: Mapping[str, Any], source: str = CONFIG) -> ModelConfig:
    """The architecture that a published config.json describes.

    Raises:
      UserError: a field is missing, or has a value that this model does not compute.
    """
    for name, values in SUPPORTED.items():
        if name in published and published[name] not in values:
            wanted = " or ".join(json.dumps(value) for value in values)
            raise UserError(f"{source}: {name}={json.dumps(published[name])} is not supported, only {wanted}")
    found = {}
    for field, names in FIELDS.items():
        values = [published[name] for name in names if published.get(name) is not None]
        if values:
            found[field] = values[0]
    if isinstance(found.get("eos_id"), list):
        found["eos_id"] = found["eos_id"][0]
    if "feed_forward" not in found and "mlp_ratio" in published and "width" in found:
        found["feed_forward"] = published["mlp_ratio"] * found["width"]
    for field in REQUIRED:
        if field not in found:
            raise UserError(f"{source}: {' or '.join(FIELDS[field])} is missing")
    for field in (*REQUIRED, "kv_heads", "mask_id", "bos_id", "eos_id"):
        if not isinstance(found.get(field, 1), int):
            raise UserError(f"{source}: {' or '.join(FIELDS[field])} must be an integer, not {found[field]!r}")
    if published.get("multi_query_attention"):
        found.setdefault("kv_heads", 1)
    found.setdefault("kv_heads", found["heads"])
    found.setdefault("tied_embeddings", False)
    config = ModelConfig(**found)
    if min(getattr(config, field) for field in (*REQUIRED, "kv_heads")) < 1 or config.heads % config.kv_heads:
        raise UserError(f"{source}: {config.heads} heads cannot share {config.kv_heads} key/value heads")
    if config.width % (2 * config.heads):
        raise UserError(f"{source}: width {config.width} does not make {config.heads} heads of even width")
    if published.get("head_dim") not in (None, config.head_width):
        raise UserError(f"{source}: head_dim={published['head_dim']} is not supported, only {config.head_width}")
    # Rows of the embedding beyond the vocabulary only fill it up.
    if 0 < published.get("vocab_size", 0) < config.vocab_size:
        config.token_count = published["vocab_size"]
    return config


def published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (outputs, inputs) in which one layer's parameter is published."""
    if name in ("q_proj", "k_proj", "v_proj"):
        width, heads, head_width = shape
        return heads * head_width, width
    if name == "attn_out":
        heads, head_width, width = shape
        return width, heads * head_width
    return shape if name == "embedding" or len(shape) == 1 else shape[::-1]


def read_part(tensor: Any, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of one layer's parameter of this shape, out of its published tensor.

    Args:
      tensor: anything that can be cut like the published array; only what is needed is read.
      name: the parameter's name in mesh.PARAMETERS.
      shape: our shape, without L.
      index: one slice for each of its dimensions.
    """
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    part_shape = tuple(part.stop - part.start for part in index)
    if name == "embedding" or len(shape) == 1:
        return tensor[index]
    # (outputs, inputs) is published, inputs first is ours; heads and their width are one dimension there.
    if name in ("q_proj", "k_proj", "v_proj"):
        _check_whole(index[2], shape[2])
        outputs, inputs = slice(index[1].start * shape[2], index[1].stop * shape[2]), index[0]
    elif name == "attn_out":
        _check_whole(index[1], shape[1])
        outputs, inputs = index[2], slice(index[0].start * shape[1], index[0].stop * shape[1])
    else:
        outputs, inputs = index[1], index[0]
    return tensor[outputs, inputs].T.reshape(part_shape)


def _check_whole(part: slice, size: int) -> None:
    assert (part.start, part.stop) == (0, size), "heads are split over devices, their width is not"


class Folder:
    """The safetensors of a published folder, opened and listed; tensors are read when they are cut."""

    def __init__(self, directory: Path, files: contextlib.ExitStack):
        """Opens all shards in `files`. UserError for missing, truncated or foreign ones."""
        self.directory = directory
        index = directory / INDEX
        weight_map = read_json(index).get("weight_map") if index.exists() else None
        if index.exists() and not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map")
        if weight_map is None:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
            if len(names) != 1:
                raise UserError(f"{directory}: {len(names)} .safetensors files, expected one, or {INDEX}")
        else:
            names = sorted(set(weight_map.values()))
        self._tensors: dict[str, Any] = {}
        for name in names:
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is missing, {INDEX} names it")
            try:
                shard = files.enter_context(safe_open(directory / name, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{directory / name} is truncated or not safetensors: {error}") from error
            for tensor in shard.keys():
                if tensor in self._tensors:
                    raise UserError(f"{directory}: tensor {tensor} is in more than one file")
                if weight_map is not None and weight_map.get(tensor, name) != name:
                    raise UserError(f"{index}: {tensor} should be in {weight_map[tensor]}, it is in {name}")
                self._tensors[tensor] = shard
        for tensor in weight_map or ():
            if tensor not in self._tensors:
                raise UserError(f"{directory / weight_map[tensor]}: tensor {tensor} is missing, {INDEX} names it")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        """A tensor that is read when it is cut."""
        return self._tensors[name].get_slice(name)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """UserError unless there are exactly these tensors, of these shapes and of a float dtype."""
        for name, shape in expected.items():
            if name not in self:
                raise UserError(f"{self.directory}: tensor {name} is missing")
            found, dtype = tuple(self[name].get_shape()), self[name].get_dtype()
            if found != shape:
                raise UserError(f"{self.directory}: tensor {name} has shape {found}, expected {shape}")
            if dtype not in DTYPES:
                raise UserError(f"{self.directory}: tensor {name} is {dtype}, supported: {', '.join(DTYPES)}")
        for name in self._tensors:
            # Older exports of Llama's naming carry the table of RoPE frequencies.
            if name not in expected and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{self.directory}: tensor {name} is not part of the model that {CONFIG} describes")


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, axis=0)


def read_parameter(
    folder: Folder, name: str, tensor_names: list[str], target: jax.ShapeDtypeStruct, stacked: bool
) -> jax.Array:
    """One parameter of the model, on the devices of its sharding.

    Args:
      folder: where its tensors are.
      name: its name in mesh.PARAMETERS.
      tensor_names: the tensors it is made of, one per layer, or just one.
      target: its shape, dtype and sharding.
      stacked: whether it has a leading L.
    """
    shape = target.shape[1:] if stacked else target.shape
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.PARAMETERS[name])

    def on_devices(tensor_name: str) -> jax.Array:
        read: Callable = functools.partial(read_part, folder[tensor_name], name, shape)
        return jax.make_array_from_callback(shape, sharding, lambda index: read(index).astype(target.dtype))

    if not stacked:
        return on_devices(tensor_names[0])
    stack = jnp.zeros(target.shape, target.dtype, out_sharding=P(None, *mesh.PARAMETERS[name]))
    for i, tensor_name in enumerate(tensor_names):
        stack = _set_layer(stack, on_devices(tensor_name), np.int32(i))
    return stack


def load_model(
    directory: str | Path, dtype: jnp.dtype, update: Callable[[ModelConfig], ModelConfig] = lambda config: config
) -> Transformer:
    """The model in a published folder, sharded over the mesh in use.

    Args:
      directory: holds config.json and *.safetensors, in LLaDA's or Llama's naming.
      dtype: of the parameters and of the computation.
      update: completes the config, e.g. with what only the tokenizer knows.

    Raises:
      UserError: a missing, extra or misshapen tensor, a damaged file, a field that is not supported,
        a dimension that the mesh does not divide; before anything is allocated.
    """
    directory = Path(directory)
    config = update(model_config(read_json(directory / CONFIG), str(directory / CONFIG)))
    mesh.check_model(config, tuple(jax.sharding.get_abstract_mesh().axis_sizes))
    graphdef, targets = split(abstract_model(config, ComputeConfig(dtype=jnp.dtype(dtype).name)))
    with contextlib.ExitStack() as files:
        folder = Folder(directory, files)
        naming = LLAMA if LLAMA["embedding"] in folder else LLADA

        def names(name: str) -> list[str]:
            return [naming[name].format(i) for i in range(config.layers)]

        outer = {name: target for name, target in targets.items() if name != "blocks"}
        inner = targets["blocks"]
        folder.check(
            {naming[name]: published_shape(name, target.shape) for name, target in outer.items()}
            | {one: published_shape(name, target.shape[1:]) for name, target in inner.items() for one in names(name)}
        )

        def read(name: str, target: jax.ShapeDtypeStruct, stacked: bool) -> jax.Array:
            target = jax.ShapeDtypeStruct(target.shape, dtype)
            return read_parameter(folder, name, names(name) if stacked else [naming[name]], target, stacked)

        params = {name: read(name, target, stacked=False) for name, target in outer.items()}
        params["blocks"] = {name: read(name, target, stacked=True) for name, target in inner.items()}
    return merge(graphdef, params)
