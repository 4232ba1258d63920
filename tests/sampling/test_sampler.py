import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import plain_sampler
import pytest
import small_sampler
from paths import PARITY
from small_sampler import ENDS, GEN_LENGTH, MASK, PROMPT_LENGTH, padded_prompts

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.model.transformer import merge, split
from llada_jax.sampling import canvas, sampler, step
from llada_jax.sampling.sampler import denoise, denoise_steps, generate
from llada_jax.sampling.settings import resolve

SIZES = dataclasses.replace(small_sampler.SIZES, token_count=62)


def make_model(mesh):
    return small_sampler.make_model(mesh, SIZES)


@pytest.fixture(scope="module")
def model(make_mesh):
    return make_model(make_mesh())


@pytest.fixture(scope="module")
def prompts():
    """Returns three left-padded prompts. Two of them contain MASK tokens, and so does the padding."""
    prompt_BT, real_BT = padded_prompts()
    prompt_BT[1, 2] = MASK  # in the padding, so it is not filled in
    return prompt_BT, real_BT


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(**({"steps": 11, "gen_length": GEN_LENGTH, "block_length": 6} | changes))


# Each kind of settings is a program of its own. What other tests look at as well, they compile no second time.
INFILLING = {"gen_length": 0, "steps": 2, "block_length": 2, "cfg_scale": 0.5, "temperature": 0.7}
INFILLING["remasking"] = "random"
NO_ENDS = {"logits_eos_inf": True, "eos_id": 22, "end_ids": (11,)}
LATE_ENDS = {"confidence_eos_eot_inf": True, "temperature": 1.3, "end_ids": (39,), **ENDS}
# EOS appears before its block is finished.
STOPPING = {"stop_at_end": True, "block_length": 5, "steps": 19, "eos_id": 22, "end_ids": (11,)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 60},
        {"steps": 2},
        {"temperature": 0.7, "remasking": "random"},
        {"temperature": 1.3},
        {"cfg_scale": 1.5},
        NO_ENDS,
        LATE_ENDS,
        STOPPING,
        INFILLING,
    ],
    ids="uneven surplus fewer-than-blocks random sampled guided no-ends late-ends "
    "stop-after-the-block infilling".split(),
)
def test_generate_is_the_plain_sampler(model, prompts, changes):
    config, key = settings(**changes), jax.random.key(3)
    out_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(out_BT, plain_sampler.generate(model, prompts, config, key))
    prompt_BT = out_BT[:, :PROMPT_LENGTH]
    kept_BT = (prompts[0] != MASK) | ~prompts[1]
    assert (prompt_BT == prompts[0])[kept_BT].all() and (prompt_BT != MASK)[~kept_BT].all()


def test_a_row_is_the_same_alone_as_in_a_batch(model, prompts):
    config = settings(temperature=1.0)
    prompt_BT, real_BT = prompts
    keys = jax.random.split(jax.random.key(5), 3)
    together_BT = np.asarray(generate(model, prompt_BT, config, keys, real_BT))
    alone_T = np.asarray(generate(model, prompt_BT[1:2, 4:], config, keys[1:2]))[0]
    np.testing.assert_array_equal(together_BT[1, 4:], alone_T)
    np.testing.assert_array_equal(together_BT[1, :4], prompt_BT[1, :4])
    order = np.array([1, 2, 0])  # the row has another place in the batch
    moved_BT = np.asarray(generate(model, prompt_BT[order], config, keys[order], real_BT[order]))
    np.testing.assert_array_equal(moved_BT, together_BT[order])
    twice = np.array([0, 0, 1])
    same_BT = np.asarray(generate(model, prompt_BT[twice], config, jax.random.key(5), real_BT[twice]))
    assert (same_BT[0] != same_BT[1]).any(), "rows that share one key must not share their noise"


