"""Tests the train step: against a plain step, on several meshes, in micro-batches, and with non-finite numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, Config, ModelConfig, OptimizerConfig
from llada_jax.devices import mesh
from llada_jax.devices.hardware import compiler_options
from llada_jax.diffusion import forward
from llada_jax.model.transformer import abstract_model, merge, split
from llada_jax.training.optimizer import decayed, make_schedule
from llada_jax.training.step import TrainState, make_state, make_train_step, micro_batches

MODEL = ModelConfig(layers=2, width=32, heads=8, kv_heads=4, feed_forward=48, vocab_size=64, mask_id=63)
B, T = 32, 12
GRADIENT = rounding.of_gradient(MODEL, T, B * T)
RATE = rounding.of_chain(roundings=6)  # the schedule interpolates between two points


def config_of(**changes) -> Config:
    c = Config(seed=1, steps=40, batch_size=B, sequence_length=T, model=MODEL)
    c.compute = ComputeConfig(dtype="float32", loss_chunk=32, query_chunk=8, remat="none")
    c.optimizer = OptimizerConfig(peak_learning_rate=1e-2, schedule=((0, 0.0), (5, 1.0), (1.0, 0.2)))
    c.logging.buckets = 4
    return dataclasses.replace(c, **changes)


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Returns rows that count up from a random token, which a model learns easily.

    Every eighth row is shorter than the others. The padding after its end must have no effect.
    """
    rng = np.random.default_rng(step)
    length = np.where(np.arange(B) % 8 == 5, rng.integers(1, T, B), T).astype(np.int32)
    tokens = (rng.integers(0, 60, B)[:, None] + np.arange(T)) % 60
    return {"tokens": np.where(np.arange(T) < length[:, None], tokens, 61).astype(np.int32), "length": length}


@pytest.fixture(scope="module")
def first_state(make_mesh):
    """The state at step 0 on the host.

    It is made only once, because the comparison between meshes is about the train step, not the initial state.
    """
    with jax.set_mesh(make_mesh()):
        return jax.device_get(make_state(config_of()))


@pytest.fixture(scope="module")
def trainer(make_mesh, first_state):
    """The function trainer(sizes, accumulation) -> (place, step) for a mesh of these axis sizes.

    place(host_state) puts a state on the mesh. step(state, batch) takes a batch of numpy arrays and returns the new
    state and the metrics.
    """
    made = {}

    def make(sizes=(1, 1, 1), accumulation=1):
        device_mesh, config = make_mesh(*sizes), config_of(accumulation=accumulation)

        def place(host: TrainState) -> TrainState:
            with jax.set_mesh(device_mesh):
                like = jax.eval_shape(lambda: make_state(config))
                # Copy the arrays: the step donates its state, and a device may share the host's memory.
                spec = lambda s: P() if s.sharding is None else s.sharding.spec  # noqa: E731
                return jax.tree.map(lambda x, s: jax.device_put(np.array(x), spec(s)), host, like)

        if (sizes, accumulation) not in made:
            with jax.set_mesh(device_mesh):
                graphdef = split(abstract_model(config.model, config.compute))[0]
            options = compiler_options(jax.devices()[0], deterministic=True)  # tests compare bits, also on GPUs
            made[sizes, accumulation] = make_train_step(config, graphdef, options)
        jitted = made[sizes, accumulation]

        def step(state, batch):
            with jax.set_mesh(device_mesh):
                state, metrics = jitted(state, mesh.place_batch(batch, device_mesh, B))
                return state, {name: np.asarray(value) for name, value in metrics.items()}

        return place, step

    return make


@pytest.fixture(scope="module")
def curve(trainer, first_state):
    """The function curve(sizes, accumulation), which trains 20 steps, once for each combination of arguments.

    It returns the metrics of each step and the final parameters.
    """
    done = {}

    def run(sizes=(1, 1, 1), accumulation=1):
        if (sizes, accumulation) not in done:
            place, step = trainer(sizes, accumulation)
            state, history = place(first_state), []
            for i in range(20):
                state, metrics = step(state, batch_of(i))
                history.append(metrics)
            assert int(state.step) == 20
            done[sizes, accumulation] = history, jax.device_get(state.params)
        return done[sizes, accumulation]

    return run


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [
        ((1, 1, 1), 4),
        ((2, 2, 2), 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (((8, 1, 1), 2), ((1, 8, 1), 1), ((1, 2, 4), 2))),
    ],
)
def test_losses_equal_those_of_one_device(curve, sizes, accumulation):
    """Losses may differ by what `rounding` allows at the first step and at later steps; counts must be equal."""
    (one, one_params), (other, other_params) = curve(), curve(sizes, accumulation)
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=rounding.FIRST_STEP)
    assert other[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=GRADIENT)
    for a, b in zip(other, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rounding.LATER_STEPS)
        assert a["tokens"] == b["tokens"] and a["skipped"] == b["skipped"] == 0
        assert a["learning_rate"] == b["learning_rate"]
        np.testing.assert_array_equal(a["bucket_tokens"], b["bucket_tokens"])
        np.testing.assert_allclose(a["bucket_nll"], b["bucket_nll"], rtol=rounding.LATER_STEPS)
    for a, b in zip(jax.tree.leaves(other_params), jax.tree.leaves(one_params), strict=True):
        # Not the largest difference: a parameter whose gradient is nearly zero may take a step the other way.
        rounding.assert_within(rounding.size(a - b), 0, rounding.LATER_STEPS * rounding.size(b))


