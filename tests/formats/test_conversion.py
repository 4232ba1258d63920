"""Tests the conversion between published folders and workdirs in our own format."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chat_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from paths import PARITY, PYTHONPATH
from published_folders import rename_to_llama, tensors_of
from safetensors.numpy import load_file, save_file

import llada_jax
from llada_jax.config import Config, ModelConfig, UserError
from llada_jax.formats import arrays, huggingface, published, tensor_files, tensor_names, workdir
from llada_jax.formats.conversion import convert
from llada_jax.formats.workdir import write_config
from llada_jax.model.transformer import split
from llada_jax.text.agreement import with_tokenizer
from llada_jax.text.tokenizer import find_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer
from llada_jax.training.checkpoint import Checkpoints
from llada_jax.training.step import make_state

ODD_BITS = np.array([-0.0, 1e-40, -3e38, 1 + 2**-7], np.float32)  # an inexact conversion would change these


@pytest.fixture(params=["mha", "gqa llama", "gqa tied bfloat16"])
def folder(request, tmp_path):
    """Returns a published folder that also holds a tokenizer, code, and unknown config fields."""
    kind, *changes = request.param.split()
    folder = chat_folders.make_folder(tmp_path / "source", chat_folders.PUBLISHED)
    config = json.loads((PARITY / kind / "config.json").read_text())
    tensors = load_file(PARITY / kind / "model.safetensors")
    tensors["model.transformer.wte.weight"][:4, 0] = ODD_BITS
    if "tied" in changes:
        config["weight_tying"] = True
        del tensors["model.transformer.ff_out.weight"]
    if "bfloat16" in changes:
        config["torch_dtype"] = "bfloat16"
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    if "llama" in changes:
        config, tensors = rename_to_llama(config, tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"something": {"of": ["its", "own", 1e-05]}, "unicode": "\u00e9"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llada.py").write_text("raise RuntimeError\n")
    (folder / "special_tokens_map.json").write_text('{"bos_token":   "<|startoftext|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id":500}')
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "vocab.bin").write_bytes(b"x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_mesh):
    """Returns a training workdir with checkpoints of steps 0 and 3."""
    folder = tmp_path_factory.mktemp("workdir")
    tokenizer = train_tokenizer([Path(__file__).read_text()], 380, folder / "tokenizer")
    sizes = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, feed_forward=24, vocab_size=tokenizer.vocab_size)
    config = Config(model=with_tokenizer(sizes, tokenizer), sequence_length=48)
    with jax.set_mesh(make_mesh(1, 2, 1)):
        checkpoints = Checkpoints(folder, config.checkpoint)
        state = make_state(config)
        for step in (0, 3):
            params = jax.tree.map(lambda p, step=step: p + step, state.params)
            checkpoints.save(type(state)(jnp.int32(step), params, state.opt_state), {})
        checkpoints.close()
    write_config(folder, config, {"data": [], "weights": [], "tokenizer": tokenizer.sha256})
    return folder


def other_contents(folder):
    """Returns the contents of all files except config.json and the weights."""
    left_out = (".safetensors", ".index.json", "pytorch_model.bin")
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    files.pop(Path("config.json"))
    return {name: path.read_bytes() for name, path in files.items() if not str(name).endswith(left_out)}


def assert_same_published(one, other):
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes(), name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    assert other_contents(one) == other_contents(other)
    assert (other / "modeling_llada.py").exists() and not (other / "pytorch_model.bin").exists()


def test_there_and_back_is_bit_exact(folder, tmp_path):
    convert(folder, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert_same_published(folder, tmp_path / "back")
    convert(tmp_path / "ours", tmp_path / "moved", "orbax")
    convert(tmp_path / "moved", tmp_path / "shards", "huggingface", shard_bytes=100_000)
    assert_same_published(folder, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    convert(folder, tmp_path / "straight", "huggingface")
    assert_same_published(folder, tmp_path / "straight")


def test_what_orbax_holds_is_loaded_as_the_folder_itself(folder, tmp_path):
    convert(folder, tmp_path / "ours", "orbax")
    ours, tokenizer = llada_jax.load(tmp_path / "ours")
    theirs, original = llada_jax.load(folder)
    assert ours.config == theirs.config and tokenizer.sha256 == original.sha256
    assert tokenizer.chat_template == original.chat_template
    jax.tree.map(np.testing.assert_array_equal, split(ours)[1], split(theirs)[1])
    assert (tmp_path / "ours" / "published" / "config.json").exists()


def test_another_dtype_and_naming(tmp_path):
    source = PARITY / "gqa"
    convert(source, tmp_path / "rounded", "orbax", dtype="bfloat16")
    convert(tmp_path / "rounded", tmp_path / "back", "huggingface", naming="llama")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16" and fields["hidden_size"] == 64 and fields["max_sequence_length"] == 256
    assert fields["max_position_embeddings"] == 256 and "d_model" not in fields
    assert "architectures" not in fields and fields["model_type"] == "llama"
    assert set(tensors_of(tmp_path / "back")) == set(
        tensor_names.expected_tensors(published.model_config(fields), "llama")
    )
    convert(tmp_path / "back", tmp_path / "again", "huggingface", naming="llada", dtype="float32")
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["torch_dtype"] == "float32" and fields["architectures"] == ["LLaDAModelLM"]
    assert fields["max_sequence_length"] == 256 and "hidden_size" not in fields and fields["d_model"] == 64
    for name, tensor in load_file(source / "model.safetensors").items():
        rounded = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(tensors_of(tmp_path / "again")[name], rounded)


def test_a_sentencepiece_folder_there_and_back(trained, tmp_path):
    """The tokenizer stays the same, whether a file names its control tokens or this package appends them."""
    convert(trained, tmp_path / "published", "huggingface")
    wanted = find_tokenizer(trained / "tokenizer")
    config = tmp_path / "published" / "tokenizer_config.json"
    for i, change in enumerate((lambda: None, lambda: config.write_text(json.dumps({"chat_template": "T"})))):
        change()
        convert(tmp_path / "published", tmp_path / f"ours_{i}", "orbax")
        convert(tmp_path / f"ours_{i}", tmp_path / f"back_{i}", "huggingface")
        for name in ("published", f"back_{i}", f"ours_{i}/tokenizer"):
            found = find_tokenizer(tmp_path / name)
            assert found.sha256 == wanted.sha256 and found.roles == wanted.roles and found.size == wanted.size
        assert other_contents(tmp_path / f"back_{i}") == other_contents(tmp_path / "published")
        assert (tmp_path / f"back_{i}" / "tokenizer_config.json").read_bytes() == config.read_bytes()


@pytest.mark.parametrize("mixed", [False, True])
def test_float16_and_mixed_files_keep_each_tensors_dtype(tmp_path, mixed):
    tensors = {n: t.astype(np.float16) for n, t in load_file(PARITY / "mha" / "model.safetensors").items()}
    tensors["model.transformer.wte.weight"][:4, 0] = np.array([-0.0, 6e-8, -65504, 1 + 2**-10], np.float16)
    if mixed:
        tensors["model.transformer.blocks.1.q_proj.weight"] = (ODD_BITS[1] * np.ones((48, 48))).astype(np.float32)
        tensors["model.transformer.ln_f.weight"] = ODD_BITS[:1].astype(ml_dtypes.bfloat16).repeat(48)
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    config = json.loads((PARITY / "mha" / "config.json").read_text()) | {"torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "moved", "orbax")
    convert(tmp_path / "moved", tmp_path / "back", "huggingface")
    convert(source, tmp_path / "straight", "huggingface", shard_bytes=100_000)
    for out in (tmp_path / "back", tmp_path / "straight"):
        assert json.loads((out / "config.json").read_text()) == config
        written = tensors_of(out)
        for name, tensor in tensors.items():
            assert written[name].dtype == tensor.dtype and written[name].tobytes() == tensor.tobytes(), name
    convert(tmp_path / "ours", tmp_path / "llama", "huggingface", naming="llama")
    renamed = rename_to_llama(config, tensors)[1]
    assert {n: t.tobytes() for n, t in tensors_of(tmp_path / "llama").items()} == {
        name: tensor.tobytes() for name, tensor in renamed.items()
    }
    convert(tmp_path / "ours", tmp_path / "rounded", "huggingface", dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "rounded").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_trained_here(trained, tmp_path):
    convert(trained, tmp_path / "out", "huggingface")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["d_model"] == 16 and fields["max_sequence_length"] == 48 and fields["torch_dtype"] == "float32"
    assert fields["vocab_size"] == 380 and fields["embedding_size"] == 384
    ours, tokenizer = llada_jax.load(trained)
    theirs, found = llada_jax.load(tmp_path / "out")
    assert theirs.config == ours.config and found.sha256 == tokenizer.sha256
    text = "import jax [MASK] <|eot_id|>"
    assert found.encode(text, special=True) == tokenizer.encode(text, special=True)
    messages = [{"role": "user", "content": "Hi <|eot_id|>"}]
    assert found.encode_chat(messages) == tokenizer.encode_chat(messages)
    jax.tree.map(np.testing.assert_array_equal, split(theirs)[1], split(ours)[1])
    tokens = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i) for i in tokens} == {i for i, _ in tokenizer.roles.values()}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    convert(trained, tmp_path / "first", "huggingface", step=0, dtype="bfloat16")
    first, _ = llada_jax.load(tmp_path / "first")
    np.testing.assert_array_equal(first.final_norm[...] + 3, ours.final_norm[...])
    assert json.loads((tmp_path / "first" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {tensor.dtype.name for tensor in tensors_of(tmp_path / "first").values()} == {"bfloat16"}


def test_a_complete_config_has_every_field_of_the_published_one():
    """All fields of LLaDA-8B's config.json are there, so that the code published with it finds every field it reads."""
    names = """activation_type alibi alibi_bias_max architectures attention_dropout attention_layer_norm
    attention_layer_norm_with_affine auto_map bias_for_layer_norm block_group_size block_type d_model
    embedding_dropout embedding_size eos_token_id flash_attention include_bias include_qkv_bias init_cutoff_factor
    init_device init_fn init_std input_emb_norm layer_norm_type layer_norm_with_affine mask_token_id
    max_sequence_length mlp_hidden_size mlp_ratio model_type multi_query_attention n_heads n_kv_heads n_layers
    pad_token_id precision residual_dropout rms_norm_eps rope rope_full_precision rope_theta scale_logits
    transformers_version use_cache vocab_size weight_tying"""
    for config in (ModelConfig(vocab_size=512), ModelConfig(vocab_size=512, tied_embeddings=True, kv_heads=8)):
        fields = published.published_config(config)
        assert set(names.split()) <= set(fields)
        assert published.model_config(fields) == config
        assert published.model_config(published.published_config(config, "llama")) == config


