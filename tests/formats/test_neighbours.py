"""Tests published folders that hold more than one model's weights, and the ends of a text that their files name."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from paths import PARITY
from published_folders import change_config, change_tensors, rename_to_llama, split_shards
from safetensors.numpy import load_file, save_file

from llada_jax.config import UserError
from llada_jax.formats import huggingface, tensor_files
from llada_jax.formats.conversion import convert
from llada_jax.formats.generation_config import with_ends_of_source

EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
OTHERS = ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "original/model.00.pth"]


def add_others(folder):
    (folder / "original").mkdir()
    for name in OTHERS:
        save_file({"x": np.zeros(2, np.float32)}, folder / name)
    (folder / "._model.safetensors").write_bytes(b"hidden")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "pytorch_model.bin").write_bytes(b"bin")


def weights_of(folder):
    with huggingface.opened(folder) as (_, tensors):
        return {
            name: np.asarray(tensors[name][:])
            for name in tensors.dtypes(load_file(PARITY / "gqa" / tensor_files.SINGLE))
        }


@pytest.mark.parametrize("sharded", [False, True])
def test_other_weights_beside_the_model_are_mentioned_in_one_line(folder, sharded):
    wanted = load_file(folder / "model.safetensors")
    if sharded:
        split_shards(folder)
    assert huggingface.inspect(folder).notes == []
    add_others(folder)
    (note,) = huggingface.inspect(folder).notes
    main = tensor_files.INDEX if sharded else "model.safetensors"
    names = "adapter_model.safetensors, consolidated.safetensors, model.fp16.safetensors, model.gguf, pytorch_model.bin"
    assert note == f"{folder}: the model is {main}; weights that are not read: {names}, original/model.00.pth"
    assert all((found == wanted[name]).all() for name, found in weights_of(folder).items())


def test_model_safetensors_comes_before_an_index(folder):
    """transformers reads model.safetensors first, too. An index beside it may be stale."""
    index = {"metadata": {}, "weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (folder / tensor_files.INDEX).write_text(json.dumps(index))
    (note,) = huggingface.inspect(folder).notes
    assert note.endswith(f"the model is model.safetensors; weights that are not read: {tensor_files.INDEX}")


def test_the_only_file_may_have_any_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(b"hidden")
    assert huggingface.inspect(folder).notes == []
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    with pytest.raises(UserError, match=r"has 2 \.safetensors files; expected one, or model\.safetensors, or model"):
        huggingface.inspect(folder)


def tie(folder, head):
    change_config(folder, weight_tying=True)
    change_tensors(folder, lambda tensors: tensors.update({HEAD: head(tensors[EMBEDDING])}))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_model_may_carry_its_head(folder, tmp_path, sharded, monkeypatch):
    tie(folder, lambda embedding: embedding)
    if sharded:
        split_shards(folder)
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 10_000)
    found = huggingface.inspect(folder)
    assert found.config.tied_embeddings and HEAD not in found.dtypes
    assert found.notes == [f"{folder}: {HEAD} equals the embedding that it is tied to: it is not read"]
    convert(folder, tmp_path / "out", "huggingface")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert huggingface.inspect(tmp_path / "out").notes == []


def test_a_tied_head_with_the_same_nan_equals_the_embedding(folder):
    """What is wrong with such a model is told where it is used, not that its head is another one."""
    change_tensors(folder, lambda tensors: tensors[EMBEDDING].__setitem__((3, 4), np.nan))
    tie(folder, lambda embedding: embedding)
    assert huggingface.inspect(folder).notes[0].endswith("it is not read")


def test_a_tied_head_of_another_dtype_counts_by_its_values(folder):
    def rounded(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16).astype(np.float32)
        tensors[HEAD] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)

    change_config(folder, weight_tying=True)
    change_tensors(folder, rounded)
    assert huggingface.inspect(folder).dtype == "float32"


@pytest.mark.parametrize("head", [lambda e: e + 1e-3, lambda e: e[:-1], lambda e: np.where(np.arange(64) < 63, e, 0)])
def test_a_tied_model_with_another_head_is_refused(folder, head):
    tie(folder, head)
    with pytest.raises(
        UserError, match=f"tensor {HEAD} is not part of a model with tied embeddings .*unless it equals"
    ):
        huggingface.inspect(folder)


def test_tables_that_are_no_parameters_are_passed_over(folder):
    names = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "embeddings.position_ids")
    split_shards(folder, 2)
    path = folder / "model-00001-of-00002.safetensors"
    extra = {f"model.layers.{i}.{name}": np.full(3, i, np.int64) for i in range(2) for name in names}
    save_file(load_file(path) | extra, path)
    index = json.loads((folder / tensor_files.INDEX).read_text())
    index["weight_map"]["model.layers.7.rotary_emb.inv_freq"] = path.name  # named, but in no file
    (folder / tensor_files.INDEX).write_text(json.dumps(index))
    assert huggingface.inspect(folder).config.layers == 3


def test_each_file_is_opened_once_however_many_copies_there_are(folder, monkeypatch):
    weight_map = split_shards(folder, 2)
    first, second = sorted(set(weight_map.values()))
    save_file(load_file(folder / first) | load_file(folder / second), folder / first)
    opened, safe_open = [], tensor_files.safe_open
    monkeypatch.setattr(tensor_files, "safe_open", lambda path, **k: opened.append(path.name) or safe_open(path, **k))
    huggingface.inspect(folder)
    assert opened == [first, second]


def test_copies_in_several_shards(folder):
    """A tensor may be in several files if all copies are equal. The file that the index names counts."""
    weight_map = split_shards(folder, 2)
    counts, other = weight_map[EMBEDDING], next(name for name in weight_map.values() if name != weight_map[EMBEDDING])
    tensor, before = load_file(folder / counts)[EMBEDDING], load_file(folder / other)
    for content, words in ((tensor, None), (-tensor, "different values"), (tensor[1:], "different values")):
        save_file(before | {EMBEDDING: content}, folder / other)
        if words is None:
            huggingface.inspect(folder)
            continue
        with pytest.raises(UserError, match=f"tensor {EMBEDDING} is in more than one file, with {words}"):
            huggingface.inspect(folder)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "ends"),
    [
        ({}, None, 500, ()),
        ({"eos_token_id": [500, 7]}, None, 500, (7,)),
        ({"eos_token_id": [500, 7, 500]}, {"eos_token_id": [7, 8]}, 500, (7, 8)),
        ({}, {"eos_token_id": 501, "pad_token_id": 9}, 500, (501,)),
        ({"eot_token_id": 3, "eom_token_id": [4]}, {"eod_token_id": 5, "eos_token_id": None}, 500, (3, 4, 5)),
        ({"eos_token_id": ...}, {"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": None}, {}, None, ()),
    ],
)
def test_every_end_that_the_folder_names(folder, config, generation, eos, ends):
    change_config(folder, **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = huggingface.inspect(folder)
    assert (found.config.eos_id, found.config.end_ids, found.notes) == (eos, ends, [])


def test_ends_are_read_with_llamas_names_too(folder):
    fields, tensors = rename_to_llama(
        json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    )
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    assert huggingface.inspect(folder).config.end_ids == (501,)


@pytest.mark.parametrize("value", [[500, "7"], [500, None], [500, -1], [500, 512], [500, 7.0], [500, True], [[500]]])
def test_an_end_that_is_no_id_is_named(folder, value):
    change_config(folder, eos_token_id=value)
    with pytest.raises(UserError, match=r"config\.json: eos_token_id .*must be "):
        huggingface.inspect(folder)
    if 512 in value:
        return
    change_config(folder, eos_token_id=500)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be an id or a list of ids, not "):
        huggingface.inspect(folder)


def test_mask_is_no_end(folder):
    change_config(folder, eos_token_id=[500, 511])
    with pytest.raises(UserError, match=r"config\.json: 511 is mask_token_id, but also an end of a text"):
        huggingface.inspect(folder)
    change_config(folder, eos_token_id=500)
    (folder / "generation_config.json").write_text('{"eos_token_id": 511}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id names 511, which is mask_token_id"):
        huggingface.inspect(folder)


def test_what_generation_config_says_in_vain_is_told(folder):
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "do_sample": True, "transformers_version": "5", "x": None}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(neutral))
    assert huggingface.inspect(folder).notes == []
    path.write_text(json.dumps({"eos_token_id": [500, 900], "temperature": 0.6, "stop_strings": ["END"], "top_p": 0.9}))
    assert huggingface.inspect(folder).notes == [
        f"{path}: the model has no token 900, which the file names as an end of a text",
        f"{path}: not used: stop_strings, temperature, top_p (the sampler takes its settings from you)",
    ]


def test_a_run_from_an_older_version_learns_the_ends_of_its_source(folder, tmp_path):
    config = huggingface.inspect(folder).config
    assert with_ends_of_source(config, tmp_path / "none") == config
    change_config(folder, eos_token_id=[500, 7, "x", 999])
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 500]}')
    assert with_ends_of_source(config, folder).end_ids == (7, 8)