def test_it_learns(trainer, first_state):
    place, step = trainer()
    state, losses = place(first_state), []
    for i in range(150):
        state, metrics = step(state, batch_of(i))
        losses.append(float(metrics["loss"]))
    assert 3.5 < np.mean(losses[:3]) < 6  # about log(64), plus the spread of the logits of a fresh model
    assert np.mean(losses[-10:]) < 2.5  # A model that knows only the frequencies of the tokens has log(60) = 4.1.


def noise_of(config, step, batch):
    rows = jnp.arange(B, dtype=jnp.int32)
    return forward.pretrain(forward.step_key(config.seed, step), batch, rows, config.diffusion, 63)


def test_equals_a_plain_step(curve, trainer, first_state, make_mesh):
    """Three steps give the same losses, gradient norms and parameters as a plain implementation.

    The plain implementation computes all logits with a plain softmax, plain autodiff and optax.adamw.
    """
    config = config_of()
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decayed),
    )
    with jax.set_mesh(make_mesh()):
        graphdef = split(abstract_model(config.model, config.compute))[0]

        def plain(params, noisy, tokens, length):
            model = merge(graphdef, params)
            logits = model.logits(model.trunk(noisy.tokens_BT, jnp.arange(T) < length[:, None]))
            logits = jax.reshard(logits, mesh.HIDDEN_BTD)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
            p_mask = noisy.p_mask_B[:, None]
            # Eq. 3, divided by the length of each row, mean over rows. The weights are computed independently here.
            return (jnp.where(noisy.mask_BT, nll / p_mask, 0).sum(axis=1) / length).mean(), nll

        @jax.jit
        def plain_step(params, opt_state, *batch):
            (loss, nll), grads = jax.value_and_grad(plain, has_aux=True)(params, *batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss, optax.global_norm(grads), nll, grads

        noise = jax.jit(lambda step, batch: noise_of(config, step, batch))
        params = trainer()[0](first_state).params
        opt_state, expected, off = jax.jit(optimizer.init)(params), [], []
        for i in range(3):
            batch = batch_of(i)
            noisy = noise(i, batch)
            tokens, length, *noisy_placed = mesh.place_rows(batch["tokens"], batch["length"], *noisy)
            placed = forward.Corrupted(*noisy_placed)
            params, opt_state, loss, norm, nll, grads = plain_step(params, opt_state, placed, tokens, length)
            expected.append((float(loss), float(norm), np.asarray(nll), noisy))
            # What rounding of the clipped gradients may do to each parameter in this step.
            rate, clip, bias = float(schedule(np.int32(i))), min(1.0, 1 / float(norm)), 1 - 0.95 ** (i + 1)
            moved = lambda g, v: rate * rounding.of_adam(GRADIENT, g * clip, v / bias)  # noqa: E731, B023
            off.append(jax.tree.map(moved, *jax.device_get((grads, opt_state[1][0].nu))))

    history, _ = curve()
    place, step = trainer()
    state = place(first_state)
    for i, (loss, norm, nll, noisy) in enumerate(expected):
        state, metrics = step(state, batch_of(i))
        assert metrics["loss"] == pytest.approx(loss, rel=rounding.of_nll(MODEL, T, B))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=GRADIENT)
        assert metrics["learning_rate"] == pytest.approx(float(schedule(jnp.int32(i))), rel=RATE)
        assert metrics["tokens"] == batch_of(i)["length"].sum()
        # Check the sums by mask ratio: four buckets, each a quarter wide.
        mask, ratio = np.asarray(noisy.mask_BT), np.asarray(noisy.p_mask_B)
        for k in range(4):
            rows = (ratio >= k / 4) & ((ratio < (k + 1) / 4) | (k == 3))
            assert metrics["bucket_tokens"][k] == mask[rows].sum()
            tolerance = rounding.of_nll(MODEL, T, max(1, mask[rows].sum()))
            assert metrics["bucket_nll"][k] == pytest.approx((nll * mask)[rows].sum(), rel=tolerance)
    leaves = (jax.tree.leaves(x) for x in (jax.device_get(state.params), params, *off))
    for a, b, *steps in zip(*leaves, strict=True):
        # In each of the three steps the parameter is multiplied with its decay and added to the update.
        rounding.assert_within(a, b, sum(steps) + rounding.of_chain(roundings=3 * 3) * np.abs(b))


