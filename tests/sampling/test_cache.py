import dataclasses

import jax
import numpy as np
import plain_cache
import plain_sampler
import pytest
from small_sampler import ENDS, GEN_LENGTH, MASK, PROMPT_LENGTH, make_model, settings

from llada_jax.config import UserError
from llada_jax.devices import hardware
from llada_jax.sampling.cache import widths
from llada_jax.sampling.sampler import denoise_steps, generate


@pytest.fixture(scope="module")
def gaps():
    """Returns prompts with MASK tokens all over, to be filled in."""
    rng = np.random.default_rng(1)
    prompt_BT, real_BT = rng.integers(0, MASK, (3, 20)), np.ones((3, 20), bool)
    prompt_BT[rng.uniform(size=prompt_BT.shape) < 0.5] = MASK
    real_BT[1, :4] = False
    return prompt_BT, real_BT


FILL_IN = {"gen_length": 0, "block_length": 4}
CASES = {
    "dual-threshold": {"cache": "dual", "commit": "threshold"},
    "dual-one-block": {"cache": "dual", "commit": "factor", "block_length": 32, "confidence_eos_eot_inf": True, **ENDS},
    "prefix-refreshed": {"cache": "prefix", "cache_refresh": 2, "commit": "frechet"},
    "dual-window-guided": {"cache": "dual", "suffix_window": 3, "commit": "threshold", "cfg_scale": 0.5},
    "window-stop": {"suffix_window": 2, "commit": "entropy", "stop_at_end": True, "block_length": 4, **ENDS},
    "gaps-dual": {"cache": "dual", "cache_refresh": 3, "temperature": 0.7, "remasking": "random", **FILL_IN},
    "gaps-prefix-window": {"cache": "prefix", "suffix_window": 2, "commit": "local", **FILL_IN},
}
EXACT = ("prefix-refreshed", "gaps-dual")  # with a second program, which has no cache


@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_plain_sampler_with_stale_keys(sharp, prompts, gaps, name):
    """In a batch with padding, step by step and at once, and one alone; the number of passes of each row is its own."""
    config, key, made = settings(**CASES[name]), jax.random.key(3), []
    prompt_BT, real_BT = prompts = gaps if "gaps" in name else prompts

    def passes():
        made.append(plain_cache.Passes())
        return made[-1]

    expected_BT, expected_B = plain_sampler.generate(sharp, prompts, config, key, return_steps=True, passes=passes)
    assert min(len(row.fed) for row in made) > 1 and min(min(row.fed) for row in made) < PROMPT_LENGTH + GEN_LENGTH
    out_BT, steps_B = generate(sharp, prompt_BT, config, key, real_BT, return_steps=True)
    np.testing.assert_array_equal(out_BT, expected_BT)
    assert steps_B.tolist() == expected_B
    frames = list(denoise_steps(sharp, prompt_BT, config, key, real_BT))
    np.testing.assert_array_equal(frames[-1][0], out_BT)
    # In some passes, a row that needs a full pass waits for the others.
    assert max(expected_B) < len(frames) <= 1 + sum(expected_B)
    if name == "gaps-dual":  # other shapes, so another program
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(3))
        alone_BT, alone_B = generate(sharp, prompt_BT[1:2, 4:], config, keys[1:2], return_steps=True)
        np.testing.assert_array_equal(out_BT[1, 4:], alone_BT[0])
        assert alone_B.tolist() == [expected_B[1]]
    if name in EXACT:  # refreshed at each step, with the same program
        exact = dataclasses.replace(config, cache="none", cache_refresh=0)
        exact_BT, exact_B = generate(sharp, prompt_BT, exact, key, real_BT, return_steps=True)
        assert (np.asarray(exact_BT) != np.asarray(out_BT)).any(), "what is stale must change something"
        fresh = dataclasses.replace(config, cache_refresh=1)
        fresh_BT, fresh_B = generate(sharp, prompt_BT, fresh, key, real_BT, return_steps=True)
        np.testing.assert_array_equal(fresh_BT, exact_BT)
        assert fresh_B.tolist() == exact_B.tolist()


def test_a_window_over_all_that_follows_is_no_window(sharp, prompts):
    free = settings(**CASES["dual-threshold"])
    wide = dataclasses.replace(free, suffix_window=GEN_LENGTH)
    free_BT, wide_BT = (generate(sharp, prompts[0], c, jax.random.key(3), prompts[1]) for c in (free, wide))
    np.testing.assert_array_equal(wide_BT, free_BT)


@pytest.mark.parametrize("name", ["dual-threshold", pytest.param("dual-window-guided", marks=pytest.mark.slow)])
def test_eight_devices_are_one(sharp, make_mesh, prompts, name):
    """With what is stale, and refreshed at each step."""
    sharded, key = make_model(make_mesh(2, 2, 2), sharpness=12), jax.random.key(3)
    for config in (settings(**CASES[name]), settings(**CASES[name], cache_refresh=1)):
        expected_BT = generate(sharp, prompts[0], config, key, prompts[1])
        np.testing.assert_array_equal(generate(sharded, prompts[0], config, key, prompts[1]), expected_BT)


def test_widths_are_few_and_end_with_all():
    assert widths(1256, 32, (1 / 16, 1 / 4, 1)) == [80, 320, 1256]
    assert widths(25, 6, (1 / 16, 1 / 4, 1)) == [8, 25]
    assert widths(5, 5, (1 / 4, 1)) == [5]


def test_keys_and_values_that_do_not_fit_are_refused(sharp, prompts, monkeypatch):
    config, key = settings(**CASES["dual-window-guided"]), jax.random.key(0)
    # Streams, copies because of the window, keys and values, rows, slots, layers x kv heads x width, bytes.
    takes = 2 * 2 * 2 * 3 * 25 * (2 * 2 * 8) * 4
    monkeypatch.setattr(hardware, "free_memory", lambda device: takes)
    generate(sharp, prompts[0], config, key, prompts[1])
    monkeypatch.setattr(hardware, "free_memory", lambda device: takes - 1)
    with pytest.raises(UserError, match="cache=dual: the keys and values of 3 rows of 25 tokens take 0.0 GB"):
        generate(sharp, prompts[0], config, key, prompts[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": "suffix"}, "cache='suffix': choose one of none, prefix, dual"),
        ({"cache_refresh": 4}, "cache_refresh=4 has no effect with cache=none"),
        ({"cache": "dual", "cache_refresh": -1}, "cache_refresh=-1"),
        ({"suffix_window": -1}, "suffix_window=-1"),
    ],
)
def test_impossible_settings_are_named(sharp, changes, words):
    with pytest.raises(UserError, match=words):
        generate(sharp, [[1, 2]], settings(**changes), jax.random.key(0))
