"""Tests the training of autoregressive models: the same trainer, with the next token as the objective."""

import dataclasses
import json
import math
from runpy import run_path

import jax
import numpy as np
import pytest
import rounding
import tiny
from paths import ROOT
from runs import assert_same_run, state_of, terminate, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.config import Config, ModelConfig, UserError, ValidationConfig
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh as meshes
from llada_jax.formats.conversion import convert
from llada_jax.model.transformer import parameter_count, split
from llada_jax.sampling.text_completion import Options, complete
from llada_jax.scoring import bound
from llada_jax.scoring.likelihood import log_likelihoods
from llada_jax.training import config_check, flops, summary

CAUSAL = {
    "model__causal": True,
    "diffusion__objective": "next_token",
    "sampling__steps": 64,
    "sampling__block_length": 32,
    "checkpoint__keep": 5,
    "logging__buckets": 10,
}
TUNED = {
    "diffusion__objective": "next_token_sft",
    "diffusion__random_length_every": 0,
    "model__layers": 0,
    "init_weights_only": True,
    "sequence_length": 64,
    "sampling__prompts": ("repeat: fox",),
    "sampling__steps": 64,
    "sampling__block_length": 32,
    "logging__buckets": 10,
    "steps": 10,
}


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """Returns the workdir of an uninterrupted causal run. Do not change it."""
    folder = tmp_path_factory.mktemp("causal") / "run"
    assert run(folder, **CAUSAL) == entry_point.FINISHED
    return folder


def test_it_learns_and_a_stopped_run_continues_bitwise(run, trained, tmp_path):
    records = tiny.records(trained)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] > math.log(300) - 1 and losses[-1] < losses[0] - 1
    with when_done(12, terminate):
        assert run(tmp_path / "run", **CAUSAL) == 143
    assert run(tmp_path / "run", **CAUSAL) == entry_point.FINISHED
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.slow
def test_meshes_and_accumulation_give_the_same_losses(run, trained, tmp_path):
    settings = CAUSAL | {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 1, "accumulation": 2}
    assert run(tmp_path / "run", devices=4, **settings) == entry_point.FINISHED
    ours, theirs = (
        [record["loss"] for record in tiny.records(folder) if "loss" in record]
        for folder in (tmp_path / "run", trained)
    )
    np.testing.assert_allclose(ours, theirs, rtol=rounding.LATER_STEPS)


def test_validation_is_the_exact_likelihood(trained):
    model, _ = llada_jax.load(trained)
    rng = np.random.default_rng(5)
    tokens_NT = rng.integers(3, 300, (5, 16)).astype(np.int32)
    length_N, prompt_N = np.array([16, 9, 16, 4, 2], np.int32), np.array([0, 3, 5, 0, 0], np.int32)
    rows = HeldOut(tokens_NT, length_N, prompt_N, np.array([40, 20, 0, 9, 3], np.int64))
    first_N = np.maximum(prompt_N, 1)
    requests = [(x[:p], x[p:n]) for x, p, n in zip(tokens_NT, first_N, length_N, strict=True)]
    nats = -sum(score.value for score in log_likelihoods(model, requests, key=jax.random.key(0)))
    graphdef, params = split(model)
    with meshes.mesh_of(model.embedding[...]):
        found = bound.validate(graphdef, params, rows, ValidationConfig(), batch_size=2, chunk=8, mask_id=None)
    assert found["nats_per_token"] == pytest.approx(nats / (length_N - first_N).sum(), rel=1e-5)
    in_bytes = 40 * 15 / 16 + 20 + 9 * 3 / 4 + 3 / 2
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / in_bytes, rel=1e-5)


