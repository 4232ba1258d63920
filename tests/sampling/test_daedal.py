"""Tests the rule that finds the length of a row against its published steps, and against its published code."""

import dataclasses
import json

import jax
import numpy as np
import plain_daedal
import pytest
from paths import PARITY
from small_sampler import MASK, PROMPT_LENGTH, make_model

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.sampling import daedal
from llada_jax.sampling.sampler import denoise_steps, generate

KEY = jax.random.key(3)
LIMIT = 120


@pytest.fixture(scope="module")
def model(make_mesh):
    return make_model(make_mesh(), sharpness=SHARPNESS)


@pytest.fixture(scope="module")
def prompts():
    prompt_BT, real_BT = np.random.default_rng(0).integers(0, MASK, (3, PROMPT_LENGTH)), np.ones((3, PROMPT_LENGTH), bool)
    real_BT[1, :4] = False
    return prompt_BT, real_BT


def settings(**changes) -> SamplerConfig:
    given = {"length": "daedal", "commit": "threshold", "gen_length": LIMIT, "block_length": 16, "eos_id": EOS}
    return SamplerConfig(**(given | changes))


SHARPNESS, EOS = 12, 22
CASES = {
    "plain": ({}, {"longer", "insert"}),
    "bound": ({"commit_bound": 0.5, "block_length": 20}, {"insert"}),
    "guided": ({"cfg_scale": 0.5}, {"insert"}),
    "sampled": ({"temperature": 0.7}, {"insert"}),
    "stop": ({"stop_at_end": True, "eot_id": 11}, {"longer"}),
    "at-the-limit": ({"gen_length": 70}, {"insert"}),
    "below-the-first-length": ({"gen_length": 30}, {"fill"}),
}


@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_plain_sampler(model, prompts, name):
    """Alone, in a batch with padding, step by step and at once; the number of passes of each row is its own."""
    changes, happens = CASES[name]
    config, log = settings(**changes), []
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, np.arange(3))
    rows = [plain_daedal.row(model, *prompt, config, key, log=log) for *prompt, key in zip(*prompts, keys, strict=True)]
    assert happens <= set(log)
    out_BT, steps_B = generate(model, prompts[0], config, KEY, prompts[1], return_steps=True)
    np.testing.assert_array_equal(out_BT, np.stack([canvas_T for canvas_T, _ in rows]))
    assert steps_B.tolist() == [passes for _, passes in rows]
    frames = list(denoise_steps(model, prompts[0], config, KEY, prompts[1]))
    np.testing.assert_array_equal(frames[-1].tokens_BT, out_BT)
    assert len(frames) == 1 + max(steps_B.tolist())
    alone_BT, alone_B = generate(model, prompts[0][1:2, 4:], config, keys[1:2], return_steps=True)
    np.testing.assert_array_equal(out_BT[1, 4:], alone_BT[0])
    assert alone_B.tolist() == [steps_B[1]]


def test_eight_devices_are_one(model, make_mesh, prompts):
    config = settings(cfg_scale=0.5)
    sharded = make_model(make_mesh(2, 2, 2), sharpness=SHARPNESS)
    expected_BT = generate(model, prompts[0], config, KEY, prompts[1])
    np.testing.assert_array_equal(generate(sharded, prompts[0], config, KEY, prompts[1]), expected_BT)


def test_what_a_step_tells_moves_with_its_tokens(model, prompts):
    """A new token stands where the step says so, even if the same step has made room in front of it."""
    frames = list(denoise_steps(model, prompts[0], settings(), KEY, prompts[1], alternatives=1))
    moved = 0
    for before, step in zip(frames, frames[1:], strict=False):
        told_BT = ~np.isnan(step.probability_BT)
        kept_BT = told_BT & (step.tokens_BT != MASK)
        # At temperature 0, what is kept is what was most probable.
        assert (step.tokens_BT[kept_BT] == step.likely_BTN[kept_BT][:, 0]).all()
        moved += int((told_BT & (before.tokens_BT != MASK)).sum())
    assert moved, "a case in which no prediction moves shows nothing"


def test_a_new_value_compiles_nothing_and_nothing_to_write_takes_no_pass(model, prompts):
    nothing = settings(gen_length=0)
    out_BT, steps_B = generate(model, prompts[0], nothing, KEY, prompts[1], return_steps=True)
    np.testing.assert_array_equal(out_BT, prompts[0])
    assert steps_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", json.loads((PARITY / "daedal.json").read_text())["cases"], ids=str)
def test_same_tokens_as_the_published_code(published, case):
    config = SamplerConfig(
        length="daedal",
        commit="threshold",
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        eos_id=case["eos"],
    )
    tokens_BT, steps_B = llada_jax.generate(
        published, np.array([case["prompt"]]), config, jax.random.key(0), return_steps=True
    )
    start, length = len(case["prompt"]), len(case["tokens"])
    assert np.asarray(tokens_BT)[0, start : start + length].tolist() == case["tokens"]
    assert (np.asarray(tokens_BT)[0, start + length :] == case["eos"]).all()
    assert steps_B.tolist() == [case["passes"]]


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
def test_what_does_not_go_together_is_named(model, changes, words):
    with pytest.raises(UserError, match=words):
        generate(model, [[1, 2]], settings(**changes), KEY)


def test_gaps_are_refused(model):
    with pytest.raises(UserError, match="length=daedal only continues a prompt"):
        generate(model, [[1, MASK, 2]], settings(), KEY)
    assert daedal.FIRST == 64
