"""Tests the rule that finds the length of a row against its published steps, and against its published code."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import plain_daedal
import pytest
from paths import PARITY
from small_sampler import MASK, PROMPT_LENGTH, make_model

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.model.transformer import merge, split
from llada_jax.sampling.sampler import denoise_steps, generate

KEY = jax.random.key(3)


EOS = {"some": 11, "many": 39}  # tokens that the model predicts at some of 64 MASK tokens, or at many
# The settings, what the rows must show, and the seeds of their prompts: some in which no choice is within rounding.
CASES = {
    "insert": ({}, {"insert"}, (0, 101, 200)),
    "guided": ({"eos_id": EOS["some"], "cfg_scale": 0.5, "temperature": 0.7}, {"longer", "insert"}, (0, 105, 201)),
    "at-the-limit": ({"gen_length": 84, "commit_bound": 0.3, "block_length": 20}, {"insert"}, (2, 101, 200)),
    # Below the first length; rows end with EOS and with the end of a turn.
    "stop": (
        {"gen_length": 30, "eos_id": EOS["some"], "eot_id": 17, "stop_at_end": True, "block_length": 8},
        {"fill"},
        (0, 100, 200),
    ),
}


def scaled(model, head: float, eos_id: int, eos_head: float):
    """Returns the model with a larger head, that of EOS even more so."""
    new = merge(*split(model))
    factor_V = np.where(np.arange(model.config.vocab_size) == eos_id, eos_head, 1.0) * head
    new.head[...] = jax.device_put(
        (np.asarray(model.head[...]) * factor_V).astype(np.float32), model.head[...].sharding
    )
    return new


@pytest.fixture(scope="module")
def models(make_mesh):
    """Returns a model for each EOS, which is surer of it than of other tokens."""
    model = make_model(make_mesh(), sharpness=2)
    return {eos_id: scaled(model, 1, eos_id, 4) for eos_id in EOS.values()}


def settings(**changes) -> SamplerConfig:
    given = {"length": "daedal", "commit": "threshold", "gen_length": 120, "block_length": 16, "eos_id": EOS["many"]}
    return SamplerConfig(**(given | changes))


def made(name: str):
    """Returns the settings of a case, what its rows must show, its prompts, and which of their tokens are real."""
    changes, happens, seeds = CASES[name]
    prompt_BT = np.stack([np.random.default_rng(seed).integers(0, MASK, PROMPT_LENGTH) for seed in seeds])
    real_BT = np.ones(prompt_BT.shape, bool)
    real_BT[1, :4] = False
    return settings(**changes), happens, prompt_BT, real_BT


@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_plain_sampler(models, name):
    """In a batch with padding, and one alone; the number of passes of each row is its own."""
    (config, happens, prompt_BT, real_BT), log = made(name), []
    model, keys = models[config.eos_id], jax.vmap(jax.random.fold_in, (None, 0))(KEY, np.arange(3))
    rows = [plain_daedal.row(model, prompt_BT[i], real_BT[i], config, keys[i], log=log) for i in range(3)]
    assert happens <= set(log)
    out_BT, steps_B = generate(model, prompt_BT, config, KEY, real_BT, return_steps=True)
    np.testing.assert_array_equal(out_BT, np.stack([canvas_T for canvas_T, _ in rows]))
    assert steps_B.tolist() == [passes for _, passes in rows]
    if name == "insert":  # other shapes, so another program
        alone_BT, alone_B = generate(model, prompt_BT[1:2, 4:], config, keys[1:2], return_steps=True)
        np.testing.assert_array_equal(out_BT[1, 4:], alone_BT[0])
        assert alone_B.tolist() == [steps_B[1]]


@pytest.mark.parametrize("case", json.loads((PARITY / "daedal.json").read_text())["cases"], ids=lambda c: c["eos"])
def test_same_tokens_as_the_published_code(published, case):
    """EOS exchanges its id with token 26, whatever it is in a case: all cases of the same sizes are one program."""
    eos_id = 26
    model = scaled(published, case["head"], case["eos"], case["eos_head"])
    new = np.arange(model.config.vocab_size)
    new[[eos_id, case["eos"]]] = case["eos"], eos_id
    for name, axis in (("embedding", 0), ("head", 1)):
        weight = getattr(model, name)
        weight[...] = jax.device_put(np.take(np.asarray(weight[...]), new, axis), weight[...].sharding)
    sizes = {name: case[name] for name in ("gen_length", "block_length")}
    prompt_BT, tokens_T = new[[case["prompt"]]], new[case["tokens"]]
    out_BT, steps_B = generate(model, prompt_BT, settings(eos_id=eos_id, **sizes), KEY, return_steps=True)
    written_T = np.asarray(out_BT)[0, prompt_BT.shape[1] :]
    np.testing.assert_array_equal(written_T[: len(tokens_T)], tokens_T)
    assert (written_T[len(tokens_T) :] == eos_id).all()
    assert steps_B.tolist() == [case["passes"]]


@pytest.fixture(scope="module")
def published():
    return llada_jax.load(PARITY / "gqa")[0]


def test_eight_devices_are_one(models, make_mesh):
    config, _, prompt_BT, real_BT = made("insert")
    sharded = scaled(make_model(make_mesh(2, 2, 2), sharpness=2), 1, config.eos_id, 4)
    expected = generate(models[config.eos_id], prompt_BT, config, KEY, real_BT, return_steps=True)
    for x, expected_x in zip(
        generate(sharded, prompt_BT, config, KEY, real_BT, return_steps=True), expected, strict=True
    ):
        np.testing.assert_array_equal(x, expected_x)


def test_what_a_step_tells_moves_with_its_tokens(models):
    """A new token stands where the step says so, even if the same step has made room in front of it.

    The last step has what one call gives, and there are as many as the longest row takes.
    """
    config, _, prompt_BT, real_BT = made("insert")
    frames = list(denoise_steps(models[config.eos_id], prompt_BT, config, KEY, real_BT, alternatives=1))
    moved = 0
    for before, step in itertools.pairwise(frames):
        kept_BT = ~np.isnan(step.probability_BT) & (step.tokens_BT != MASK)
        # At temperature 0, what is kept is what was most probable.
        assert (step.tokens_BT[kept_BT] == step.likely_BTN[kept_BT][:, 0]).all()
        moved += int((kept_BT & (before.tokens_BT != MASK)).sum())
    assert moved, "a case in which no prediction moves shows nothing"
    out_BT, steps_B = generate(models[config.eos_id], prompt_BT, config, KEY, real_BT, return_steps=True)
    np.testing.assert_array_equal(frames[-1].tokens_BT, out_BT)
    assert len(frames) == 1 + max(steps_B.tolist())


def test_nothing_to_write_takes_no_pass(models):
    config, _, prompt_BT, real_BT = made("insert")
    nothing = dataclasses.replace(config, gen_length=0)
    out_BT, steps_B = generate(models[config.eos_id], prompt_BT, nothing, KEY, real_BT, return_steps=True)
    np.testing.assert_array_equal(out_BT, prompt_BT)
    assert steps_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": "dual"}, "length=daedal needs cache=none, not dual"),
        ({"suffix_window": 3}, "length=daedal needs suffix_window=0, not 3"),
        ({"revoke": "wino"}, "length=daedal needs revoke=none, not wino"),
        ({"remasking": "margin"}, "length=daedal needs remasking=low_confidence, not margin"),
        ({"logits_eos_inf": True}, "length=daedal needs logits_eos_inf=False"),
        ({"eos_id": None}, "length=daedal: the model does not say which token is EOS"),
    ],
)
def test_what_does_not_go_together_is_named(models, changes, words):
    with pytest.raises(UserError, match=words):
        generate(models[EOS["many"]], [[1, 2]], settings(**changes), KEY)


def test_gaps_are_refused(models):
    with pytest.raises(UserError, match="length=daedal only continues a prompt"):
        generate(models[EOS["many"]], [[1, MASK, 2]], settings(), KEY)
