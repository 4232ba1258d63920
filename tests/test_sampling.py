import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sampling
from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig, UserError
from llada_jax.model import initialise, merge, split
from llada_jax.remasking import choose, gumbel, schedule
from llada_jax.sampling import denoise, denoise_steps, generate

MASK = 60
SIZES = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, feed_forward=96, vocab_size=64, mask_id=MASK, token_count=62
)
PROMPT_LENGTH, GEN_LENGTH = 9, 16


def make_model(mesh):
    with jax.set_mesh(mesh):
        return initialise(SIZES, ComputeConfig(dtype="float32"), jax.random.key(1))


@pytest.fixture(scope="module")
def model(make_mesh):
    return make_model(make_mesh())


@pytest.fixture(scope="module")
def prompts():
    """Three prompts, left-padded, two of them with MASK tokens of their own; the padding has some too."""
    prompt_BT = np.random.default_rng(0).integers(0, MASK, (3, PROMPT_LENGTH))
    real_BT = np.ones(prompt_BT.shape, bool)
    real_BT[1, :4] = False
    prompt_BT[1, 2] = MASK  # padding: nothing to fill
    prompt_BT[0, 3] = MASK
    prompt_BT[2, 2:5] = MASK
    return prompt_BT, real_BT


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def plain_schedule(masks: int, steps: int, block_length: int) -> list[tuple[int, int, int]]:
    """(block, step within it, tokens unmasked) of every reverse step that unmasks something."""
    sizes = [min(block_length, masks - start) for start in range(0, masks, block_length)]
    result = []
    for block, size in enumerate(sizes):
        block_steps = max(1, steps // len(sizes) + (1 if block < steps % len(sizes) else 0))
        for step in range(block_steps):
            count = size // block_steps + (1 if step < size % block_steps else 0)
            if count:
                result.append((block, step, count))
    return result


def plain_gumbel(key, size: int) -> np.ndarray:
    uniform = (np.asarray(jax.random.bits(key, (size,), jnp.uint32)).astype(np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def plain_row(model, prompt_T, real_T, config: SamplerConfig, key) -> np.ndarray:
    """The sampler as DESIGN says it, one row, one position at a time, logits for the whole canvas."""
    canvas = np.concatenate([prompt_T, np.full(config.gen_length, MASK)]).astype(np.int32)
    real = np.concatenate([real_T, np.ones(config.gen_length, bool)])
    todo = [i for i in range(len(canvas)) if canvas[i] == MASK and real[i]]
    blocks = [todo[i : i + config.block_length] for i in range(0, len(todo), config.block_length)]
    for block, step, count in plain_schedule(len(todo), config.steps, config.block_length):
        logits_TV = np.asarray(model(canvas[None], real[None])[0]).astype(np.float64)
        step_key = jax.random.fold_in(jax.random.fold_in(key, block), step)
        candidates = []
        for index, position in enumerate(blocks[block]):
            if canvas[position] != MASK:
                continue
            draw_key, score_key = jax.random.split(jax.random.fold_in(step_key, index))
            logits = logits_TV[position]
            noisy = logits.copy()
            if config.temperature:
                noisy += config.temperature * plain_gumbel(draw_key, len(logits))
            noisy[[MASK, *range(SIZES.token_count, len(noisy))]] = -np.inf
            token = int(noisy.argmax())
            score = np.exp(logits[token]) / np.exp(logits).sum()
            if config.remasking == "random":
                score = float(jax.random.uniform(score_key))
            candidates.append((-score, position, token))
        for _, position, token in sorted(candidates)[:count]:
            canvas[position] = token
    return canvas


def plain(model, prompts, config, key) -> np.ndarray:
    return np.stack(
        [plain_row(model, *row, config, jax.random.fold_in(key, i)) for i, row in enumerate(zip(*prompts, strict=True))]
    )


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(**({"steps": 11, "gen_length": GEN_LENGTH, "block_length": 6} | changes))


@pytest.mark.parametrize("block_length", [1, 3, 6, 64])
def test_schedule_is_the_plain_one(block_length):
    """Every number of masks and of steps: uneven, short last block, fewer steps than blocks, surplus steps."""
    masks_B = jnp.arange(40)
    compiled = jax.jit(lambda steps, step: schedule(masks_B, steps, block_length, step))
    for steps in (1, 2, 3, 5, 7, 11, 16, 39, 64, 200):
        expected = [plain_schedule(int(masks), steps, block_length) for masks in masks_B]
        for step in range(max(map(len, expected)) + 2):
            block_B, inner_B, count_B, total_B = map(np.asarray, compiled(steps, step))
            assert total_B.tolist() == [len(row) for row in expected]
            for i, row in enumerate(expected):
                if step < len(row):
                    assert (block_B[i], inner_B[i], count_B[i]) == row[step], (i, steps, step)
                else:
                    assert count_B[i] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 60},
        {"steps": 2},
        {"temperature": 0.7, "remasking": "random"},
        {"temperature": 1.3},
        {"gen_length": 0, "steps": 2, "block_length": 2},
    ],
    ids=["uneven", "surplus", "fewer-than-blocks", "random", "sampled", "infilling"],
)
def test_generate_is_the_plain_sampler(model, prompts, changes):
    config, key = settings(**changes), jax.random.key(3)
    out_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(out_BT, plain(model, prompts, config, key))
    prompt_BT = out_BT[:, :PROMPT_LENGTH]
    kept_BT = (prompts[0] != MASK) | ~prompts[1]
    assert (prompt_BT == prompts[0])[kept_BT].all() and (prompt_BT != MASK)[~kept_BT].all()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_row_is_the_same_alone_as_in_a_batch(model, prompts, temperature):
    config = settings(temperature=temperature)
    prompt_BT, real_BT = prompts
    keys = jax.random.split(jax.random.key(5), 3)
    together_BT = np.asarray(generate(model, prompt_BT, config, keys, real_BT))
    alone_T = np.asarray(generate(model, prompt_BT[1:2, 4:], config, keys[1:2]))[0]
    np.testing.assert_array_equal(together_BT[1, 4:], alone_T)
    np.testing.assert_array_equal(together_BT[1, :4], prompt_BT[1, :4])
    order = np.array([1, 2, 0])  # another place in the batch
    moved_BT = np.asarray(generate(model, prompt_BT[order], config, keys[order], real_BT[order]))
    np.testing.assert_array_equal(moved_BT, together_BT[order])
    if temperature:
        twice = np.array([0, 0, 1])
        same_BT = np.asarray(generate(model, prompt_BT[twice], config, jax.random.key(5), real_BT[twice]))
        assert (same_BT[0] != same_BT[1]).any(), "rows of one key must not share their noise"


