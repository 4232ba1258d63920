"""Tests the sampler against what the published codes of Fast-dLLM and WINO wrote with the same weights."""

import json

import jax
import numpy as np
import pytest
from paths import PARITY

import llada_jax
from llada_jax.config import SamplerConfig

CASES = json.loads((PARITY / "fast_dllm.json").read_text())["cases"]
WINO = json.loads((PARITY / "wino.json").read_text())["cases"]


@pytest.fixture(scope="module")
def model():
    return llada_jax.load(PARITY / "gqa")[0]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", ["schedule", "threshold"])
def test_caches_and_threshold_of_fast_dllm(model, cache, rule):
    seen = 0
    for case in CASES:
        bound = case["threshold"]
        if case["cache"] != cache or (bound is None) != (rule == "schedule"):
            continue
        sizes = {name: case[name] for name in ("steps", "gen_length", "block_length")}
        config = SamplerConfig(**sizes, commit=rule, commit_bound=bound, cache=cache)
        prompt_BT = np.array([case["prompt"]])
        tokens_BT, steps_B = llada_jax.generate(model, prompt_BT, config, jax.random.key(0), return_steps=True)
        assert np.asarray(tokens_BT)[0, prompt_BT.shape[1] :].tolist() == case["tokens"]
        # With a cache, its loop takes a further pass for each block that the first step of the block has filled.
        further = case["passes"] - int(steps_B[0])
        assert 0 <= further <= (case["gen_length"] // case["block_length"] if bound == 0.1 and cache != "none" else 0)
        seen += 1
    assert seen == 4


def test_wino(model):
    """Tokens and passes: the shadows, what is taken back, and how many tokens a step keeps.

    Padding gives all canvases one length, so that there is one program for each length of a block.
    """
    length = max(len(case["prompt"]) + case["gen_length"] for case in WINO) + 1  # so that each prompt has some
    for case in WINO:
        config = SamplerConfig(
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            commit="threshold",
            commit_bound=case["threshold"],
            revoke="wino",
            revoke_bound=case["threshold_back"],
        )
        width = length - case["gen_length"]
        prompt_BT, real_BT = np.zeros((1, width), int), np.arange(width)[None] >= width - len(case["prompt"])
        prompt_BT[real_BT] = case["prompt"]
        tokens_BT, steps_B = llada_jax.generate(model, prompt_BT, config, jax.random.key(0), real_BT, return_steps=True)
        assert np.asarray(tokens_BT)[0, width:].tolist() == case["tokens"]
        assert int(steps_B[0]) == case["passes"]
