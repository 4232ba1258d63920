import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_revoking
import plain_sampler
import pytest
from small_sampler import ENDS, GEN_LENGTH, MASK, SIZES, make_model, padded_prompts, settings

from llada_jax.config import UserError
from llada_jax.devices import mesh
from llada_jax.sampling import revoking
from llada_jax.sampling.canvas import arguments, start
from llada_jax.sampling.plan import plan
from llada_jax.sampling.sampler import denoise_steps, generate
from llada_jax.sampling.settings import REMDM, resolve
from llada_jax.sampling.step import active_block

BOLD = {"commit": "threshold", "commit_bound": 0.3, "block_length": 8}
DRAWN = {"temperature": 0.7}
GUIDED = {"cfg_scale": 0.5, "block_length": 20, **DRAWN}
# Cases that differ in numbers alone share a program.
CASES = {
    "cap": {"revoke": "remdm_cap", "revoke_bound": 0.3, "steps": 11, **DRAWN, "remasking": "random"},
    "rescale": {"revoke": "remdm_rescale", "revoke_bound": 0.6, **GUIDED},
    "rescale-many-steps": {"revoke": "remdm_rescale", "revoke_bound": 0.5, "steps": 50, **GUIDED},
    "conf-stop": {"revoke": "remdm_conf", "stop_at_end": True, "block_length": 4, "steps": 40, **ENDS, **DRAWN},
    "loop": {"revoke": "remdm_loop", "revoke_bound": 0.3, "steps": 60, "block_length": 10, **DRAWN},
    "loop-few-steps": {"revoke": "remdm_loop", "revoke_bound": 0.5, "steps": 7, "block_length": 10, **DRAWN},
    "wino": {"revoke": "wino", **BOLD, "block_length": 16},
    "wino-strict": {"revoke": "wino", **BOLD, "block_length": 16, "revoke_bound": 0.97},
    "wino-guided": {"revoke": "wino", "cfg_scale": 0.5, **DRAWN, **BOLD},
    "wino-stop": {"revoke": "wino", "stop_at_end": True, "logits_eos_inf": True, **ENDS, **BOLD, "commit": "local"},
}


@pytest.fixture(scope="module")
def models(make_mesh):
    """Returns a model that is sure at times, for WINO, and one whose choices are farther than rounding from a tie."""
    return {"wino": make_model(make_mesh(), sharpness=12), "remdm": make_model(make_mesh(), sharpness=3)}


@pytest.fixture(scope="module")
def model(models):
    return models["wino"]


def plain_row(config):
    return plain_revoking.wino if config.revoke == "wino" else plain_revoking.remdm


def taken_back(frames) -> int:
    """Returns how many tokens were taken back."""
    pairs = zip(frames, frames[1:], strict=False)
    return sum(int(((old.tokens_BT != MASK) & (new.tokens_BT == MASK)).sum()) for old, new in pairs)


@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_plain_sampler(models, name):
    """In a batch with padding and gaps, step by step and at once, and one alone."""
    config, key = settings(**CASES[name]), jax.random.key(1)
    model = models["wino" if config.revoke == "wino" else "remdm"]
    prompt_BT, real_BT = prompts = padded_prompts()
    row = plain_row(config)
    expected_BT, expected_B = plain_sampler.generate(model, prompts, config, key, return_steps=True, row=row)
    out_BT, steps_B = generate(model, prompt_BT, config, key, real_BT, return_steps=True)
    np.testing.assert_array_equal(out_BT, expected_BT)
    assert steps_B.tolist() == expected_B
    assert not (np.asarray(out_BT)[:, 4:] == MASK).any()
    frames = list(denoise_steps(model, prompt_BT, config, key, real_BT))
    np.testing.assert_array_equal(frames[-1].tokens_BT, out_BT)
    assert taken_back(frames), "a case in which nothing is taken back shows nothing"
    if name == "cap":  # other shapes, so another program
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(3))
        alone_BT, alone_B = generate(model, prompt_BT[1:2, 4:], config, keys[1:2], return_steps=True)
        np.testing.assert_array_equal(out_BT[1, 4:], alone_BT[0])
        assert alone_B.tolist() == [expected_B[1]]


