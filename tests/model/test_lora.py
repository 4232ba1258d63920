"""Tests that a model with low-rank adapters equals the model with W + alpha / r A B, and that only they are trained."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, Config, LoraConfig, ModelConfig, OptimizerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model import lora
from llada_jax.model.transformer import MATRICES, abstract_model, initialise, merge, parameter_count, split
from llada_jax.planning import estimate
from llada_jax.training import flops
from llada_jax.training.config_check import validate
from llada_jax.training.step import make_state, make_train_step

ALL = LoraConfig(rank=3, alpha=12.0)
CONFIG = ModelConfig(layers=2, width=32, heads=8, kv_heads=4, feed_forward=48, vocab_size=64, mask_id=63, lora=ALL)
SOME = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=1.0, targets=("v_proj", "ff_out")))
COMPUTE = ComputeConfig(dtype="float32", query_chunk=4, unroll=1)
B, T = 8, 10
# Both the adapters and the merged matrices, whose gradients are multiplied by the adapters, have the sums of a model.
# The loss is a mean of squares, which have twice the relative error.
LOSS, GRADIENT = 2 * 2 * rounding.of_nll(CONFIG, T, B * T), 2 * rounding.of_gradient(CONFIG, T, B * T)


def spec_of(x) -> P:
    return P() if x.sharding is None else x.sharding.spec


@functools.cache
def params_of(config):
    """Returns parameters as arrays on the host. The matrices B are not zero, as after some training."""
    with jax.set_mesh(mesh.one_device_mesh()):
        params = jax.device_get(split(initialise(config, COMPUTE, jax.random.key(1)))[1])
    rng = np.random.default_rng(1)
    noise = lambda path, x: rng.normal(size=x.shape).astype(np.float32) * 0.1  # noqa: E731
    change = lambda path, x: noise(path, x) if path[-1].key.endswith("_b") else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(change, params)


def added(params, config, name):
    """Returns alpha / r A B of each layer, in float64."""
    a, b = (params["blocks"][f"{name}_{part}"].astype(np.float64) for part in "ab")
    product = [np.tensordot(a[i], b[i], axes=1) for i in range(config.layers)]
    return config.lora.alpha / config.lora.rank * np.stack(product)


def enumerated(params, config):
    """Returns the parameters of a model without adapters whose matrices are W + alpha / r A B."""
    blocks = {name: x for name, x in params["blocks"].items() if name[-2:] not in ("_a", "_b")}
    for name in config.lora.targets:
        blocks[name] = (blocks[name] + added(params, config, name)).astype(np.float32)
    return params | {"blocks": blocks}


def loss_and_gradient(config, compute, params, device_mesh):
    """Returns a loss that depends on every logit, and its gradient, as arrays on the host."""
    tokens = np.random.default_rng(5).integers(0, 64, (B, T)).astype(np.int32)
    with jax.set_mesh(device_mesh):
        graphdef, abstract = split(abstract_model(config, compute))
        placed = jax.tree.map(lambda s, x: jax.device_put(np.array(x), spec_of(s)), abstract, params)
        (tokens_BT,) = mesh.place_rows(tokens)

        def loss(params):
            model = merge(graphdef, params)
            return (jax.nn.log_softmax(model.logits(model.trunk(tokens_BT))) ** 2).mean()

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(placed))


@pytest.fixture(scope="module")
def expected():
    """Returns a function from a config to parameters, and the loss and gradient of the enumerated model.

    The enumerated model, see `enumerated`, is computed with reference attention and without remat.
    """
    made = {}

    def make(config):
        if config.lora not in made:
            params = params_of(config)
            compute = dataclasses.replace(COMPUTE, attention="reference", remat="none")
            whole = enumerated(params, config)
            made[config.lora] = params, *loss_and_gradient(lora.plain(config), compute, whole, mesh.one_device_mesh())
        return made[config.lora]

    return make


@pytest.mark.parametrize(
    ("config", "sizes", "attention", "remat"),
    [
        (CONFIG, (1, 1, 1), "cpu", "dots"),
        (CONFIG, (2, 2, 2), "xla", "full"),
        pytest.param(CONFIG, (1, 2, 4), "xla", "none", marks=pytest.mark.slow),
        (SOME, (1, 4, 2), "xla", "dots"),
    ],
)
def test_loss_and_gradient_are_those_of_the_enumerated_model(make_mesh, expected, config, sizes, attention, remat):
    """dL/dA = s dL/dW' B^T and dL/dB = s A^T dL/dW', where W' = W + s A B and s = alpha / r."""
    params, loss, whole = expected(config)
    compute = dataclasses.replace(COMPUTE, attention=attention, remat=remat)
    found, gradient = loss_and_gradient(config, compute, params, make_mesh(*sizes))
    assert found == pytest.approx(loss, rel=LOSS)
    scale = config.lora.alpha / config.lora.rank
    for name in config.lora.targets:
        inputs = len(MATRICES[name][0])
        for layer in range(config.layers):
            dw = whole["blocks"][name][layer].astype(np.float64)
            a, b = (params["blocks"][f"{name}_{part}"][layer].astype(np.float64) for part in "ab")
            outputs = dw.ndim - inputs
            da = scale * np.tensordot(dw, b, axes=(range(inputs, dw.ndim), range(1, outputs + 1)))
            db = scale * np.tensordot(a, dw, axes=(range(inputs), range(inputs)))
            for part, wanted in (("a", da), ("b", db)):
                got = gradient["blocks"][f"{name}_{part}"][layer]
                rounding.assert_close(got, wanted, GRADIENT)
                assert np.abs(wanted).max() > 1e-5
    # The gradient of the embedding is right too, so that nothing is lost on the way back through the adapted layers.
    rounding.assert_close(gradient["embedding"], whole["embedding"], GRADIENT)


