"""Tests llada_jax.load for published folders and training workdirs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from paths import PARITY

import llada_jax
from llada_jax.config import Config, ModelConfig, UserError
from llada_jax.formats import huggingface, workdir
from llada_jax.formats.conversion import convert
from llada_jax.formats.generation_config import generation_config
from llada_jax.formats.published import published_config
from llada_jax.formats.workdir import write_config
from llada_jax.model.transformer import split
from llada_jax.sampling.settings import resolve
from llada_jax.sampling.text_completion import Options, finished_text, make_batches, make_prompt
from llada_jax.text.agreement import with_tokenizer
from llada_jax.text.tokenizer import find_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer
from llada_jax.training.checkpoint import Checkpoints
from llada_jax.training.step import make_state


@pytest.fixture(scope="module", params=["mha", "gqa"])
def published(request):
    folder = PARITY / request.param
    model, tokenizer = llada_jax.load(folder)
    assert tokenizer is None
    return model, np.load(folder / "cases.npz")


def test_logits_are_those_of_the_reference(published):
    model, cases = published
    assert model.embedding[...].dtype == jnp.float32  # the default on CPU
    # The weights of these models are so large that the scores of attention are of size 4.
    tolerance = rounding.of_logits(model.config, cases["tokens"].shape[1], score=4)
    rounding.assert_close(model(cases["tokens"].astype(np.int32)), cases["logits"], tolerance)


def test_mesh_and_dtype(make_mesh):
    mesh = make_mesh(1, 2, 2)
    model, _ = llada_jax.load(PARITY / "gqa", mesh=mesh, dtype="bfloat16")
    assert model.embedding[...].sharding.mesh == mesh
    assert model.embedding[...].dtype == jnp.bfloat16 and model.compute.dtype == "bfloat16"
    with jax.set_mesh(mesh):
        assert llada_jax.load(PARITY / "gqa")[0].embedding[...].sharding.mesh == mesh
    assert jax.sharding.get_abstract_mesh().empty, "no mesh stays set after the with block"


def test_a_training_workdir(make_mesh, tmp_path):
    tokenizer = train_tokenizer([Path(__file__).read_text()], 380, tmp_path / "tokenizer")
    sizes = ModelConfig(layers=1, width=16, heads=2, kv_heads=2, feed_forward=16, vocab_size=tokenizer.vocab_size)
    config = Config(model=with_tokenizer(sizes, tokenizer))
    with jax.set_mesh(make_mesh(1, 2, 1)):
        state = make_state(config)
        checkpoints = Checkpoints(tmp_path, config.checkpoint)
        checkpoints.save(state, {})
        checkpoints.close()
    write_config(tmp_path, config, {})
    model, found = llada_jax.load(tmp_path)
    assert found.sha256 == tokenizer.sha256 and model.config == config.model
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], state.params)
    assert llada_jax.load(tmp_path, dtype=jnp.bfloat16, step=0)[0].embedding[...].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        llada_jax.load(tmp_path, step=7)


def published_with(folder, vocab_size, **changes):
    """Returns a published folder whose tokenizer does not know the special ids of the model."""
    train_tokenizer([Path(__file__).read_text() * 2], vocab_size, folder)
    shutil.copy(PARITY / "mha" / "model.safetensors", folder)
    config = json.loads((PARITY / "mha" / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_knows_the_models_own_ids(tmp_path):
    folder = published_with(tmp_path / "m", 380, bos_token_id=9)
    model, tokenizer = llada_jax.load(folder)
    assert (model.config.mask_id, model.config.eos_id, model.config.bos_id) == (511, 500, 9)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) == (511, 500, 9)
    assert model.config.token_count == 512, "the sampler must be able to choose EOS"
    assert tokenizer.encode("a [MASK]", special=True)[-1] == 511 and tokenizer.decode([511]) == "[MASK]"
    assert tokenizer.sha256 == find_tokenizer(folder).sha256
    prompt = make_prompt([5, 511], model, tokenizer, Options())
    tokens_T = np.array([5, 6, 500, 7])
    assert prompt.masks == 1 and finished_text(tokens_T, prompt, model, tokenizer) == tokenizer.decode([5, 6])
    convert(folder, tmp_path / "ours", "orbax")
    ours, again = llada_jax.load(tmp_path / "ours")
    assert ours.config == model.config and again.roles == tokenizer.roles


def test_every_end_that_the_folder_names_ends_a_text(tmp_path, capsys):
    """config.json, generation_config.json and the tokenizer name ends. No format that we write forgets one."""
    folder = published_with(tmp_path / "m", 380, eos_token_id=[500, 7])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [500, 501], "temperature": 0.5}))
    assert find_tokenizer(folder).eos_id == 2
    model, tokenizer = llada_jax.load(folder)
    told = capsys.readouterr().err.splitlines()
    assert (
        told[0] == f"{folder}/generation_config.json: not used: temperature (the sampler takes its settings from you)"
    )
    note = f"{folder}: EOS is 500 in the model's config.json, but 2 (<|endoftext|>) in the tokenizer's files"
    assert told[1].startswith(note)
    assert (model.config.eos_id, model.config.end_ids) == (500, (7, 501, 2))
    prompt = make_prompt([5], model, tokenizer, Options())
    for end in (500, 7, 501, 2, tokenizer.eot_id):
        assert finished_text(np.array([5, 6, 8, end, 9]), prompt, model, tokenizer) == tokenizer.decode([6, 8])
    (batch,) = make_batches(model, [prompt], Options(), 1)
    assert batch.config.stop_at_end and resolve(batch.config, model).end_ids == (7, 501, 2)

    convert(folder, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "again", "huggingface")
    convert(folder, tmp_path / "llama", "huggingface", naming="llama")
    for name in ("ours", "again", "llama"):
        config = llada_jax.load(tmp_path / name)[0].config
        assert (config.eos_id, set(config.end_ids), config.holes) == (500, {7, 501, 2}, model.config.holes)
    for name in ("again", "llama"):
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == [500, 7]
    own = published_config(model.config)
    assert own["eos_token_id"] == [500, 7, 501, 2] and own["pad_token_id"] == 500
    assert json.loads(generation_config(model.config, own))["eos_token_id"] == [500, 7, 501, 2]


def test_only_ids_that_the_tokenizer_can_decode_are_chosen(loaded):
    """The tokenizer has 396 ids and appends four, the model has EOS at 500 and MASK at 511, and 512 rows."""
    model, tokenizer = loaded
    assert model.config.holes == ((396, 397), (400, 500), (501, 511))
    config = llada_jax.SamplerConfig(steps=4, gen_length=64, block_length=64, temperature=4.0)
    out_BT = np.asarray(llada_jax.generate(model, np.zeros((8, 2), np.int32), config, jax.random.key(0)))
    chosen = {*out_BT[:, 2:].ravel().tolist()}
    assert chosen <= {*range(396), 397, 398, 399, 500} and len(chosen) > 100
    bare = llada_jax.load(PARITY / "gqa")[0]
    assert bare.config.holes == () and bare.config.token_count is None  # no tokenizer says which ids are tokens


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, monkeypatch):
    folder = published_with(tmp_path / "m", 560)
    monkeypatch.setattr(huggingface, "_read_parameter", lambda *_: pytest.fail("a tensor was read before the check"))
    with pytest.raises(UserError, match="the tokenizer has 556 tokens, the model's embedding 512"):
        llada_jax.load(folder)
    with pytest.raises(UserError, match="the tokenizer has 556 tokens, the model's embedding 512"):
        convert(folder, tmp_path / "out", "orbax")


class Tokenizer:
    size, mask_id, bos_id, eos_id, eot_id, end_ids = 500, 497, 1, 2, 600, (3, 2, 600)

    def holes(self, limit, known):
        return ((400, limit),)


def test_the_tokenizer_says_what_the_config_does_not():
    config = with_tokenizer(ModelConfig(vocab_size=512, mask_id=511), Tokenizer())
    assert (config.token_count, config.mask_id, config.bos_id, config.eos_id, config.eot_id) == (500, 511, 1, 2, None)
    assert (config.end_ids, config.holes) == ((3,), ((400, 500),))
    assert with_tokenizer(ModelConfig(vocab_size=64), Tokenizer()).token_count == 64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "none", "is not a folder"),
        (lambda path: path, "has no model"),
        (lambda path: (path / "model.bin").touch() or path, r"weights in other formats \(model.bin\): convert them"),
        (lambda path: shutil.copytree(PARITY / "mha", path / "m", ignore=lambda *_: ["config.json"]), "config.json: "),
    ],
)
def test_a_folder_without_a_model_is_named(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        llada_jax.load(make(tmp_path))


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        llada_jax.load(PARITY / "mha", dtype="float16")
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        llada_jax.load(PARITY / "mha", dtype="fp32")
    with pytest.raises(UserError, match="has no step 3"):
        llada_jax.load(PARITY / "mha", step=3)


def test_the_package_alone_imports_no_jax():
    code = (
        "import sys, llada_jax, llada_jax.text.tokenizer; assert 'jax' not in sys.modules; print(llada_jax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_length_a_model_was_trained_with(tmp_path):
    assert workdir.trained_length(tmp_path) is None
    for content, length in (
        ('{"config": {"sequence_length": 32}}', 32),
        ('{"max_sequence_length": 64}', 64),
        ("{", None),
    ):
        (tmp_path / "config.json").write_text(content)
        assert workdir.trained_length(tmp_path) == length