def test_step_by_step_is_one_call(model, prompts):
    config, key = settings(temperature=0.7, remasking="random"), jax.random.key(3)
    one_call_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    COMPILED.clear()
    steps = list(denoise_steps(model, prompts[0], config, key, prompts[1]))
    assert not COMPILED
    np.testing.assert_array_equal(steps[-1][0], one_call_BT)
    expected = [plain_schedule(masks, config.steps, config.block_length) for masks in (17, 16, 19)]
    counts = [revealed_BT.sum(axis=1).tolist() for _, revealed_BT in steps[1:]]
    assert counts == [[step[2] if step else 0 for step in row] for row in itertools.zip_longest(*expected)]
    for (before_BT, _), (after_BT, revealed_BT) in itertools.pairwise(steps):
        assert (before_BT == after_BT)[~revealed_BT].all() and (before_BT == MASK)[revealed_BT].all()


def test_nothing_to_fill(model):
    prompt_BT = np.arange(10).reshape(2, 5)
    config = settings(gen_length=0)
    np.testing.assert_array_equal(generate(model, prompt_BT, config, jax.random.key(0)), prompt_BT)
    assert len(list(denoise_steps(model, prompt_BT, config, jax.random.key(0)))) == 1
    assert generate(model, prompt_BT[:, :0], config, jax.random.key(0)).shape == (2, 0)


def test_new_values_compile_nothing(model, prompts):
    COMPILED.clear()
    jax.jit(lambda x: x + 1)(np.zeros(77))
    assert COMPILED, "the counter counts"
    generate(model, prompts[0], settings(temperature=0.7), jax.random.key(0), prompts[1])
    COMPILED.clear()
    other, key = settings(temperature=0.2, steps=5), jax.random.key(1)
    with jax.transfer_guard("disallow"):  # as in the training loop
        generate(model, (prompts[0] + 1) % MASK, other, key, prompts[1])
    list(itertools.islice(denoise_steps(model, prompts[0], other, jax.random.key(2), prompts[1]), 3))
    assert not COMPILED


def test_eight_devices_are_one(model, make_mesh, prompts):
    """Rows, parameters and vocabulary split: also the noise is the same."""
    config, key = settings(temperature=0.7, remasking="random"), jax.random.key(3)
    mesh = make_mesh(2, 2, 2)
    sharded = make_model(mesh)
    expected_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    np.testing.assert_array_equal(generate(sharded, prompts[0], config, key, prompts[1]), expected_BT)
    COMPILED.clear()
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):  # from within a trainer
        live_BT = generate(merge(*split(sharded)), prompts[0], config, key, prompts[1])
    assert not COMPILED
    np.testing.assert_array_equal(live_BT, expected_BT)


def test_the_head_in_chunks_is_the_head_at_once(model, prompts, monkeypatch):
    config, key = settings(temperature=1.0), jax.random.key(3)
    at_once_BT = np.asarray(generate(model, prompts[0], config, key, prompts[1]))
    monkeypatch.setattr(sampling, "HEAD_CHUNK", 4)
    denoise.clear_cache()
    np.testing.assert_array_equal(generate(model, prompts[0], config, key, prompts[1]), at_once_BT)
    denoise.clear_cache()


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all arrays in a jaxpr and the jaxprs within."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {getattr(v.aval, "shape", ()) for v in equation.outvars}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                shapes |= shapes_in(inner)
    return shapes