@pytest.mark.parametrize("changes", [NO_ENDS, LATE_ENDS], ids=["never", "late"])
def test_rules_for_ends_change_what_comes_out(model, prompts, changes):
    key, ruled = jax.random.key(3), settings(**changes)
    free = settings(temperature=ruled.temperature)
    ruled_BT, free_BT = (np.asarray(generate(model, prompts[0], c, key, prompts[1])) for c in (ruled, free))
    assert (ruled_BT != free_BT).any()
    ends = [ruled.eos_id, *ruled.end_ids]
    assert set(ends) <= set(free_BT[:, PROMPT_LENGTH:].ravel().tolist())
    if ruled.logits_eos_inf:
        assert not np.isin(ruled_BT[:, PROMPT_LENGTH:], ends).any()


def test_blocks_after_the_end_are_not_computed(model, prompts):
    """Both rows reach an end. The program stops when the later one does, and fills the rest with EOS."""
    rows, key = np.array([1, 2, 2]), jax.random.key(3)
    prompt_BT, real_BT = batch = tuple(x[rows] for x in prompts)
    stopping = settings(**STOPPING)
    endless = dataclasses.replace(stopping, stop_at_end=False)
    whole_BT, whole_B = plain_sampler.generate(model, batch, endless, key, return_steps=True)
    stopped_BT = np.asarray(generate(model, prompt_BT, stopping, key, real_BT))
    steps = list(denoise_steps(model, prompt_BT, stopping, key, real_BT))
    np.testing.assert_array_equal(steps[-1][0], stopped_BT)
    assert len(steps) < 1 + max(whole_B)
    for whole_T, stopped_T in zip(whole_BT[:, PROMPT_LENGTH:], stopped_BT[:, PROMPT_LENGTH:], strict=True):
        end = int(np.isin(whole_T, (22, 11)).argmax())
        np.testing.assert_array_equal(stopped_T[: end + 1], whole_T[: end + 1])
        assert (stopped_T[end + 10 :] == 22).all() and MASK not in stopped_T
    assert (stopped_BT != whole_BT).any()


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_tokens_are_those_of_the_published_code(name, case):
    """The cases also cover guidance, EOS and EoT as the least confident tokens, left padding, and uneven steps.

    No choice in them is closer than rounding. The best two tokens of a position differ by at least 8.8e-4 in their
    logits, with guidance by 3.8e-3, and the last chosen position differs from the next one by at least 1.8e-3 in the
    logarithm of the probability. Scores are of size 4 and logits of size 2, so that the difference of two logits has an
    error of at most 2 * 2 * rounding.of_logits(config, 48, score=4) = 6.8e-4, and three times that with guidance. The
    logits of the published code differ by 3.3e-5 at most from those of this code on an AVX2 machine.
    """
    model, _ = llada_jax.load(PARITY / name)
    cases = np.load(PARITY / name / "cases.npz")
    config = llada_jax.SamplerConfig(**json.loads(str(cases["settings"]))[case], eot_id=501)
    key = jax.random.key(0)
    out_BT = generate(model, cases["prompt"], config, key, cases["prompt_mask"])
    np.testing.assert_array_equal(out_BT, cases[f"gen{case}"])
    if config.cfg_scale and name == "gqa":
        alone_BT = generate(model, cases["prompt"][1:, 9:], config, key)  # neither padding nor a prompt mask
        np.testing.assert_array_equal(alone_BT[0], cases[f"gen{case}"][1, 9:])


def test_step_by_step_is_one_call(model, prompts):
    config, key = settings(temperature=0.7, remasking="random"), jax.random.key(3)
    one_call_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    COMPILED.clear()
    steps = list(denoise_steps(model, prompts[0], config, key, prompts[1]))
    assert not COMPILED
    np.testing.assert_array_equal(steps[-1][0], one_call_BT)
    expected = [plain_sampler.schedule(masks, config.steps, config.block_length) for masks in (17, 16, 19)]
    counts = [step.new_BT.sum(axis=1).tolist() for step in steps[1:]]
    assert counts == [[step[2] if step else 0 for step in row] for row in itertools.zip_longest(*expected)]
    for before, after in itertools.pairwise(steps):
        same_BT = before.tokens_BT == after.tokens_BT
        assert same_BT[~after.new_BT].all() and (before.tokens_BT == MASK)[after.new_BT].all()


