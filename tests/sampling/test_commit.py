import dataclasses
import itertools

import jax
import numpy as np
import plain_sampler
import pytest
from small_sampler import ENDS, make_model, settings

from llada_jax.config import UserError
from llada_jax.sampling.commit import RULES, Ranked
from llada_jax.sampling.sampler import denoise_steps, generate


@pytest.fixture(scope="module")
def model(make_mesh):
    return make_model(make_mesh())


def kept(name: str, bound: float, score, entropy=None, position=None) -> np.ndarray:
    """Returns which of the ranked candidates of one row a rule keeps, by one program for each rule and length."""
    score_BK = np.asarray(score, np.float32)[None]
    entropy_BK = np.zeros_like(score_BK) if entropy is None else np.asarray(entropy, np.float32)[None]
    position_K = np.arange(score_BK.shape[1]) if position is None else np.asarray(position)
    return np.asarray(COMPILED[name](Ranked(score_BK, entropy_BK, position_K[None]), np.float32(bound)))[0]


COMPILED = {name: jax.jit(rule.passes) for name, rule in RULES.items()}


def passes(name: str, bound: float, *args) -> int:
    kept_K = kept(name, bound, *args)
    assert (np.diff(kept_K.astype(int)) <= 0).all(), "what is kept is the beginning of the order"
    return int(kept_K.sum())


