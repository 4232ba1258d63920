"""Tests appended blocks, that a text which has ended needs no further ones, and the words for both."""

import dataclasses

import jax
import numpy as np
import plain_cache
import plain_revoking
import plain_sampler
import pytest
from small_sampler import ENDS, GEN_LENGTH, MASK, PROMPT_LENGTH, make_model, padded_prompts, settings

from llada_jax.config import ModelConfig, SamplerConfig, UserError
from llada_jax.conversation.conversation import Settings
from llada_jax.sampling import lengths
from llada_jax.sampling.sampler import denoise_steps, generate
from llada_jax.sampling.text_completion import Options

KEY = jax.random.key(3)
# An EOS that this model predicts now and then, so that rows end in different blocks, and one end that it predicts less.
SOME = {"eos_id": 11, "eot_id": 22}


CASES = {
    "schedule": {"steps": 16, "remasking": "entropy", "block_length": 3},
    "guided-random": {"cfg_scale": 0.5, "remasking": "random", "temperature": 1.0, "block_length": 5},
    "dual-guided": {"cache": "dual", "commit": "factor", "cfg_scale": 0.5},
    "dual-late-ends": {"cache": "dual", "commit": "local", "confidence_eos_eot_inf": True},
    "remdm": {"revoke": "remdm_cap", "revoke_bound": 0.4, "temperature": 0.7, "remasking": "random"},
    "gaps-prefix": {"cache": "prefix", "cache_refresh": 2, "commit": "threshold", "block_length": 2},
}
SEVERAL_WIDTHS = ("schedule", "gaps-prefix")


def many_gaps():
    """Returns prompts with more MASK tokens than a block has, so that blocks begin in the prompt and end behind it."""
    prompt_BT, real_BT = padded_prompts()
    prompt_BT[:2, 5::2] = MASK
    return prompt_BT, real_BT