def test_weights_alone_of_a_workdir(trained, tmp_path):
    convert(trained, tmp_path / "out", "orbax", step=0)
    assert workdir.steps_in(tmp_path / "out") == [0]
    ours, tokenizer = llada_jax.load(tmp_path / "out")
    theirs, _ = llada_jax.load(trained, step=0)
    assert ours.config == theirs.config and tokenizer.sha256 == find_tokenizer(trained / "tokenizer").sha256
    jax.tree.map(np.testing.assert_array_equal, split(ours)[1], split(theirs)[1])
    saved = (tmp_path / "out" / "checkpoints" / "0" / "state" / "_METADATA").read_text()
    assert "params" in saved and "opt_state" not in saved


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_damage_is_found(tmp_path, dtype):
    """Damage is found even if the saved parameters are cast to another dtype."""
    convert(PARITY / "mha", tmp_path / "out", "orbax", dtype=dtype)
    record = tmp_path / "out" / "checkpoints" / "0" / "run" / "metadata"
    run = json.loads(record.read_text())
    run["fingerprint"]["params/embedding"] += 1
    record.write_text(json.dumps(run))
    with pytest.raises(UserError, match="the content of params/embedding is not what was saved"):
        llada_jax.load(tmp_path / "out", dtype="bfloat16")
    with pytest.raises(UserError, match="the content of params/embedding is not what was saved"):
        convert(tmp_path / "out", tmp_path / "back", "huggingface", dtype="bfloat16")
    assert not (tmp_path / "back").exists()