def test_the_head_sees_the_active_block_only(model, prompts):
    config = sampling.resolve(settings(), model)
    with sampling.mesh.mesh_of(model.embedding[...]):
        rows, tokens_BT = sampling._start(model, prompts[0], config, jax.random.key(0), prompts[1])
        steps, temperature, static = sampling._arguments(config)
        zero = sampling._scalar(0)
        closed = jax.make_jaxpr(lambda m, r, t: denoise(m, r, t, zero, zero, steps, temperature, config=static))(
            model, rows, tokens_BT
        )
    logits = {shape for shape in shapes_in(closed.jaxpr) if shape[:1] == (3,) and shape[-1] == SIZES.vocab_size}
    assert logits == {(3, 6, SIZES.vocab_size)}


def test_equal_scores_go_to_the_lowest_position(model):
    params = split(model)[1]
    params["head"] = jnp.zeros_like(params["head"])
    flat = merge(split(model)[0], params)
    steps = list(denoise_steps(flat, np.zeros((1, 3), int), settings(steps=16, block_length=16), jax.random.key(0)))
    assert [int(revealed_BT[0].argmax()) for _, revealed_BT in steps[1:]] == list(range(3, 19))
    assert (steps[-1][0] == 0).all()


def test_choose_leaves_out_what_is_not_allowed_but_not_from_the_softmax():
    logits = jnp.array([[[5.0, 1.0, 2.0, 9.0]]])
    allowed = jnp.array([False, True, True, False])
    token, probability = choose(logits, None, allowed)
    assert token.tolist() == [[2]]
    np.testing.assert_allclose(probability, jax.nn.softmax(logits)[:, :, 2], rtol=1e-6)
    noise = jnp.array([[[0.0, 3.0, 0.0, 0.0]]])
    token, probability = choose(logits, noise, allowed)
    assert token.tolist() == [[1]]
    np.testing.assert_allclose(probability, jax.nn.softmax(logits)[:, :, 1], rtol=1e-6)
    near_one = jnp.zeros((1, 2, 300)).at[0, :, 7].set(jnp.array([30.0, 31.0]))
    scores = choose(near_one, None, jnp.ones(300, bool))[1][0]
    np.testing.assert_allclose(scores, 1 / (1 + 299 * np.exp([-30.0, -31.0])), rtol=1.2e-7)


def test_never_a_token_that_is_none(model, prompts):
    """MASK and the ids that fill up the vocabulary, at a temperature at which all tokens are alike."""
    few = merge(*split(model))
    few.config = dataclasses.replace(few.config, token_count=8, mask_id=5)
    prompt_BT = prompts[0] * 0
    out_BT = np.asarray(generate(few, prompt_BT, settings(temperature=50.0), jax.random.key(0)))
    assert set(out_BT[:, PROMPT_LENGTH:].ravel().tolist()) == {0, 1, 2, 3, 4, 6, 7}


@pytest.fixture(scope="module")
def on_one_device(make_mesh):
    with jax.set_mesh(make_mesh()):
        yield


def test_draws_have_the_frequencies_of_the_softmax(on_one_device):
    """Each of 10 tokens of probability 0.53 to 1e-4, at temperature 0.8."""
    draws, temperature = 200_000, 0.8
    logits = jnp.array([0.0, -0.5, -1, -2, -3, -4, -5, -6, -6.5, -7])
    keys = jax.random.split(jax.random.key(0), (1, draws))
    noise = temperature * jax.jit(gumbel, static_argnums=1)(keys, 10)
    tokens, _ = choose(jnp.broadcast_to(logits, noise.shape), noise, jnp.ones(10, bool))
    counts = np.bincount(np.asarray(tokens[0]), minlength=10)
    expected = draws * np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi square, 9 degrees of freedom, 0.1 %


def test_rare_noise_is_there(on_one_device):
    """Beyond 16 lies 1.1e-7 of the Gumbel distribution, beyond what 23-bit uniforms can give.

    With a vocabulary of 10^5 such noise decides every hundredth draw.
    """
    bounds = (10.0, 16.0, 18.0)
    draw = jax.jit(lambda key: jnp.stack([jnp.sum(gumbel(key, 2**20) > x, dtype=jnp.int32) for x in bounds]))
    many, few, very_few = np.sum([draw(jax.random.split(jax.random.key(i), (1, 8))) for i in range(16)], axis=0)
    drawn = 2**27
    assert abs(many / (drawn * -np.expm1(-np.exp(-10.0))) - 1) < 0.05  # 6,093 expected, 4 sigma
    assert 5 <= few <= 29 and very_few <= 9  # 15.1 and 2.0 expected


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