@pytest.mark.parametrize("name", CASES)
def test_append_is_the_plain_sampler(sharp, prompts, name, request):
    """In a batch with padding and gaps, step by step and at once, and alone in one case: each case is a program."""
    if name in SEVERAL_WIDTHS:
        request.getfixturevalue("several_widths")
    config = settings(length="append", **SOME, **CASES[name])
    prompt_BT, real_BT = prompts = many_gaps() if "gaps" in name else prompts
    row = plain_revoking.remdm if config.revoke != "none" else plain_sampler.row
    expected_BT, expected_B = plain_sampler.generate(
        sharp, prompts, config, KEY, return_steps=True, passes=plain_cache.Passes, row=row
    )
    out_BT, steps_B = generate(sharp, prompt_BT, config, KEY, real_BT, return_steps=True)
    np.testing.assert_array_equal(out_BT, expected_BT)
    assert steps_B.tolist() == expected_B
    frames = list(denoise_steps(sharp, prompt_BT, config, KEY, real_BT))
    np.testing.assert_array_equal(frames[-1].tokens_BT, out_BT)
    if name == "guided-random":
        keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, np.arange(3))
        alone_BT, alone_B = generate(sharp, prompt_BT[1:2, 4:], config, keys[1:2], return_steps=True)
        np.testing.assert_array_equal(out_BT[1, 4:], alone_BT[0])
        assert alone_B.tolist() == [expected_B[1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"block_length": 4, "steps": 8},
        {"block_length": 8, "commit": "local", "revoke": "wino"},
    ],
    ids=["schedule", "wino"],
)
def test_append_is_one_call_after_the_other(sharp, prompts, changes):
    """Each call has the prompt and what was written before as its prompt, and a canvas of one block."""
    prompt_BT, real_BT = np.where(prompts[0] == MASK, 7, prompts[0]), prompts[1]
    config = settings(length="append", **SOME, **changes)
    size = config.block_length
    one = dataclasses.replace(config, length="fixed", gen_length=size, steps=config.steps * size // GEN_LENGTH)
    expected_BT, ended_B = prompt_BT, np.zeros(3, bool)
    for start in range(0, GEN_LENGTH, size):
        padding = GEN_LENGTH - size - start  # in front, so that all calls have one length and are one program
        seen_BT = np.pad(real_BT, ((0, 0), (0, start)), constant_values=True)
        call = (np.pad(x_BT, ((0, 0), (padding, 0))) for x_BT in (expected_BT, seen_BT))
        new_BT = np.asarray(generate(sharp, next(call), one, KEY, next(call)))[:, -size:]
        new_BT = np.where(ended_B[:, None], config.eos_id, new_BT)
        ended_B |= np.isin(new_BT, list(SOME.values())).any(axis=1)
        expected_BT = np.concatenate([expected_BT, new_BT], axis=1)
    np.testing.assert_array_equal(generate(sharp, prompt_BT, config, KEY, real_BT), expected_BT)
    assert ended_B.any()
    if config.revoke == "none":  # the program of an early stop
        fixed = dataclasses.replace(config, length="fixed", stop_at_end=True)
        fixed_BT = np.asarray(generate(sharp, prompt_BT, fixed, KEY, real_BT))
        assert (fixed_BT != expected_BT).any(), "a case in which nothing differs shows nothing"


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        ("fixed", {}),
        ("append", {"block_length": 8, "commit": "local", "revoke": "wino"}),
        ("append", {"revoke": "wino", "commit": "threshold", "commit_bound": 0.3, "cache": "prefix"}),
    ],
    ids=["none", "wino-append", "wino-append-prefix"],  # but for the last, the same programs as above
)
def test_an_early_stop_takes_nothing_from_the_text(sharp, prompts, length, changes):
    """Up to its first end, a text is the same whether or not the blocks behind it are computed.

    Where there is a plain sampler, it stops as well, and the tests that compare with it show the same.
    """
    config = settings(length=length, **SOME, **{"block_length": 4} | changes)
    # With append, blocks behind the end are computed if no token is an end.
    endless = dataclasses.replace(config, eos_id=MASK - 1, eot_id=None)
    early = dataclasses.replace(config, stop_at_end=True)
    out_BT, steps_B = generate(sharp, prompts[0], early, KEY, prompts[1], return_steps=True)
    all_BT, all_B = generate(sharp, prompts[0], endless, KEY, prompts[1], return_steps=True)
    out_BT, all_BT = (np.asarray(x)[:, PROMPT_LENGTH:] for x in (out_BT, all_BT))
    ended_B = np.isin(all_BT, list(SOME.values())).any(axis=1)
    for row_T, all_T, ended in zip(out_BT, all_BT, ended_B, strict=True):
        end = int(np.isin(all_T, list(SOME.values())).argmax()) + 1 if ended else len(all_T)
        assert row_T[:end].tolist() == all_T[:end].tolist()
        last = (-(-end // config.block_length) + 1) * config.block_length  # a block may begin in the prompt
        assert (row_T[last:] == config.eos_id).all()  # of blocks of 8, there is nothing behind the last
    assert ((np.asarray(steps_B) < np.asarray(all_B)) <= ended_B).all() and (steps_B < all_B).any()


@pytest.mark.slow
def test_eight_devices_are_one(sharp, make_mesh, prompts):
    config = settings(length="append", cache="dual", commit="local", cfg_scale=0.5, **SOME)
    sharded = make_model(make_mesh(2, 2, 2), sharpness=12)
    expected_BT = generate(sharp, prompts[0], config, KEY, prompts[1])
    np.testing.assert_array_equal(generate(sharded, prompts[0], config, KEY, prompts[1]), expected_BT)


def test_blocks_to_come_are_not_shown():
    ids = ModelConfig(mask_id=0, eos_id=9)
    append = SamplerConfig(length="append", block_length=3)

    def shown(tokens, prompt, config=append):
        return lengths.shown(np.array(tokens), np.array(prompt), config, ids)

    assert shown([5, 6, 0, 0, 0, 0, 0], [5, 6]) == shown([5, 6, 7, 0, 7, 0, 0], [5, 6]) == 5
    assert shown([5, 6, 7, 7, 7, 0, 0], [5, 6]) == 7
    assert shown([5, 0, 0, 0, 0, 5, 0, 0, 0], [5, 0, 0, 0, 0, 5]) == 6, "of a prompt with gaps, everything is shown"
    assert shown([5, 1, 1, 1, 0, 5, 0, 0, 0], [5, 0, 0, 0, 0, 5]) == 8
    assert shown([5, 1, 9, 9, 9], [5]) == 5
    assert shown([5, 0, 0, 9, 9], [5], dataclasses.replace(append, length="daedal")) == 3
    assert shown([9, 9, 9], [9], dataclasses.replace(append, length="daedal")) == 1
    assert shown([5, 0, 0, 0, 0, 0], [5], SamplerConfig(block_length=3)) == 6


def test_what_auto_means():
    assert lengths.automatic({"steps": 3}, 100) == {"steps": 3}
    assert lengths.automatic({"gen_length": "auto"}, 100) == {"gen_length": 100, "length": "append"}
    assert lengths.automatic({"gen_length": "auto", "length": "daedal"}, None) == {"length": "daedal"}
    with pytest.raises(UserError, match="gen_length=auto with length=fixed"):
        lengths.automatic({"gen_length": "auto", "length": "fixed"}, 100)
    assert [lengths.automatic_limit(trained) for trained in (None, 4096, 256, 1)] == [1024, 1024, 128, 1]


def test_options_from_python_take_auto():
    assert Options() == Options(length="fixed") and Options().length == "fixed"
    for wrong in ("64", "aut"):
        with pytest.raises(UserError, match=f"gen_length='{wrong}': give a number of tokens, or auto"):
            Options(gen_length=wrong)
    options = Options(gen_length="auto", block_length=8)
    assert (options.gen_length, options.length) == (1024, "append")
    assert dataclasses.replace(options, gen_length=16).sampler(0, 16).length == "append"
    daedal = Options(gen_length="auto", length="daedal", commit="threshold")
    assert (daedal.gen_length, daedal.length) == (1024, "daedal")
    assert Settings(gen_length="auto").checked().gen_length == 1024
    with pytest.raises(UserError, match="gen_length=auto with length=fixed"):
        Options(gen_length="auto", length="fixed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gen_length": "auto"}, "gen_length=auto: SamplerConfig takes the largest number of tokens"),
        ({"length": "long"}, "length='long': choose one of fixed, append, daedal"),
        ({"length": "append"}, "length=append: the model does not say which token is EOS"),
        ({"length": "append", "suffix_window": 3, **ENDS}, "suffix_window=3 with length=append"),
        ({"length": "daedal", **ENDS}, "length=daedal needs commit=threshold, not schedule"),
    ],
)
def test_impossible_settings_are_named(sharp, changes, words):
    with pytest.raises(UserError, match=words):
        generate(sharp, [[1, 2]], settings(**changes), KEY)