def poisoned(host, name, place, value):
    params = jax.tree.map(np.array, host.params)
    (params["blocks"] if name in params["blocks"] else params)[name][place] = value
    return dataclasses.replace(host, params=params)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("q_proj", (0, 3, 2, 1), np.nan),
        ("final_norm", (4,), np.inf),
        ("head", (0, 5), 1e25),  # The loss stays finite, but the norm of the gradients does not.
    ],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_non_finite_step_leaves_no_trace(trainer, first_state, accumulation, name, place, value):
    """A skipped step keeps every bit of the parameters and moments.

    The number of the step, and with it the noise and the schedule, advances. The next good step is applied.
    """
    put, step = trainer(accumulation=accumulation)
    # Take one step first: fresh moments are zero, which would hide changes to them.
    before, _ = step(put(first_state), batch_of(0))
    before = jax.device_get(before)
    bad = poisoned(before, name, place, value)
    after, metrics = step(put(bad), batch_of(1))
    after = jax.device_get(after)
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"]) == (value == 1e25)
    assert int(after.step) == 2
    assert bits(after.params) == bits(bad.params) and bits(after.opt_state) == bits(bad.opt_state)
    # With the bad parameter repaired, the run continues like a run without the bad step at the same step number.
    healed = TrainState(after.step, before.params, after.opt_state)
    healthy = TrainState(np.int32(2), before.params, before.opt_state)
    (a, metrics_a), (b, metrics_b) = step(put(healed), batch_of(2)), step(put(healthy), batch_of(2))
    assert bits(a) == bits(b) and bits(a.params) != bits(before.params)
    assert metrics_a["skipped"] == 0
    schedule = make_schedule(config_of().optimizer, config_of().steps)
    assert (
        metrics_a["learning_rate"]
        == metrics_b["learning_rate"]
        == pytest.approx(float(schedule(jnp.int32(2))), rel=RATE)
    )
    # The noise depends on the step: the same batch has another loss one step earlier.
    earlier, metrics_c = step(put(TrainState(np.int32(1), before.params, before.opt_state)), batch_of(2))
    assert metrics_c["loss"] != metrics_a["loss"]


def test_state_is_donated(trainer, first_state):
    """Only one copy of the parameters and moments exists: the buffers of the old state are deleted after the step."""
    put, step = trainer()
    state = put(first_state)
    new, _ = step(state, batch_of(0))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_same_state_and_batch_give_the_same_bits(trainer, first_state):
    put, step = trainer()
    (a, x), (b, y) = step(put(first_state), batch_of(0)), step(put(first_state), batch_of(0))
    assert bits((a, x)) == bits((b, y))


def test_first_state(make_mesh, first_state):
    """The first state is at step 0 and in fp32, with zero moments that are sharded like the parameters."""
    assert first_state.step == 0 and first_state.step.dtype == np.int32
    assert {x.dtype for x in jax.tree.leaves(first_state.params)} == {np.dtype(np.float32)}
    with jax.set_mesh(make_mesh(2, 2, 2)):
        state = jax.eval_shape(lambda: make_state(config_of()))
    moments = state.opt_state[1]
    for moment in (moments.mu, moments.nu):
        for m, p in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert (m.shape, m.dtype, m.sharding) == (p.shape, jnp.float32, p.sharding)
    assert not any(np.any(x) for x in jax.tree.leaves(first_state.opt_state))
    assert len(jax.tree.leaves(state)) == 1 + 3 * len(jax.tree.leaves(state.params)) + 1


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_micro_batches_deal_out_every_row_once(make_mesh, sizes):
    with jax.set_mesh(make_mesh(*sizes)):
        shards = mesh.batch_shards()
        rows, tokens = mesh.place_rows(np.arange(32), np.arange(64).reshape(32, 2))
        out, wide = jax.jit(lambda *x: [micro_batches(v, 4) for v in x])(rows, tokens)
        assert jax.typeof(wide).sharding.spec == P(None, mesh.BATCH, None)
    out, wide = np.asarray(out), np.asarray(wide)
    assert out.shape == (4, 8) and sorted(out.ravel()) == list(range(32))
    np.testing.assert_array_equal(wide, np.stack([2 * out, 2 * out + 1], axis=-1))  # Tokens stay with their row.
    per_shard = out.reshape(4, shards, -1)
    for shard in range(shards):  # No row moves to another shard.
        assert set(per_shard[:, shard].ravel() // (32 // shards)) == {shard}