@pytest.mark.parametrize("name", ["cap", "conf-stop"])
def test_with_bound_zero_there_is_no_rule(models, name):
    prompt_BT, real_BT = padded_prompts()
    # With more steps than a block has tokens, some would be skipped, but only without a rule.
    zero = dataclasses.replace(settings(**CASES[name]), revoke_bound=0.0, steps=7)
    none = dataclasses.replace(zero, revoke="none", revoke_bound=None)
    none, zero = (
        generate(models["remdm"], prompt_BT, c, jax.random.key(3), real_BT, return_steps=True) for c in (none, zero)
    )
    np.testing.assert_array_equal(none[0], zero[0])
    assert none[1].tolist() == zero[1].tolist()


@pytest.mark.parametrize(("name", "cache"), [("loop", "dual"), ("wino", "prefix"), ("wino-guided", "dual")])
def test_a_cache_that_is_refreshed_at_each_step_changes_nothing(model, name, cache):
    prompt_BT, real_BT = padded_prompts()
    exact = settings(**CASES[name])
    fresh = dataclasses.replace(exact, cache=cache, cache_refresh=1)
    stale = dataclasses.replace(exact, cache=cache)
    exact, fresh, stale = (
        generate(model, prompt_BT, c, jax.random.key(3), real_BT, return_steps=True) for c in (exact, fresh, stale)
    )
    np.testing.assert_array_equal(fresh[0], exact[0])
    assert fresh[1].tolist() == exact[1].tolist()
    assert (np.asarray(stale[0]) != np.asarray(exact[0])).any(), "what is stale must change something"
    assert not (np.asarray(stale[0])[:, 4:] == MASK).any()


@pytest.mark.parametrize(("name", "cache", "window"), [("wino", "prefix", 3), ("wino-guided", "dual", 0)])
def test_with_one_layer_nothing_is_ever_stale(make_mesh, name, cache, window):
    """Its keys and values depend on their own tokens alone, so passes over a part of the canvas must be exact.

    With more layers there is nothing to compare such passes with shadows to.
    """
    model = make_model(make_mesh(), dataclasses.replace(SIZES, layers=1), sharpness=12)
    prompt_BT, real_BT = padded_prompts()
    kept = settings(**CASES[name] | {"cache": cache, "suffix_window": window})
    frames = list(denoise_steps(model, prompt_BT, kept, jax.random.key(3), real_BT))
    assert taken_back(frames), "a case in which nothing is taken back shows nothing"
    exact = {"cache_refresh": 1} if window else {"cache": "none"}
    exact_BT = generate(model, prompt_BT, dataclasses.replace(kept, **exact), jax.random.key(3), real_BT)
    np.testing.assert_array_equal(frames[-1].tokens_BT, exact_BT)


def test_shadows_see_the_whole_window(model):
    """A window over all that follows is no window, for shadows as well."""
    prompt_BT, real_BT = padded_prompts()
    free = settings(**CASES["wino"] | {"cache": "prefix"})
    wide = dataclasses.replace(free, suffix_window=GEN_LENGTH)
    free_BT, wide_BT = (generate(model, prompt_BT, c, jax.random.key(3), real_BT) for c in (free, wide))
    np.testing.assert_array_equal(wide_BT, free_BT)


@pytest.mark.parametrize("name", [pytest.param("conf-stop", marks=pytest.mark.slow), "wino"])
def test_eight_devices_are_one(model, make_mesh, name):
    prompt_BT, real_BT = padded_prompts()
    sharded, config = make_model(make_mesh(2, 2, 2), sharpness=12), settings(**CASES[name])
    expected_BT = generate(model, prompt_BT, config, jax.random.key(3), real_BT)
    np.testing.assert_array_equal(generate(sharded, prompt_BT, config, jax.random.key(3), real_BT), expected_BT)