def test_the_start_is_exactly_the_base(make_mesh, rng):
    """New adapters of any seed leave the output of the base unchanged; only the chosen matrices have adapters."""
    tokens = rng.integers(0, 64, (B, T)).astype(np.int32)
    with jax.set_mesh(make_mesh()):
        base = initialise(lora.plain(CONFIG), COMPUTE, jax.random.key(1))
        for seed, config in ((1, CONFIG), (2, SOME)):
            adapters = lora.initialise(config, COMPUTE, jax.random.key(seed))
            named = {f"{name}_{part}" for name in config.lora.targets for part in "ab"}
            assert set(adapters) == {"blocks"} and set(adapters["blocks"]) == named
            graphdef, _ = split(abstract_model(config, COMPUTE))
            model = merge(graphdef, lora.combine(adapters, split(base)[1]))
            np.testing.assert_array_equal(np.asarray(model(tokens)), np.asarray(base(tokens)))


def test_initial_sigmas(make_mesh):
    config = ModelConfig(layers=4, width=128, heads=4, kv_heads=2, feed_forward=512, vocab_size=512)
    config.lora = LoraConfig(rank=16)
    with jax.set_mesh(make_mesh()):
        blocks = jax.device_get(lora.initialise(config, COMPUTE, jax.random.key(0)))["blocks"]
    for name in config.lora.targets:
        a, b = blocks[f"{name}_a"], blocks[f"{name}_b"]
        sigma = (512 if name == "ff_out" else 128) ** -0.5
        assert a.dtype == b.dtype == np.float32 and a.shape[-1] == b.shape[1] == 16
        # The standard deviation of n random numbers is off by about 1 / sqrt(2 n), 1.6 % for the smallest matrix.
        assert a.std() == pytest.approx(0.98658 * sigma, rel=0.03)
        assert np.abs(a).max() <= 3 * sigma * (1 + rounding.of_chain(roundings=2))
        assert not b.any()
    assert len({x.ravel()[:64].tobytes() for name, x in blocks.items() if name.endswith("_a")}) == 7
    assert lora.adapter_count(config) == sum(x.size for x in blocks.values())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge(make_mesh, sizes, dtype):
    """W + alpha / r A B is computed in fp32 and has the dtype and the sharding of W; other matrices do not change."""
    params = params_of(SOME)
    wanted = enumerated(params | {"embedding": params["embedding"]}, SOME)
    with jax.set_mesh(make_mesh(*sizes)):
        abstract = split(abstract_model(SOME, COMPUTE))[1]
        cast = lambda x, path: x if path[-1].key in lora.ADAPTERS else x.astype(dtype)  # noqa: E731
        placed = jax.tree_util.tree_map_with_path(
            lambda path, s, x: jax.device_put(jnp.array(cast(x, path)), spec_of(s)), abstract, params
        )
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, lora.partition(placed)[1])
        found = lora.merge(placed, SOME)
        assert jax.tree.map(lambda x: jax.typeof(x).sharding.spec, found) == specs
        assert placed["blocks"]["v_proj"].is_deleted() and not placed["blocks"]["q_proj"].is_deleted()
    if dtype == jnp.bfloat16:
        rounded = lora.partition(jax.tree.map(lambda x: np.asarray(x.astype(dtype), np.float32), params))[1]
        wanted = enumerated(lora.combine(lora.partition(params)[0], rounded), SOME)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == dtype
        exact = path[-1].key not in SOME.lora.targets and dtype == jnp.float32
        # A sum over the rank, two products, and the sum with W; in bfloat16 the result is rounded once more.
        tolerance = 0.0 if exact else rounding.of_chain(SOME.lora.rank, roundings=3)
        if dtype == jnp.bfloat16:
            np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=rounding.BF16_EPS / 2, atol=tolerance)
        else:
            rounding.assert_close(np.asarray(x, np.float32), y, tolerance)