def test_a_trained_model_is_loaded_published_and_writes(trained, tmp_path, capsys):
    model, tokenizer = llada_jax.load(trained)
    assert model.config.causal
    (text,) = complete(model, tokenizer, ["the fox"], Options(gen_length=8), jax.random.key(0))
    convert(trained, tmp_path / "out", "huggingface")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["mask_token_id"] is None
    again, their_tokenizer = llada_jax.load(tmp_path / "out")
    assert again.config.causal
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(model)[1])
    assert complete(again, their_tokenizer, ["the fox"], Options(gen_length=8), jax.random.key(0)) == [text]
    for changes, words in (
        ({"steps": 4}, "steps=4: this model is causal"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0: this"),
    ):
        with pytest.raises(UserError, match=words):
            complete(model, tokenizer, ["the fox"], Options(gen_length=8, **changes), jax.random.key(0))
    with pytest.raises(UserError, match=r"a prompt contains \[MASK\], but this model is causal"):
        complete(model, tokenizer, ["the [MASK]"], Options(gen_length=8), jax.random.key(0))


def test_adapters_and_conversations(run, trained, tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "repeat: fox"}, {"role": "assistant", "content": "fox"}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(40)))
    sets = {"sequence_length": 64, "validation_fraction": 0.0, "too_long": "cut", "workers": 1, "progress": False}
    prepare_chat([str(path)], tmp_path / "set", tokenizer=str(trained), **sets)
    settings = TUNED | {"init_from": str(trained), "data__path": str(tmp_path / "set"), "model__lora__rank": 4}
    settings |= {"optimizer__peak_learning_rate": 3e-2}
    assert run(tmp_path / "run", **settings) == entry_point.FINISHED
    losses = [record["loss"] for record in tiny.records(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    params = [name for name in state_of(tmp_path / "run") if name.startswith(".params")]
    assert params and all(name.endswith(("_a']", "_b']")) for name in params)
    assert llada_jax.load(tmp_path / "run")[0].config.causal


def test_the_first_row_is_shown_without_masks(trained, make_mesh):
    config = tiny.get_config()
    config.diffusion.objective = "next_token"
    tokenizer = llada_jax.load(trained)[1]
    with jax.set_mesh(make_mesh()):
        tokens_BT, length_B = meshes.place_rows(np.full((8, 32), 40, np.int32), np.full(8, 20, np.int32))
        text = summary.first_batch(config, {"tokens": tokens_BT, "length": length_B}, tokenizer, 3)
    assert text.startswith("first row of step 3: 20 tokens, 19 are predicted\n  text: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective": "pretrain"},
            r"objective=pretrain: the model is causal \(config.model.causal=True\), so choose next",
        ),
        ({"eps": 0.1}, "diffusion.eps=0.1 is about MASK"),
        ({"t_range": (0.2, 0.8)}, r"diffusion.t_range=\(0.2, 0.8\) is about MASK"),
        ({"loss_weight": "count"}, "diffusion.loss_weight=count is about MASK"),
        ({"complementary": True}, "diffusion.complementary=True is about MASK"),
    ],
)
def test_settings_about_masks_are_refused(changes, words):
    config = Config()
    config.model = ModelConfig(2, 32, 4, 2, feed_forward=64, vocab_size=128, causal=True)
    config.data.path = "set"
    config.diffusion = dataclasses.replace(config.diffusion, **{"objective": "next_token", **changes})
    with pytest.raises(UserError, match=words):
        config_check.validate(config)
    config.diffusion.objective, config.model.causal = "next_token", False
    with pytest.raises(
        UserError, match="objective=next_token: the model is not causal .*choose pretrain or sft or sft_wh"
    ):
        config_check.validate(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, causal=True))
    config.diffusion = dataclasses.replace(Config().diffusion, objective="next_token")
    config.sampling.prompts = ("a [MASK]",)
    with pytest.raises(UserError, match="sampling.prompts: .* a causal model fills in nothing"):
        config_check.validate(config)
    config.sampling.prompts = ()
    for group, name in (("logging", "buckets"), ("validation", "seed")):
        changed = dataclasses.replace(getattr(config, group), **{name: 3})
        with pytest.raises(UserError, match=f"config.{group}.{name}=3 is about MASK"):
            config_check.validate(dataclasses.replace(config, **{group: changed}))
    config.sequence_length = 1
    with pytest.raises(UserError, match="config.sequence_length=1 leaves nothing to predict: .* at least 2"):
        config_check.validate(config)


def test_a_folder_of_the_other_attention_is_named(run, trained, causal_folder, model_folder, tmp_path):
    """Whether it is a workdir or published, and whether the config or the folder says what the architecture is."""
    full = "holds an autoregressive model .causal attention.: set config.model.causal=True and .*=next_token"
    for source in (trained, causal_folder):
        with pytest.raises(UserError, match=f"config.model.causal is False, but {source} {full}"):
            run(tmp_path / "run", init_from=str(source))
    with pytest.raises(UserError, match=rf"objective=pretrain: the model is causal \(.*=True, as in {trained}\)"):
        run(tmp_path / "run", init_from=str(trained), model__layers=0)
    causal = "holds a masked diffusion model .full attention.: set config.model.causal=False and .*=pretrain or sft"
    for settings in (CAUSAL, CAUSAL | {"model__layers": 0, "init_weights_only": True}):
        with pytest.raises(UserError, match=f"config.model.causal is True, but {model_folder} {causal}"):
            run(tmp_path / "run", init_from=str(model_folder), **settings)


def test_what_no_family_has_is_refused_before_the_training():
    config = Config()
    config.data.path, config.model.vocab_size = "set", 128
    config.model.qkv_bias = True
    config_check.validate(config)
    config.model.qk_norm = True
    with pytest.raises(UserError, match="model.qk_norm=True with model.qkv_bias=True: no published family has both"):
        config_check.validate(config)


def test_a_scaling_as_a_list_is_refused_before_it_is_hashed():
    config = Config()
    config.data.path, config.model.vocab_size = "set", 128
    config.model.rope_scaling = [8.0, 1.0, 4.0, 8192.0]
    with pytest.raises(UserError, match=r"config.model.rope_scaling=\[8.0, .* must be a tuple"):
        config_check.validate(config)
    config.model.rope_scaling = (8.0, 1.0, 4.0, 8192.0)
    config_check.validate(config)


def test_flops_count_half_of_attention():
    model = ModelConfig(2, 32, 4, 2, feed_forward=64, vocab_size=128, causal=True)
    whole = dataclasses.replace(model, causal=False)
    assert flops.flops_per_token(whole, 64) - flops.flops_per_token(model, 64) == 12 * 2 * 64 * 32 / 2
    wide = dataclasses.replace(model, head_size=16)
    matmuls = 6 * 2 * 2 * 32 * (4 + 2) * 8
    assert flops.flops_per_token(wide, 64) - flops.flops_per_token(model, 64) == matmuls + 12 * 2 * 32 * 32


def test_the_published_baselines():
    sizes = {"arm_7b": 6_834_851_840, "arm_1b": 1_487_243_264}
    for name, size in sizes.items():
        config = run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
        config_check.validate(config)
        assert parameter_count(config.model) == size and config.model.causal
    assert config.optimizer.peak_learning_rate == 4e-4