@pytest.mark.parametrize("rule", REMDM)
def test_probability_is_conserved(model, rule):
    """On the average, a share alpha_s is visible after the step, and a share sigma of what was visible is not."""
    rows, width = 4096, 20
    bound = 0.3 if rule != "remdm_conf" else 1.0
    config = settings(revoke=rule, revoke_bound=bound, block_length=width, gen_length=width, steps=10)
    config = resolve(config, model)
    with mesh.mesh_of(model.embedding[...]):
        state, tokens_BT = start(model, np.zeros((rows, 1), int), config, jax.random.key(0), None)
        dials, static = arguments(config)
        visible = 2 * width // 5 if rule != "remdm_loop" else 18
        step = 4 if rule != "remdm_loop" else 6

        @jax.jit
        def drawn(state, tokens_BT, dials):
            tokens_BT = jnp.where(jnp.arange(width + 1) <= visible, 1, tokens_BT)
            now = plan(state, tokens_BT, jnp.full_like(state.masks_B, step), dials.steps, static)
            block = active_block(state, tokens_BT, now, static)
            sure_BT = jnp.zeros_like(tokens_BT) + jnp.arange(width + 1) / width
            memory = revoking.Memory(committed_BT=sure_BT)
            return now, block, revoking.draw(state, now, block, memory, dials.revoke_bound, static)

        now, block, revoked_BK = drawn(state, tokens_BT, dials)
    before, after = int(now.pace.before_B[0]), int(now.pace.after_B[0])
    assert before == visible
    alpha_t, alpha_s = before / width, after / width
    most = min(1.0, (1 - alpha_s) / alpha_t)
    weight = np.exp(-np.arange(1, visible + 1) / width)
    sigma_T = {
        "remdm_cap": np.full(visible, min(bound, most)),
        "remdm_rescale": np.full(visible, bound * most),
        "remdm_conf": most * weight / weight.sum(),
        "remdm_loop": np.full(visible, bound),
    }[rule]
    position_BK, revoked_BK = np.asarray(block.position_BK), np.asarray(revoked_BK)
    share_T = np.array([revoked_BK[position_BK == i].mean() for i in range(1, visible + 1)])
    if rule != "remdm_loop":  # there only two tokens may be masked after the step, but 5.4 are drawn
        error_T = np.sqrt(sigma_T * (1 - sigma_T) / rows)
        np.testing.assert_allclose(share_T, sigma_T, atol=5 * error_T.max())
    # What is committed is the schedule's number and as many as were taken back: for each masked token, the probability
    # of the paper's posterior. What is masked afterwards is the same in each row.
    commits_B = after - before + revoked_BK.sum(axis=1)
    assert (commits_B <= width - before).all() and revoked_BK.sum(axis=1).max() <= width - after
    if rule in ("remdm_cap", "remdm_rescale"):
        posterior = (alpha_s - (1 - sigma_T[0]) * alpha_t) / (1 - alpha_t)
        assert commits_B.mean() / (width - before) == pytest.approx(posterior, abs=0.01)
        stays = (1 - alpha_s - sigma_T[0] * alpha_t) / (1 - alpha_t)
        assert posterior + stays == pytest.approx(1)


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("commit_bound", [0.0, 0.9])
def test_wino_ends_after_as_many_steps_as_tokens(model, bound, commit_bound):
    prompt_BT, real_BT = padded_prompts()
    config = settings(**CASES["wino"] | {"commit_bound": commit_bound, "revoke_bound": bound, "block_length": 5})
    out_BT, steps_B = generate(model, prompt_BT, config, jax.random.key(3), real_BT, return_steps=True)
    assert not (np.asarray(out_BT)[:, 4:] == MASK).any()
    assert (np.asarray(steps_B) <= GEN_LENGTH + (prompt_BT == MASK).sum(axis=1)).all()
    if not bound:  # nothing is taken back, and a step may commit at least five tokens, which is the whole block
        plain = dataclasses.replace(config, revoke="none", revoke_bound=None)
        np.testing.assert_array_equal(out_BT, generate(model, prompt_BT, plain, jax.random.key(3), real_BT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revoke": "no"}, "revoke='no': choose one of none, remdm_cap"),
        ({"revoke_bound": 0.5}, "has no effect with revoke=none"),
        ({"revoke": "remdm_cap", "commit": "threshold"}, "it needs commit=schedule, not threshold"),
        ({"revoke": "wino"}, "it needs commit=threshold"),
        ({"revoke": "remdm_conf", "remasking": "random"}, "needs remasking=low_confidence"),
        ({"revoke": "remdm_cap", "revoke_bound": 1.5}, "revoke_bound=1.5"),
        ({"revoke": "remdm_loop", "revoke_bound": float("nan")}, "revoke_bound=nan"),
        ({"revoke": "remdm_cap", "steps": 10**9}, "at most 100,000,000"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(model, changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        generate(model, np.zeros((1, 2), int), settings(**changes), jax.random.key(0))