def test_partition_and_combine_are_inverse(make_mesh):
    params = params_of(CONFIG)
    adapters, frozen = lora.partition(params)
    assert jax.tree.structure(lora.combine(adapters, frozen)) == jax.tree.structure(params)
    assert not any(name in lora.ADAPTERS for name in frozen["blocks"]) and "blocks" in frozen
    with jax.set_mesh(make_mesh()):
        plain = split(abstract_model(lora.plain(CONFIG), COMPUTE))[1]
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)
    assert lora.combine(plain, None) is plain and lora.combine(plain, {}) is plain


# Tests of the train step.


def run_of(**changes) -> Config:
    c = Config(seed=1, steps=40, batch_size=B, sequence_length=T, model=CONFIG, init_from="base")
    c.compute = ComputeConfig(dtype="float32", loss_chunk=B * T, query_chunk=8, remat="none")
    c.optimizer = OptimizerConfig(peak_learning_rate=3e-2, schedule=((0, 1.0),))
    c.data.path, c.logging.buckets = "none", 4
    return dataclasses.replace(c, **changes)


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Returns rows whose ids count up from a random id; every fourth row is short."""
    rng = np.random.default_rng(step)
    length = np.where(np.arange(B) % 4 == 1, rng.integers(1, T, B), T).astype(np.int32)
    return {"tokens": ((rng.integers(0, 60, B)[:, None] + np.arange(T)) % 60).astype(np.int32), "length": length}


@functools.cache
def beginning(model: ModelConfig):
    """Returns the first state and the frozen weights of `run_of(model=model)`, as arrays on the host."""
    with jax.set_mesh(mesh.one_device_mesh()):
        state = jax.device_get(make_state(run_of(model=model)))
    return state, lora.partition(params_of(model))[1]


def trained(config, device_mesh, steps, dtype=jnp.float32):
    """Trains and returns the metrics of each step, the last state, and the frozen weights before and after."""
    first, base = beginning(config.model)
    before = jax.tree.map(lambda x: np.array(x, dtype), base)
    with jax.set_mesh(device_mesh):
        # Copy the arrays: the step donates its state, and a device may share the host's memory.
        place = lambda s, x: jax.device_put(np.array(x), spec_of(s))  # noqa: E731
        state = jax.tree.map(place, jax.eval_shape(lambda: make_state(config)), first)
        abstract = split(abstract_model(lora.plain(config.model), config.compute))[1]
        frozen = jax.tree.map(place, abstract, before)
        step = make_train_step(config, split(abstract_model(config.model, config.compute))[0])
        history = []
        for i in range(steps):
            state, values = step(state, mesh.place_batch(batch_of(i), device_mesh, B), frozen)
            history.append({name: float(values[name]) for name in ("loss", "grad_norm")})
        return history, state, before, jax.tree.map(np.array, frozen)


@pytest.fixture(scope="module")
def on_one_device(make_mesh):
    return trained(run_of(), make_mesh(), 8)


def test_only_adapters_are_trained_and_have_moments(on_one_device):
    _, state, before, after = on_one_device
    first = beginning(CONFIG)[0].params
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(state.params), strict=True):
        assert np.abs(np.asarray(new) - old).max() > 1e-3
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert a.tobytes() == b.tobytes()
    adapters = {f"{name}_{part}" for name in CONFIG.lora.targets for part in "ab"}
    assert set(state.params["blocks"]) == adapters and set(state.params) == {"blocks"}
    sizes = sorted(x.size for x in jax.tree.leaves(state.params))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(x.size for x in moments) == sorted(2 * sizes)
    assert sum(sizes) == lora.adapter_count(CONFIG) < parameter_count(CONFIG)


@pytest.mark.slow
def test_losses_on_another_mesh_and_in_micro_batches(make_mesh, on_one_device):
    one, other = on_one_device[0], trained(run_of(accumulation=2), make_mesh(2, 2, 2), 8)[0]
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=rounding.FIRST_STEP)
    for a, b in zip(other, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rounding.LATER_STEPS)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=rounding.LATER_STEPS)


def test_frozen_weights_in_the_compute_dtype_change_nothing(make_mesh):
    """The frozen weights are rounded to the compute dtype in any case, when they are used."""
    config = run_of(model=SOME)
    config.compute.dtype = "bfloat16"
    whole, rounded = (trained(config, make_mesh(), 2, dtype)[0] for dtype in (jnp.float32, jnp.bfloat16))
    # The bfloat16 numbers are the same; only the mean of the losses over all tokens may be summed in another order.
    mean = rounding.of_chain(B * T, roundings=rounding.FUNCTION)
    assert [x["loss"] for x in whole] == pytest.approx([x["loss"] for x in rounded], rel=mean)


def test_no_gradient_of_a_frozen_matrix_is_computed(make_mesh):
    """The compiler and the metrics count fewer FLOPs, by those that the gradients of frozen matrices would take."""
    model = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, feed_forward=128, vocab_size=256, mask_id=255)
    counted, told = [], []
    for adapters in (LoraConfig(), LoraConfig(rank=2)):
        config = run_of(model=dataclasses.replace(model, lora=adapters), batch_size=8, sequence_length=16)
        config.compute = ComputeConfig(dtype="float32", loss_chunk=128, remat="none", unroll=0, attention="reference")
        with jax.set_mesh(make_mesh()):
            lowered = estimate.lower(config, make_mesh())
        counted.append(lowered.compile().cost_analysis()["flops"])
        told.append(128 * flops.flops_per_token(config.model, 16, head_share=1.0))
    saved = told[0] - told[1]
    gradients = 2 * 128 * (2 * (64 * 64 * 3 + 3 * 64 * 128) + 64 * 256)
    assert saved == pytest.approx(gradients - 6 * 128 * lora.adapter_count(config.model))
    # The rest is AdamW's operations for each parameter that is no longer trained, and little else.
    assert saved < counted[0] - counted[1] < saved + 60 * parameter_count(model)


def test_plan_of_a_step_with_adapters(make_mesh):
    """The arguments are frozen weights in the compute dtype, and fp32 adapters with two moments of each."""
    config = run_of(compute=ComputeConfig(dtype="bfloat16", attention="xla"))
    with jax.set_mesh(make_mesh()):
        arguments = jax.tree.leaves(estimate.lower(config, make_mesh()).args_info)
    size = sum(math.prod(argument.shape) * argument.dtype.itemsize for argument in arguments)
    least = 2 * parameter_count(lora.plain(CONFIG)) + 12 * lora.adapter_count(CONFIG)
    assert least < size < least + 1024 + 4 * B * (T + 2)


# Tests of the configuration.


def test_the_config_of_a_model_is_its_own(make_mesh):
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    with jax.set_mesh(make_mesh()):
        model = abstract_model(config, COMPUTE)
    config.lora.rank = 99
    assert model.config.lora.rank == 2 and lora.plain(model.config).lora == LoraConfig()
    assert hash(config) != hash(dataclasses.replace(config, lora=LoraConfig(rank=98)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "config.model.lora.rank=-1 must not be negative"),
        ({"rank": 2.0}, "config.model.lora.rank=2.0 must be of type int"),
        ({"alpha": 0.0}, "config.model.lora.alpha=0.0 must be positive"),
        ({"targets": ()}, r"config.model.lora.targets=\(\) leaves model.lora.rank nothing to adapt"),
        ({"targets": ("q_proj", "head")}, "config.model.lora.targets=.*'head'.* must name some of q_proj, k_proj, "),
        ({"targets": ("q_proj", "q_proj")}, "must name some of .*, each once"),
        ({"targets": ["q_proj"]}, r"config.model.lora.targets=\['q_proj'\] must be a tuple"),
        ({"targets": "q_proj"}, "config.model.lora.targets='q_proj' must be of type"),
    ],
)
def test_mistakes_in_the_adapters(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(run_of(model=dataclasses.replace(CONFIG, lora=dataclasses.replace(ALL, **changes))))
    assert "\n" not in str(caught.value)


def test_mistakes_beside_the_adapters():
    validate(run_of())
    muon = run_of()
    muon.optimizer.name = "muon"
    for config, message in (
        (muon, "config.optimizer.name=muon cannot train the adapters of model.lora: set it to adamw"),
        (
            run_of(init_from=""),
            "config.model.lora.rank=3 adapts the weights of an existing model: set config.init_from",
        ),
    ):
        with pytest.raises(UserError, match=message):
            validate(config)
