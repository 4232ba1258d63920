"""Tests that published folders are read and written exactly, and that damaged ones are refused."""

import dataclasses
import errno
import json
import os
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rounding
import tiny
from paths import PARITY
from published_folders import change_config, change_tensors, read, rename_to_llama, split_shards, tensors_of
from safetensors.numpy import load_file, save_file

from llada_jax.config import UserError
from llada_jax.formats import huggingface, tensor_files

Q_PROJ = "model.transformer.blocks.1.q_proj.weight"


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
    config = json.loads((folder / "config.json").read_text())
    fields, tensors = rename_to_llama(config, load_file(folder / "model.safetensors"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    model = read(folder, make_mesh())
    assert model.config.end_ids == (501,)
    assert dataclasses.replace(model.config, end_ids=()) == read(PARITY / "gqa", make_mesh()).config
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
    # Both have the same trunk. The head is the transposed embedding, so that its sums may have another order.
    logits_BTV = np.asarray(untied(tokens_BT))
    rounding.assert_close(tied(tokens_BT), logits_BTV, rounding.of_logits(tied.config, 40, score=4))


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


def test_an_error_of_the_machine_is_no_damage(make_mesh, folder, monkeypatch):
    split_shards(folder)
    opened = Path.open

    def fail(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"\.safetensors cannot be read: Too many open files; allow this program more"):
        read(folder, make_mesh())


def test_damaged_folders_are_named(make_mesh, folder):
    def refused(words):
        with pytest.raises(UserError, match=words):
            read(folder, make_mesh())

    weight_map = split_shards(folder)
    shard = folder / weight_map[Q_PROJ]
    content = shard.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 100, content + b"more"):
        shard.write_bytes(damaged)
        refused(f"{shard.name} is truncated or not")
    shard.unlink()
    refused(f"{shard.name} is missing, .* names it")
    shard.mkdir()
    refused(f"{shard.name} is not a file")
    shard.rmdir()
    shard.write_bytes(content)
    index = folder / tensor_files.INDEX
    for wrong in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}):
        index.write_text(json.dumps(wrong))
        refused("has no weight_map")
    for wrong in (None, 3, ["x"], "", "..", "../x.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: wrong}}))
        refused("which is not the name of a file there")
    index.write_text(json.dumps({"weight_map": weight_map | {"model.more": shard.name}}))
    refused("tensor model.more is missing")
    other = next(name for name in weight_map.values() if name != shard.name)
    index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: other}}))
    refused(f"{Q_PROJ} should be in {other}, but it is in {shard.name}")
    index.write_text(json.dumps({"weight_map": weight_map}))
    twice = load_file(folder / other) | {Q_PROJ: load_file(shard)[Q_PROJ]}
    before = (folder / other).read_bytes()
    save_file(twice, folder / other)
    read(folder, make_mesh())  # an equal copy in another file changes nothing
    save_file(twice | {Q_PROJ: twice[Q_PROJ] + 1}, folder / other)
    refused(f"tensor {Q_PROJ} is in more than one file, with different values")
    (folder / other).write_bytes(before)
    index.unlink()
    refused("has 3 .safetensors files; expected one")
    for wrong in ("{", "[" * 100_000, "\xff"):
        index.write_text(wrong, encoding="latin-1")
        refused("is not JSON")
    index.write_text("[]")
    refused("is not a JSON object")
    index.unlink()
    index.mkdir()
    refused("Is a directory")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused("config.json: Is a directory")


def test_tensors_of_other_kinds_are_named(make_mesh, folder):
    change_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.int32)}))
    with pytest.raises(UserError, match="q_proj.weight has dtype I32; supported are F32, BF16, F16"):
        read(folder, make_mesh())


def test_float16_is_read_exactly(make_mesh, folder):
    def to_float16(tensors):
        tensors.update({name: tensor.astype(np.float16) for name, tensor in tensors.items()})

    change_tensors(folder, to_float16)
    tensor = load_file(folder / "model.safetensors")[Q_PROJ].astype(np.float32)
    np.testing.assert_array_equal(read(folder, make_mesh()).blocks.q_proj[1], tensor.T.reshape(64, 4, 16))
    found = huggingface.inspect(folder)
    assert found.dtype == "float32" and set(found.dtypes.values()) == {"float16"}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("naming", ["llada", "llama"])
def test_what_is_written_is_what_was_read(make_mesh, tmp_path, sizes, naming):
    model = read(PARITY / "gqa", make_mesh(*sizes))
    original = json.loads((PARITY / "gqa" / "config.json").read_text())
    huggingface.save_model(model, tmp_path / "out", naming=naming, shard_bytes=200_000, files={"a.txt": b"a"})
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    tensors = load_file(PARITY / "gqa" / "model.safetensors")
    written = tensors_of(tmp_path / "out")
    if naming == "llama":
        tensors = rename_to_llama(original, tensors)[1]
    assert written.keys() == tensors.keys() == index["weight_map"].keys()
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert files == ["a.txt", "config.json", *shards, tensor_files.INDEX]
    for name in shards:
        assert sum(tensors[tensor].nbytes for tensor, file in index["weight_map"].items() if file == name) <= 200_000
    same(read(tmp_path / "out", make_mesh()), read(PARITY / "gqa", make_mesh()))