def test_a_single_token(model):
    """The smallest possible shapes, one row with one MASK token, work too."""
    config, key = settings(gen_length=1, block_length=1, steps=1), jax.random.split(jax.random.key(0), 2)
    prompt_BT = np.zeros((2, 0), int)
    two_BT = np.asarray(generate(model, prompt_BT, config, key))
    np.testing.assert_array_equal(generate(model, prompt_BT[:1], config, key[:1]), two_BT[:1])


def test_nothing_to_fill(model):
    prompt_BT = np.arange(10).reshape(2, 5)
    config = settings(gen_length=0)
    np.testing.assert_array_equal(generate(model, prompt_BT, config, jax.random.key(0)), prompt_BT)
    assert len(list(denoise_steps(model, prompt_BT, config, jax.random.key(0)))) == 1
    assert generate(model, prompt_BT[:, :0], config, jax.random.key(0)).shape == (2, 0)


def test_new_values_compile_nothing(model, prompts):
    COMPILED.clear()
    jax.jit(lambda x: x + 1)(np.zeros(77))
    assert COMPILED, "the listener must count compilations"
    generate(model, prompts[0], settings(temperature=0.7), jax.random.key(0), prompts[1])
    COMPILED.clear()
    other, key = settings(temperature=0.2, steps=5), jax.random.key(1)
    with jax.transfer_guard("disallow"):  # as in the training loop
        generate(model, (prompts[0] + 1) % MASK, other, key, prompts[1])
    list(itertools.islice(denoise_steps(model, prompts[0], other, jax.random.key(2), prompts[1]), 3))
    assert not COMPILED


def test_eight_devices_are_one(model, make_mesh, prompts):
    """Tokens and noise are the same when rows, parameters and vocabulary are split over eight devices."""
    config, key = settings(temperature=0.7, remasking="random"), jax.random.key(3)
    mesh = make_mesh(2, 2, 2)
    sharded = make_model(mesh)
    expected_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(generate(sharded, prompts[0], config, key, prompts[1]), expected_BT)
    COMPILED.clear()
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):  # as when a trainer calls it
        live_BT = generate(merge(*split(sharded)), prompts[0], config, key, prompts[1])
    assert not COMPILED
    np.testing.assert_array_equal(live_BT, expected_BT)


def test_the_head_in_chunks_is_the_head_at_once(model, prompts, monkeypatch):
    config, key = settings(temperature=1.0), jax.random.key(3)
    at_once_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    monkeypatch.setattr(step, "HEAD_CHUNK", 4)
    anew = dataclasses.replace(config, eos_id=0)  # it means nothing here, but makes it another program
    before = denoise._cache_size()
    np.testing.assert_array_equal(generate(model, prompts[0], anew, key, prompts[1]), at_once_BT)
    assert denoise._cache_size() == before + 1


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Returns the shapes of all arrays in a jaxpr and in the jaxprs inside it."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {getattr(v.aval, "shape", ()) for v in equation.outvars}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                shapes |= shapes_in(inner)
    return shapes


def test_the_head_sees_the_active_block_only(model, prompts):
    config = resolve(settings(), model)
    with sampler.mesh.mesh_of(model.embedding[...]):
        rows, state = sampler.begin(model, prompts[0], config, jax.random.key(0), prompts[1])
        dials, static = canvas.arguments(config)
        one = canvas.scalar(1)
        closed = jax.make_jaxpr(lambda m, r, s: denoise(m, r, s, one, dials, config=static))(model, rows, state)
    logits = {shape for shape in shapes_in(closed.jaxpr) if shape[:1] == (3,) and shape[-1] == SIZES.vocab_size}
    assert logits == {(3, 6, SIZES.vocab_size)}


