"""Tests the learning rate schedule against plain Python, and the updates of AdamW against optax.adamw."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

from llada_jax.config import OptimizerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.training.optimizer import decayed, make_optimizer, make_schedule, orthogonalise, schedule_points

TEN = rounding.of_chain(roundings=10)  # an update of Adam takes about ten operations, and its size is about 1
PAPER = ((0, 0.0), (2000, 1.0), (0.52, 1.0), (0.52, 0.25), (0.87, 0.25), (1.0, 0.025))


def plain(points, steps, step):
    """Returns the schedule's factor for the update of `step`.

    This is the value of the piecewise linear function at step + 1. At a jump, the value before the jump counts.
    """
    x = step + 1
    line = [(p * steps if isinstance(p, float) else p, f) for p, f in points]
    if x <= line[0][0]:
        return line[0][1]
    for (left, before), (right, after) in zip(line, line[1:], strict=False):
        if left < x <= right:
            return before + (after - before) * (x - left) / (right - left)
    return line[-1][1]


@pytest.mark.parametrize(
    ("points", "steps"),
    [
        (((0, 0.0), (20, 1.0)), 100),  # warm-up, then flat
        (((0, 1.0),), 10),
        (((0.0, 0.0), (0.05, 1.0), (1.0, 0.1)), 300),
        (((0, 0.0), (10, 1.0), (0.5, 1.0), (0.5, 0.25), (0.9, 0.25), (1.0, 0.025)), 200),  # plateaus and a jump
        (((5, 0.5), (10, 1.0)), 20),  # flat before the first point
        (((0, 0.0), (0, 1.0), (30, 1.0), (30, 0.1)), 50),  # a jump at the start, a jump at the end
        (((0, 1.0), (7, 1.0), (7, 0.3), (7, 0.2), (9, 0.1)), 12),
        (((0.25, 1.0), (0.25, 0.0)), 40),
        (((1, 1.0), (1.0, 0.0)), 30),  # the int 1 is step 1, the float 1.0 is the end of the run
    ],
)
def test_schedule_is_the_polyline(points, steps):
    schedule = make_schedule(OptimizerConfig(peak_learning_rate=3e-4, schedule=points), steps)
    at = np.arange(steps + 5)  # includes steps beyond the end of the run
    rates = jax.vmap(schedule)(jnp.arange(steps + 5))
    assert rates.dtype == jnp.float32
    # A rate is interpolated between two factors, at most the largest one: two differences, a quotient, a product, a
    # sum, and the product with the peak.
    largest = max(factor for _, factor in points)
    tolerance = rounding.of_chain(roundings=6) * 3e-4 * largest
    np.testing.assert_allclose(rates, [3e-4 * plain(points, steps, s) for s in at], rtol=0, atol=tolerance)


def test_schedule_of_the_paper():
    """The corners of the paper's schedule, computed by hand.

    The learning rate rises from 0 to 4e-4 in 2,000 steps, stays there, drops to 1e-4, and falls linearly to 1e-5.
    """
    steps = 400_000
    schedule = make_schedule(OptimizerConfig(peak_learning_rate=4e-4, schedule=PAPER), steps)
    corners = {
        0: 4e-4 / 2000, 999: 2e-4, 1999: 4e-4, 2000: 4e-4, 207_999: 4e-4, 208_000: 1e-4, 300_000: 1e-4,
        347_999: 1e-4, 374_000 - 1: (1e-4 + 1e-5) / 2, 399_999: 1e-5, 500_000: 1e-5,
    }  # fmt: skip
    for step, rate in corners.items():
        # As in the test above. Between 0.25 and 0.025 the interpolated part is ten times the smallest rate.
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(rate, rel=rounding.of_chain(roundings=6 * 10))


def test_a_step_count_and_a_fraction_differ_when_the_run_is_extended():
    points = ((0, 0.0), (10, 1.0), (0.5, 1.0), (1.0, 0.0))
    assert schedule_points(OptimizerConfig(schedule=points), 100) == [(0, 0), (10, 1), (50, 1), (100, 0)]
    assert schedule_points(OptimizerConfig(schedule=points), 1000) == [(0, 0), (10, 1), (500, 1), (1000, 0)]


@pytest.mark.parametrize(
    ("points", "named"),
    [
        ((), "is empty"),
        (((0, 0.0), (20, 1.0), (10, 0.5)), "position 10 comes before"),
        (((0, 0.0), (60, 1.0), (0.5, 0.5)), "position 0.5 comes before"),  # The run has 100 steps: 0.5 is step 50.
        (((0, -1.0),), "negative"),
        (((-5, 1.0),), "negative"),
        (((0, float("inf")),), "negative"),
        (((0, float("nan")),), "negative"),
        (((1.5, 1.0),), "1.5"),
        (((-0.5, 1.0),), "-0.5"),
        (((0,),), "pair"),
        ((3,), "pair"),
    ],
)
def test_impossible_schedule(points, named):
    with pytest.raises(UserError, match=r"^config\.optimizer\.schedule") as caught:
        schedule_points(OptimizerConfig(schedule=points), 100)
    assert named in str(caught.value)


def params_like(rng):
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "embedding": leaf(7, 4),
        "blocks": {"attn_norm": leaf(2, 4), "q_proj": leaf(2, 4, 2, 2), "ff_norm": leaf(2, 4), "ff_out": leaf(2, 6, 4)},
        "final_norm": leaf(4),
        "head": leaf(4, 7),
    }


def test_decay_is_for_matrices(rng):
    assert decayed(params_like(rng)) == {
        "embedding": True,
        "blocks": {"attn_norm": False, "q_proj": True, "ff_norm": False, "ff_out": True},
        "final_norm": False,
        "head": True,
    }


@pytest.mark.parametrize("clip", [1.0, 0.0, 1e6])
def test_equals_optax_adamw(rng, clip):
    """Compares five steps with changing learning rates.

    This covers clipping, the moments, the bias correction, and the decoupled weight decay scaled by the learning rate.
    """
    config = OptimizerConfig(clip_norm=clip, weight_decay=0.3, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    rates = [0.1, 0.05, 0.0, 0.2, 0.01]
    ours, params = make_optimizer(config), params_like(rng)
    theirs = optax.adamw(
        lambda count: jnp.array(rates)[count], b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, mask=decayed
    )
    if clip:
        theirs = optax.chain(optax.clip_by_global_norm(clip), theirs)
    mine, other = (params, ours.init(params)), (params, theirs.init(params))
    for rate in rates:
        grads = params_like(rng)
        updates, state = ours.update(grads, mine[1], mine[0])
        mine = (jax.tree.map(lambda p, u: p - rate * u, mine[0], updates), state)  # noqa: B023
        updates, state = theirs.update(grads, other[1], other[0])
        other = (optax.apply_updates(other[0], updates), state)
        for a, b in zip(jax.tree.leaves(mine[0]), jax.tree.leaves(other[0]), strict=True):
            # In each of the five steps, about ten products and sums of each parameter and its update are rounded.
            np.testing.assert_allclose(a, b, rtol=TEN, atol=len(rates) * TEN)


def test_clipping_is_global(rng):
    """Clipping scales all gradients by the same factor, which depends on their global norm.

    The test looks at Adam's moments, because Adam's first update does not depend on the scale of the gradients.
    """
    config, grads = OptimizerConfig(clip_norm=1.0), params_like(rng)
    optimizer = make_optimizer(config)
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 1
    # The norm is the root of a sum over the squares of all elements.
    elements = sum(g.size for g in jax.tree.leaves(grads))
    tolerance = rounding.of_chain(elements, roundings=rounding.FUNCTION + 4)
    for m, g in zip(jax.tree.leaves(state[1].mu), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(m, 0.1 * np.asarray(g) / norm, rtol=tolerance)
    small = jax.tree.map(lambda g: g / (2 * norm), grads)
    _, state = optimizer.update(small, optimizer.init(grads), grads)
    for m, g in zip(jax.tree.leaves(state[1].mu), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(m, 0.1 * np.asarray(g), rtol=rounding.of_chain(roundings=4))


def test_no_schedule_hides_in_the_optimizer_state(rng):
    """The optimizer's only counter is Adam's number of updates.

    The schedule follows the step of the run, so that a skipped step advances the schedule and nothing else.
    """
    state = make_optimizer(OptimizerConfig()).init(params_like(rng))
    counts = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert len(counts) == 1
    assert "learning_rate" not in inspect.signature(make_optimizer).parameters
    faster = dataclasses.replace(OptimizerConfig(), peak_learning_rate=9.0)
    assert jax.tree.structure(make_optimizer(faster).init(params_like(rng))) == jax.tree.structure(state)


def test_muon_is_for_matrices_within_layers(rng):
    """Muon updates the matrices in the layers, AdamW all other parameters.

    Each matrix of a layer is updated on its own, from its Nesterov momentum. muon_scale multiplies only these updates.
    """
    config = OptimizerConfig(name="muon", muon_scale=0.25, clip_norm=0.0, weight_decay=0.0)
    adam, muon = make_optimizer(dataclasses.replace(config, name="adamw")), make_optimizer(config)
    params, (first, second) = params_like(rng), (params_like(rng), params_like(rng))
    with jax.set_mesh(mesh.one_device_mesh()):

        def two_steps(optimizer):
            _, state = optimizer.update(first, optimizer.init(params), params)
            return optimizer.update(second, state, params)[0]

        ours, theirs = (jax.device_get(jax.jit(two_steps, static_argnums=0)(o)) for o in (muon, adam))
        q = 0.95 * (0.95 * first["blocks"]["q_proj"] + second["blocks"]["q_proj"]) + second["blocks"]["q_proj"]
        expected = [[orthogonalise(q[layer, :, head]) / 4 for head in range(2)] for layer in range(2)]
    for name in ("embedding", "head", "final_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=TEN, atol=TEN)
    for name in ("attn_norm", "ff_norm"):
        np.testing.assert_allclose(ours["blocks"][name], theirs["blocks"][name], rtol=TEN, atol=TEN)
    tolerance = rounding.of_newton_schulz(q.swapaxes(1, 2))
    rounding.assert_close(ours["blocks"]["q_proj"], np.stack(expected).swapaxes(1, 2), tolerance)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_the_memory_and_move_little(make_mesh, rng, name):
    params = {"blocks": {"up_proj": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)}}
    with jax.set_mesh(make_mesh()):
        ends = {}
        for dtype in ("float32", "bfloat16"):
            optimizer = make_optimizer(OptimizerConfig(name=name, state_dtype=dtype, clip_norm=0.0))
            state = jax.jit(optimizer.init)(params)
            kinds = {x.dtype.name for x in jax.tree.leaves(state) if x.ndim}
            assert kinds == {dtype}
            update = jax.jit(optimizer.update)
            for step in range(5):
                grads = jax.tree.map(lambda p, step=step: jnp.sin(p * (step + 1)), params)
                updates, state = update(grads, state, params)
            assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {dtype}
            assert updates["blocks"]["up_proj"].dtype == jnp.float32
            ends[dtype] = np.asarray(updates["blocks"]["up_proj"])
    difference = np.abs(ends["bfloat16"] - ends["float32"]).max() / np.abs(ends["float32"]).max()
    # Both moments are rounded in each of the five steps, by half an eps at most.
    assert 0 < difference < rounding.of_chain(roundings=5, eps=rounding.BF16_EPS)


def test_unknown_state_dtype():
    with pytest.raises(UserError, match="config.optimizer.state_dtype='float16': choose one of float32, bfloat16"):
        make_optimizer(OptimizerConfig(state_dtype="float16"))