def test_a_file_is_the_one_that_the_library_writes(make_mesh, tmp_path):
    for dtype in ("float32", "bfloat16"):
        model = read(PARITY / "mha", make_mesh(), dtype)
        huggingface.save_model(model, tmp_path / dtype)
        ours = tmp_path / dtype / "model.safetensors"
        save_file(load_file(ours), tmp_path / "library", metadata={"format": "pt"})
        assert ours.read_bytes() == (tmp_path / "library").read_bytes()
        assert not (tmp_path / dtype / tensor_files.INDEX).exists()


def test_large_tensors_are_written_in_parts(make_mesh, tmp_path, monkeypatch):
    model = read(PARITY / "mha", make_mesh(1, 2, 1))
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 1000)
    huggingface.save_model(model, tmp_path / "out", dtype="bfloat16", naming="llada")
    tensors = load_file(PARITY / "mha" / "model.safetensors")
    for name, tensor in tensors_of(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(ml_dtypes.bfloat16))


def test_what_cannot_be_written_is_named(make_mesh, tmp_path):
    model = read(PARITY / "mha", make_mesh())
    original = json.loads((PARITY / "mha" / "config.json").read_text())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    cases = [
        ("full", {}, "exists and is not an empty folder"),
        ("out", {"dtype": "float16"}, "dtype=float16: choose float32 or bfloat16"),
        ("out", {"naming": "gpt"}, "naming='gpt': choose llada or llama"),
        ("out", {"shard_bytes": 0}, "shard_bytes=0: it must be at least 1"),
        ("out", {"original": original | {"n_layers": 3}}, "model has layers=2, but the original config.json says 3"),
        ("out", {"original": original | {"alibi": True}}, "alibi=true is not supported"),
    ]
    for name, options, words in cases:
        with pytest.raises(UserError, match=words):
            huggingface.save_model(model, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_mesh_that_does_not_divide_is_named(make_mesh, folder):
    with pytest.raises(UserError, match="kv_heads=2 is not divisible by config.mesh.tensor=4"):
        read(folder, make_mesh(1, 1, 4))


def test_renaming_keeps_what_it_does_not_rename(make_mesh, tmp_path):
    model = read(PARITY / "gqa", make_mesh())
    original = json.loads((PARITY / "gqa" / "config.json").read_text())
    original |= {"vocab_size": 508, "eos_token_id": [500, 501], "pad_token_id": 7, "mine": None, "n_kv_heads": None}
    model.config.token_count = 508
    huggingface.save_model(model, tmp_path / "llama", naming="llama", original=original | {"n_kv_heads": 2})
    fields = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["pad_token_id"], fields["mine"]) == ([500, 501], 7, None)
    assert fields["vocab_size"] == 512 and fields["model_type"] == "llama" and fields["num_key_value_heads"] == 2
    assert huggingface.inspect(tmp_path / "llama").config.token_count == 508
    huggingface.save_model(model, tmp_path / "back", original=fields)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["vocab_size"] == 508 and fields["embedding_size"] == 512 and fields["eos_token_id"] == [500, 501]
    assert "token_count" not in fields and huggingface.inspect(tmp_path / "back").config.token_count == 508


def test_a_link_to_an_empty_folder_is_written_to(make_mesh, tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    huggingface.save_model(read(PARITY / "gqa", make_mesh()), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


SEVERAL = """
import sys, jax
from llada_jax.devices import distributed, mesh
from llada_jax.formats import huggingface
from llada_jax.config import DistributedConfig, UserError
source, output, address, process = sys.argv[1:]
def main():
    with jax.set_mesh(mesh.mesh_over((1, 2, 2), jax.devices())):
        model = huggingface.load_model(source, "float32")
    assert not model.embedding[...].is_fully_addressable
    huggingface.save_model(model, output, shard_bytes=200_000)
    try:
        huggingface.save_model(model, output)
    except UserError as error:  # in both processes
        assert "exists and is not an empty folder" in str(error)
        return 0
sys.exit(distributed.run(main, DistributedConfig(), address, 2, int(process)))
"""


def test_the_first_of_several_processes_writes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    arguments = [str(PARITY / "gqa"), str(tmp_path / "out"), address]
    processes = [tiny.start(["-c", SEVERAL, *arguments, str(i)], devices=2) for i in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    written, tensors = tensors_of(tmp_path / "out"), load_file(PARITY / "gqa" / "model.safetensors")
    assert written.keys() == tensors.keys() and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
