"""Tests the estimate of a step against what can be known without a chip: FLOPs, bytes and the makers' peaks."""

import jax
import jax.numpy as jnp
import pytest
from programs import op

from llada_jax.config import Config
from llada_jax.planning import clock, report, topology
from llada_jax.planning.hlo import Module

needs_tpu_compiler = pytest.mark.skipif(
    not topology.installed("v5e"), reason='the TPU compiler is not installed: pip install "jax[tpu]"'
)


@pytest.fixture(autouse=True)
def environment():
    topology.prepare_environment()
    few = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision("default"):
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", few)


@needs_tpu_compiler
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_same_products_and_sums_approach_the_peaks_of_each_chip(target):
    """A wrong clock would put the product or the pass over memory beyond the chip's published peak, or far below it."""
    there = topology.describe(target)
    place = jax.sharding.SingleDeviceSharding(there.devices[0])

    def of(function, *arrays):
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in arrays]
        module = Module(jax.jit(function).lower(*shapes).compile().as_text())
        return report.summary(module, clock.simulate(target, module, 1))

    found = of(jnp.matmul, ((8192, 4096), jnp.bfloat16), ((4096, 8192), jnp.bfloat16))
    products = found["estimated_products"]
    assert products["flops"] == pytest.approx(2 * 8192 * 4096 * 8192)
    assert 0.7 < products["flops"] / products["seconds"] / there.chip.peak_flops < 1
    doubled = of(lambda x: x * 2, ((8192, 8192), jnp.float32))
    assert 0.6 < 2 * 8192 * 8192 * 4 / doubled["estimated_step_seconds"] / there.chip.memory_bandwidth < 1


def test_the_run_costs_what_its_steps_cost():
    """1.5e9 cycles on v5e are a second, and so is each of the run's steps."""
    config = Config(steps=3600, batch_size=8, sequence_length=100)
    work = f"  %a = f32[8]{{0}} add(%p, %p), {op('jvp(norm)/add', 1_500_000_000)}\n"
    text = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n" + work + "}\n"
    found = clock.estimate(config, "v5e:2x2", Module(text), 1, flops=4 * 197e12 * 0.25)
    assert found["estimated_step_seconds"] == pytest.approx(1)
    assert found["estimated_mfu"] == pytest.approx(0.25)
    assert found["estimated_tokens_per_second"] == pytest.approx(800)
    assert found["estimated_recipe_days"] == pytest.approx(1 / 24)
    assert found["estimated_recipe_chip_hours"] == pytest.approx(4)
    assert found["kernel_share"] == 0.5
    lines = "\n".join(report.lines(found))
    assert "1.00 s, 800 tokens/s, MFU 25.0%" in lines and "nobody has checked against a pod" in lines


@pytest.mark.parametrize("target", ["h200:8", "v5e:2x2"])
def test_without_estimates_of_the_compiler_there_is_no_estimate(target):
    """GPU compilers write none; a TPU compiler that stops to write them must not leave a step of almost no time."""
    text = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %a = f32[8]{0} sort(%p)\n}\n"
    found = clock.estimate(Config(steps=1), target, Module(text), 1, flops=1e12)
    assert found["estimated_step_seconds"] is None
    name = target.split(":")[0]
    assert report.lines(found) == [
        f"no estimate of the step: the compiler for {name} writes none into the compiled program"
    ]