def test_rules_are_their_formulas():
    """The definitions, written as a search for the largest n, for many drawn scores."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        # Few lengths, because each is compiled anew.
        c = np.sort(rng.uniform(0.3, 1, rng.choice([1, 4, 11])) ** rng.choice([0.02, 0.2, 1]))[::-1]
        h = rng.exponential(rng.choice([0.01, 0.3]), len(c))
        n = range(1, len(c) + 1)
        largest = lambda holds: max((i for i in n if holds(i)), default=0)  # noqa: E731, B023
        assert passes("threshold", 0.8, c) == largest(lambda i: c[i - 1] >= np.float32(0.8))  # noqa: B023
        assert passes("factor", 0.7, c) == largest(lambda i: (i + 1) * (1 - c[i - 1]) < 0.7)  # noqa: B023
        joint = lambda i: c[:i].sum() - (i - 1)  # noqa: E731, B023
        assert passes("frechet", 0.25, c) == largest(lambda i: joint(i) - (1 - c[i - 1]) > 0.25)  # noqa: B023
        assert passes("entropy", 0.3, c, h) == largest(lambda i: h[:i].sum() - h[:i].max() < 0.3)  # noqa: B023


def test_the_last_candidate_alone_can_fail_and_all_can_pass():
    """Published codes of the rule commit one token too many or too few in these cases."""
    assert passes("factor", 1.0, [0.99, 0.99, 0.99, 0.5]) == 3
    assert passes("factor", 1.0, [0.99, 0.99, 0.99, 0.99]) == 4


def test_near_an_anchor_a_lower_score_is_enough():
    scores, position = [0.95, 0.8, 0.79, 0.78, 0.7], [20, 24, 25, 16, 21]
    assert kept("local", 0.9, scores, position=position).tolist() == [True, True, False, True, False]
    assert not kept("local", 0.96, scores, position=position).any()


ONE_BY_ONE = {"threshold": 1.5, "factor": 0.0, "frechet": 1.0, "entropy": 0.0, "local": 1.5}


@pytest.mark.parametrize("name", RULES)
def test_strict_bounds_are_one_token_per_step(sharp, prompts, name):
    """Then the tokens are those of the schedule with a step for each token."""
    key, one = jax.random.key(3), settings(commit=name, commit_bound=ONE_BY_ONE[name])
    out_BT, steps_B = generate(sharp, prompts[0], one, key, prompts[1], return_steps=True)
    assert steps_B.tolist() == [17, 16, 19]
    expected_BT = generate(sharp, prompts[0], settings(steps=60), key, prompts[1])
    np.testing.assert_array_equal(out_BT, expected_BT)


ALL_AT_ONCE = {"threshold": 0.0, "factor": 1e9, "entropy": float("inf"), "local": 0.0}


@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_loose_bounds_fill_a_block_in_one_step(sharp, prompts, name):
    config = settings(commit=name, commit_bound=ALL_AT_ONCE[name])
    out_BT, steps_B = generate(sharp, prompts[0], config, jax.random.key(3), prompts[1], return_steps=True)
    assert steps_B.tolist() == [3, 3, 4]
    expected_BT = generate(sharp, prompts[0], settings(steps=1), jax.random.key(3), prompts[1])
    np.testing.assert_array_equal(out_BT, expected_BT)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in RULES),
        ("threshold", {"temperature": 0.7, "remasking": "margin", "cfg_scale": 0.5, "block_length": 16}),
        ("factor", {"confidence_eos_eot_inf": True, **ENDS}),
        ("entropy", {"remasking": "entropy", "stop_at_end": True, "block_length": 4, **ENDS}),
    ],
    ids="threshold factor frechet entropy local guided-margin late-factor stop-entropy".split(),
)
def test_generate_is_the_plain_sampler(sharp, prompts, name, changes):
    """In a batch with padding, step by step and at once, and one alone; the number of steps of each row is its own."""
    config, key = settings(commit=name, **changes), jax.random.key(3)
    out_BT, steps_B = generate(sharp, prompts[0], config, key, prompts[1], return_steps=True)
    expected_BT, expected_B = plain_sampler.generate(sharp, prompts, config, key, return_steps=True)
    np.testing.assert_array_equal(out_BT, expected_BT)
    assert steps_B.tolist() == expected_B and sum(expected_B) < 17 + 16 + 19, "some step must keep several tokens"
    if config.cfg_scale:  # other shapes, so another program
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(3))
        alone_T, alone = generate(sharp, prompts[0][1:2, 4:], config, keys[1:2], return_steps=True)
        np.testing.assert_array_equal(out_BT[1, 4:], alone_T[0])
        assert alone.tolist() == [expected_B[1]]
    steps = list(denoise_steps(sharp, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(steps[-1][0], out_BT)
    assert len(steps) == 1 + max(expected_B)


def test_scores_of_the_schedule(sharp, prompts):
    key, found = jax.random.key(3), []
    for remasking in ("margin", "entropy"):
        config = settings(steps=4, block_length=19, temperature=0.7, remasking=remasking)
        found.append(np.asarray(generate(sharp, prompts[0], config, key, prompts[1])))
        np.testing.assert_array_equal(found[-1], plain_sampler.generate(sharp, prompts, config, key))
    low = plain_sampler.generate(sharp, prompts, dataclasses.replace(config, remasking="low_confidence"), key)
    for one_BT, other_BT in itertools.combinations([*found, low], 2):
        assert (one_BT != other_BT).any(), "scores that choose alike show nothing"


def test_eight_devices_are_one(sharp, make_mesh, prompts):
    sharded, key = make_model(make_mesh(2, 2, 2), sharpness=12), jax.random.key(3)
    config = settings(commit="entropy", remasking="margin", temperature=0.7, top_k=5, top_p=0.8)
    expected_BT = generate(sharp, prompts[0], config, key, prompts[1])
    np.testing.assert_array_equal(generate(sharded, prompts[0], config, key, prompts[1]), expected_BT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"commit": "best"}, "choose one of schedule, threshold"),
        ({"commit_bound": 0.9}, "has no effect with commit=schedule"),
        ({"commit": "factor", "remasking": "margin"}, "commit=factor needs remasking=low_confidence, not margin"),
        ({"commit": "entropy", "remasking": "random"}, "low_confidence or margin or entropy, not random"),
        ({"commit": "threshold", "commit_bound": float("nan")}, "commit_bound=nan"),
        ({"commit": "threshold", "commit_bound": -0.1}, "commit_bound=-0.1"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"top_p": 0.5}, "top_p has no effect at temperature 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p=nan"),
        ({"top_k": -1, "temperature": 1.0}, "top_k=-1"),
    ],
)
def test_impossible_settings_are_named(model, changes, words):
    with pytest.raises(UserError, match=words):
        generate(model, [[1, 2]], settings(**changes), jax.random.key(0))