def test_equal_scores_go_to_the_lowest_position(model, prompts):
    params = split(model)[1]
    params["head"] = jnp.zeros_like(params["head"])
    flat = merge(split(model)[0], params)
    prompt_BT = np.zeros_like(prompts[0])
    steps = list(denoise_steps(flat, prompt_BT, settings(steps=60), jax.random.key(0), prompts[1]))
    for row in range(3):
        assert [int(step.new_BT[row].argmax()) for step in steps[1:]] == list(range(9, 25))
    assert (steps[-1][0] == 0).all()


def with_holes(model, **changes):
    changed = merge(*split(model))
    changed.config = dataclasses.replace(model.config, **changes)
    return changed


def test_never_a_token_that_is_none(model, prompts):
    """MASK, ids in holes and those that only fill up the vocabulary are never chosen.

    The temperature is so high that all tokens are about equally probable.
    """
    few = with_holes(model, holes=((1, 3), (6, 58)), mask_id=5)
    prompt_BT = prompts[0] * 0
    out_BT = np.asarray(generate(few, prompt_BT, settings(temperature=50.0), jax.random.key(0), prompts[1]))
    assert set(out_BT[:, PROMPT_LENGTH:].ravel().tolist()) == {0, 3, 4, 58, 59, 60, 61}


def test_never_an_id_in_a_hole(model, prompts):
    """Ids that are no tokens are not chosen greedily either, with guidance."""
    key, holes = jax.random.key(3), with_holes(model, holes=((11, 12), (20, 24)))  # ids that the model prefers
    config = settings(cfg_scale=1.5)
    out_BT = np.asarray(generate(holes, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(out_BT, plain_sampler.generate(holes, prompts, config, key))
    assert not np.isin(out_BT[:, PROMPT_LENGTH:], [11, 20, 21, 22, 23]).any()
    free_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    assert np.isin(free_BT[:, PROMPT_LENGTH:], [11, 22]).any()


def test_all_ends_of_the_model_are_ends(model):
    ends = with_holes(model, eos_id=9, eot_id=3, end_ids=(7, 3))
    config = resolve(settings(), ends)
    assert (config.eos_id, config.eot_id, config.end_ids) == (9, 3, (7,))
    assert resolve(settings(end_ids=()), ends).end_ids == ()
    for wrong in ((64,), (-1,), (MASK,)):
        with pytest.raises(UserError, match="end_ids="):
            resolve(settings(end_ids=wrong), ends)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"gen_length": -1}, "gen_length=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"remasking": "best"}, "choose one of low_confidence, random"),
        ({"mask_id": 64}, "mask_id=64"),
        ({"eot_id": -1}, "eot_id=-1"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"logits_eos_inf": True}, "does not say which token is EOS"),
        ({"stop_at_end": True}, "does not say which token is EOS"),
    ],
)
def test_impossible_settings_are_named(model, changes, words):
    with pytest.raises(UserError, match=words):
        generate(model, [[1, 2]], settings(**changes), jax.random.key(0))


def test_impossible_prompts_are_named(model):
    key = jax.random.key(0)
    with pytest.raises(UserError, match="to 64: the model's vocabulary is 64"):
        generate(model, [[1, 64]], settings(), key)
    with pytest.raises(UserError, match="ids of shape"):
        generate(model, [1, 2], settings(), key)
    with pytest.raises(UserError, match="prompt_mask_BT"):
        generate(model, [[1, 2]], settings(), key, [[True]])
    with pytest.raises(UserError, match="key has shape"):
        generate(model, [[1, 2]], settings(), jax.random.split(key, 3))
    unknown = merge(*split(model))
    unknown.config = dataclasses.replace(unknown.config, mask_id=None)
    with pytest.raises(UserError, match="mask_id"):
        generate(unknown, [[1, 2]], settings(), key)