def test_a_workdir_in_another_dtype(trained):
    exact, rounded = (llada_jax.load(trained, dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    wanted = jax.tree.map(lambda p: p.astype(jnp.bfloat16), split(exact)[1])
    jax.tree.map(np.testing.assert_array_equal, split(rounded)[1], wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(split(rounded)[1])} == {jnp.dtype(jnp.bfloat16)}


def test_mistakes_are_named_before_anything_is_read(trained, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "none", out, "orbax"), {}, "none is not a folder"),
        ((tmp_path / "full", out, "orbax"), {}, "full has no model"),
        ((trained, tmp_path / "full", "orbax"), {}, "exists and is not an empty folder"),
        ((trained, tmp_path / "file", "huggingface"), {}, "exists and is not an empty folder"),
        ((trained, tmp_path / "file" / "below", "huggingface"), {}, "cannot be written"),
        ((trained, out, "huggingface"), {"step": 7}, "no checkpoint of step 7; it has 0, 3"),
        ((PARITY / "mha", out, "huggingface"), {"step": 7}, "has no steps"),
        ((PARITY / "mha", out, "orbax"), {"naming": "llama"}, "naming is for format=huggingface"),
        ((PARITY / "mha", out, "huggingface"), {"shard_bytes": 0}, "shard_bytes=0: a positive integer"),
        ((PARITY / "mha", out, "huggingface"), {"shard_bytes": float("nan")}, "shard_bytes=nan: a positive integer"),
        ((PARITY / "mha", out, "gguf"), {}, "choose huggingface or orbax"),
        ((PARITY / "mha", out, "orbax"), {"dtype": "int8"}, "dtype='int8': choose float32 or bfloat16"),
        ((PARITY / "mha", out, "orbax"), {"dtype": "float16"}, "dtype='float16': choose float32 or bfloat16"),
        ((PARITY / "mha", out, "huggingface"), {"naming": "foo"}, "naming='foo': choose llada or llama"),
    ]

    def no_reading(*_, **__):
        raise AssertionError("something was read before the arguments were checked")

    monkeypatch.setattr(huggingface, "_read_parameter", no_reading)
    monkeypatch.setattr(arrays, "_read_arrays", no_reading)
    for arguments, options, words in cases:
        with pytest.raises(UserError, match=words):
            convert(*arguments, **options)
        assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fill(file, tensor, write=tensor_files._write_rows):
        written.append(write(file, tensor))
        if len(written) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "_write_rows", fill)
    with pytest.raises(UserError, match="no space left on the disk"):
        convert(PARITY / "mha", tmp_path / "out", "huggingface")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kill", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_kill_leaves_nothing_under_the_name(tmp_path, kill):
    code = (
        "import sys, time; from llada_jax import convert\n"
        "from llada_jax.cli import entry_point; from llada_jax.formats import tensor_files\n"
        "def stop(*_): open(sys.argv[-1].split('=')[1] + '.now', 'w'); time.sleep(60)\n"
        "tensor_files._write_rows = stop; entry_point.run(convert.main)"
    )
    arguments = [f"--input={PARITY / 'mha'}", "--format=huggingface", f"--output={tmp_path / 'out'}"]
    environment = dict(os.environ, PYTHONPATH=PYTHONPATH)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.now").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(kill)
        assert process.wait(120) == (143 if kill == signal.SIGTERM else -kill)
    finally:
        process.kill()
    assert not (tmp_path / "out").exists()
    convert(PARITY / "mha", tmp_path / "out", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.now"], (
        "the next conversion removes what the killed one left"
    )


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "llada_jax.convert", f"--input={PARITY / 'mha'}", f"--output={tmp_path / 'out'}"]
    command += ["--format=huggingface"]
    environment = dict(os.environ, PYTHONPATH=PYTHONPATH)
    done = subprocess.run([*command, "--shard_gb=nan"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "--shard_gb=nan: a positive number" in done.stderr, done.stderr
    command += ["--shard_gb=0.0002"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout == "" and "writing: 100%" in done.stderr, done.stderr
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(PARITY / "mha").values())
