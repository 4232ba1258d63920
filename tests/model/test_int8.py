"""Tests int8 weights: against the model whose matrices are what int8 stands for, on any mesh, from any folder."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.devices import mesh as meshes
from llada_jax.formats import huggingface
from llada_jax.formats.conversion import convert
from llada_jax.model import int8
from llada_jax.model.transformer import MATRICES, SCALE, Transformer, merge, split
from llada_jax.sampling import sampler
from llada_jax.scoring.likelihood import log_likelihoods

pytest.importorskip("qwix", reason="qwix is not installed: pip install 'llada_jax[int8]'")
TOKENS_BT = np.arange(22, dtype=np.int32).reshape(2, 11) * 17 % 400


@pytest.fixture(scope="module")
def quantized(model_folder) -> Transformer:
    return llada_jax.load(model_folder, weights="int8")[0]


def meant(model: Transformer, quantized: Transformer) -> Transformer:
    """Returns `model` with the fp32 matrices that the int8 matrices stand for."""
    graphdef, params = split(model)
    blocks = split(quantized)[1]["blocks"]
    for name, (inputs, _) in MATRICES.items():
        scale = np.expand_dims(np.asarray(blocks[name + SCALE]), tuple(range(1, 1 + len(inputs))))
        params["blocks"][name] = jnp.asarray(np.asarray(blocks[name], np.float32) * scale)
    return merge(graphdef, params)


def test_each_element_is_off_by_half_a_scale_at_most(loaded, quantized):
    whole, small = (split(model)[1]["blocks"] for model in (loaded[0], quantized))
    for name, (inputs, _) in MATRICES.items():
        axes = tuple(range(1, 1 + len(inputs)))
        matrix, scale = np.asarray(whole[name], np.float64), np.asarray(small[name + SCALE], np.float64)
        assert small[name].dtype == jnp.int8 and small[name].shape == matrix.shape
        np.testing.assert_allclose(scale, np.abs(matrix).max(axis=axes) / 127.5, rtol=1e-6)
        scale = np.expand_dims(scale, axes)
        assert np.all(np.abs(matrix - np.asarray(small[name]) * scale) <= scale * (0.5 + 1e-4))
    assert {name for name in small if name in whole and small[name].dtype != whole[name].dtype} == set(MATRICES)


def test_it_computes_what_the_int8_matrices_stand_for(loaded, quantized):
    wanted = meant(loaded[0], quantized)
    rounding.assert_close(quantized(TOKENS_BT), wanted(TOKENS_BT), rounding.of_logits(wanted.config, 11))
    assert not np.allclose(quantized(TOKENS_BT), loaded[0](TOKENS_BT), atol=1e-4)
    config, key = SamplerConfig(steps=4, gen_length=8, block_length=4), jax.random.key(0)
    tokens = llada_jax.generate(quantized, TOKENS_BT, config, key)
    np.testing.assert_array_equal(tokens, llada_jax.generate(wanted, TOKENS_BT, config, key))


def test_on_a_mesh_it_is_the_same_and_split_like_the_weights(model_folder, quantized, make_mesh):
    sharded = llada_jax.load(model_folder, make_mesh(1, 2, 2), weights="int8")[0]
    for name in MATRICES:
        for part in (name, name + SCALE):
            array = getattr(sharded.blocks, part)[...]
            assert array.sharding.spec == jax.P(None, *meshes.PARAMETERS[part])
            np.testing.assert_array_equal(array, getattr(quantized.blocks, part)[...])
    rounding.assert_close(sharded(TOKENS_BT), quantized(TOKENS_BT), rounding.of_logits(sharded.config, 11))


def test_a_checkpoint_gives_the_same(model_folder, quantized, tmp_path):
    convert(model_folder, tmp_path / "orbax", "orbax")
    same = llada_jax.load(tmp_path / "orbax", weights="int8")[0]
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), split(same)[1], split(quantized)[1]))


def test_in_bfloat16_the_scales_stay_exact(model_folder, quantized):
    half = llada_jax.load(model_folder, dtype="bfloat16", weights="int8")[0]
    cast = int8.in_dtype(half, jnp.dtype("bfloat16"))
    for model in (half, cast):
        assert {str(x.dtype) for x in jax.tree.leaves(split(model)[1])} == {"int8", "float32", "bfloat16"}
        assert model.blocks.ff_proj_scale[...].dtype == jnp.float32
        assert model.embedding[...].dtype == jnp.bfloat16
    logits = half(TOKENS_BT), quantized(TOKENS_BT)
    rounding.assert_close(*logits, rounding.of_logits(half.config, 11) * rounding.BF16_EPS / rounding.EPS)


@pytest.mark.parametrize("alternatives", [None, 2])
def test_the_sampler_keeps_the_scales_exact(monkeypatch, model_folder, alternatives):
    half = llada_jax.load(model_folder, dtype="bfloat16", weights="int8")[0]
    seen, step = [], sampler._reverse_step

    def spy(model, *rest):
        seen.append((model.blocks.q_proj[...].dtype, model.blocks.q_proj_scale[...].dtype))
        return step(model, *rest)

    monkeypatch.setattr(sampler, "_reverse_step", spy)
    config = SamplerConfig(steps=1, gen_length=3, block_length=3)  # of a shape that no other test has compiled
    assert len(list(sampler.denoise_steps(half, TOKENS_BT, config, jax.random.key(0), alternatives=alternatives))) == 2
    assert seen and set(seen) == {(jnp.dtype("int8"), jnp.dtype("float32"))}


def test_likelihoods_take_it(loaded, quantized):
    wanted = meant(loaded[0], quantized)
    pairs = [(TOKENS_BT[0, :5], TOKENS_BT[0, 5:])]
    found = [log_likelihoods(model, pairs, key=jax.random.key(0), samples=4) for model in (quantized, wanted)]
    assert abs(found[0][0].value - found[1][0].value) <= rounding.of_nll(wanted.config, 11, tokens=6)


def test_what_is_refused(monkeypatch, model_folder, quantized, tmp_path):
    with pytest.raises(UserError, match="int8: load it without weights=int8 to write it"):
        huggingface.save_model(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="weights=int4: choose int8"):
        llada_jax.load(model_folder, weights="int4")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "qwix" else find(name, *rest))
    with pytest.raises(UserError, match=r"needs the package qwix: pip install 'llada_jax\[int8\]'"):
        llada_jax.load(model_folder, weights="int8")


def test_the_commands_take_it(model_folder):
    command = [sys.executable, "-m", "llada_jax.sample", f"--model={model_folder}", "--prompt=def", "--weights=int8"]
    done = subprocess.run([*command, "--gen_length=4", "--steps=2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
