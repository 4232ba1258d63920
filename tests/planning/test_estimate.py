"""Tests plans for TPUs and GPUs that are not present.

Plans of small models run if the compiler for the hardware is installed. Plans of the paper's 8B model
(`pytest -m plans`) take minutes each.
"""

import json
import os
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from paths import ROOT

from llada_jax.config import Config, UserError
from llada_jax.devices import hardware, mesh
from llada_jax.model import compute
from llada_jax.model.attention import splash_attention
from llada_jax.planning import estimate, topology
from llada_jax.training import flops

needs_tpu_compiler = pytest.mark.skipif(
    not topology.installed("v5e"), reason='the TPU compiler is not installed: pip install "jax[tpu]"'
)
needs_gpu_compiler = pytest.mark.skipif(
    not topology.installed("h200"), reason='the GPU compiler is not installed: pip install "jax[cuda13]"'
)


def small(**changes) -> Config:
    config = Config(steps=1000, batch_size=16, sequence_length=256)
    for name, value in {"layers": 3, "width": 256, "heads": 2, "kv_heads": 2, "feed_forward": 512}.items():
        setattr(config.model, name, value)
    config.model.vocab_size = 1024
    config.data.path, config.compute.loss_chunk = "none", 128
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Sets up JAX as `python -m llada_jax.plan` does: all optimizations, bfloat16, and its usual matmul precision.

    The tests' high precision is not meant for bfloat16 kernels.
    """
    topology.prepare_environment()
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("default"):
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")  # for the processes that the tests start
        for platform in ("gpu", "tpu"):
            patch.delitem(compute.DTYPES, platform, raising=False)
        few = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_disable_most_optimizations", few)


@needs_tpu_compiler
@pytest.mark.parametrize(("dtype", "width"), [("float32", 128), ("bfloat16", 256)])
def test_attention_fits_a_tpu_of_which_nothing_is_known(dtype, width):
    """Its compiler gets no options, so a kernel has 16 MiB of vector memory, forward and backward."""
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1").devices
    assert not hardware.compiler_options(device)
    x = jax.ShapeDtypeStruct((1, 4096, 2, width), dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    loss = lambda *x: splash_attention(*x, None).astype(jnp.float32).sum()  # noqa: E731
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()


@needs_tpu_compiler
def test_plan_of_a_small_model_on_tpu():
    record, text = estimate.plan(small(accumulation=2), "v5e:2x2")
    assert record["fits"] and record["chips"] == 4 and record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert record["compute"]["attention"] == "splash" and record["compute"]["dtype"] == "bfloat16"
    assert record["parameters"] == 3 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 2 * 1024 * 256 + 256
    # The arguments are three fp32 numbers per parameter, a quarter of them on each chip, and little else.
    arguments = 12 * record["parameters"] / 4
    assert arguments < record["argument_bytes"] < 1.1 * arguments
    assert record["argument_bytes"] < record["peak_bytes"] < record["memory_bytes"]
    assert record["flops_per_step"] == flops.flops_per_token(small().model, 256) * 16 * 256
    # The least that fsdp moves in bf16: in each of two micro-batches, the weights of all layers twice (forward and
    # backward) and the head once. Every chip receives the three quarters that it does not hold.
    layers = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    gathered = record["collectives"]["all-gather"]["link_bytes"]
    least = 2 * 2 * 0.75 * (2 * layers + 1024 * 256)
    assert least < gathered < 1.2 * least
    assert record["floor_seconds"]["network"] == 0
    assert "tpu_custom_call" in text
    # The estimate: all parts add up to the step, the products are those of the model, and nothing exceeds the peak.
    parts = record["estimated_parts"]
    step = record["estimated_step_seconds"]
    assert sum(seconds for times in parts.values() for seconds in times.values()) == pytest.approx(step)
    assert {"attention projections", "attention", "feed-forward", "norms", "head and loss", "optimizer"} <= parts.keys()
    assert {"forward", "backward"} <= parts["feed-forward"].keys() and parts["optimizer"].keys() == {"update"}
    products = record["estimated_products"]
    attention = 12 * 3 * 256 * 256 + 2 * 3 * 256 * 256  # per token: forward, backward, and the scores again
    expected = (record["executed_flops_per_step"] - attention * 16 * 256) / 4
    assert products["flops"] == pytest.approx(expected, rel=0.05)
    assert 0.05 < products["share_of_peak"] < 1 and record["estimated_mfu"] < record["mfu_at_floor"]
    # The checkpoint is what one host holds: it is restored from the same bytes. A row is its tokens and two numbers.
    assert (
        record["hosts"] == 1 and 12 * record["parameters"] < record["checkpoint_bytes"] < record["argument_bytes"] * 4
    )
    assert record["checkpoint_read_bytes_per_host"] == record["checkpoint_bytes"]
    assert record["data_rows_per_second_per_host"] == pytest.approx(16 / step)
    assert record["data_bytes_per_second_per_host"] == pytest.approx(16 / step * (8 + 2 * 256))
    assert record["restart_seconds"]["notice"] == 0 and record["redone_seconds"] == pytest.approx(500 * step)
    page = estimate.page(record)
    assert "v5e:2x2: 4 chips" in page and "from a kill to the next step" in page and page.endswith("\nfits")


@needs_tpu_compiler
def test_two_slices_reduce_over_the_network_once_per_step():
    config = small()
    config.mesh.data = 2
    record, _ = estimate.plan(config, "2xv5e:2x2")
    assert record["slices"] == 2 and record["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    crossed = sum(sums["network_bytes"] for sums in record["collectives"].values())
    # Each chip sends and receives its quarter of the gradients: bf16 in the layers, fp32 for embedding and head.
    layers = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    expected = (2 * layers + 4 * 2 * 1024 * 256) / 4
    assert 0.9 * expected < crossed < 1.5 * expected
    # Each slice has a replica, of which the hosts write a part each and read their whole share.
    assert record["hosts"] == 2 and record["checkpoint_read_bytes_per_host"] == record["checkpoint_bytes"]
    assert record["checkpoint_write_seconds"] == pytest.approx(record["checkpoint_read_seconds"] / 2)
    assert record["restart_seconds"]["notice"] == 40
    config.mesh.data = 1
    with pytest.raises(UserError, match="config.mesh.data=1 is not a multiple of the 2 slices"):
        estimate.plan(config, "2xv5e:2x2")


@needs_tpu_compiler
def test_too_large_a_program_does_not_fit():
    config = small(batch_size=4, sequence_length=65_536)
    config.compute.remat = "none"
    config.model.layers, config.model.feed_forward = 48, 16_384
    record, text = estimate.plan(config, "v5e:2x2")
    assert not record["fits"] and "G" in record["why"] and text == ""
    assert "does not fit: " in estimate.page(record)


@needs_gpu_compiler
def test_plan_of_a_small_model_on_gpu():
    record, text = estimate.plan(small(), "2xh200:2")
    assert record["fits"] and record["compute"]["attention"] == "cudnn"
    assert "fmha" in text
    assert record["collectives"]["all-gather"]["link_bytes"] > 0
    assert record["floor_seconds"]["network"] > 0  # The axis fsdp spans both nodes.


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_compiler_options_are_known_to_the_compiler(name):
    devices = topology.describe(name).devices
    options = hardware.compiler_options(devices[0])
    assert options and hardware.chip_of(devices[0].device_kind) == hardware.chip_named(name.split(":")[0])
    one = mesh.mesh_over((1, len(devices), 1), devices)
    x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.NamedSharding(one, jax.P("fsdp", None)))
    jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_no_such_option": True}).lower(x).compile()


def test_temporaries_need_memory_too(monkeypatch):
    """A run fits if what the chip holds at the peak fits, not only the arguments of the step. No compiler is needed."""
    memory = types.SimpleNamespace(argument_size_in_bytes=10 * hardware.GIB, temp_size_in_bytes=5 * hardware.GIB)
    step = types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: "")
    there = topology.Topology(hardware.chip_named("v5e"), 1, jax.devices())  # with 16 GiB each
    monkeypatch.setattr(topology, "describe", lambda _: there)
    monkeypatch.setitem(estimate.COMPILERS, jax.default_backend(), "jaxlib")
    monkeypatch.setattr(estimate, "lower", lambda *_: types.SimpleNamespace(compile=lambda: step))
    for peak, fits in ((15, True), (17, False)):
        memory.peak_memory_in_bytes = peak * hardware.GIB
        record, _ = estimate.plan(small(), "v5e:2x4")
        assert record["fits"] == fits
        assert fits or record["why"] == "the peak is 17.0 GiB, but only 16.0 GiB are usable"
    assert record["flops_per_token"] == flops.flops_per_token(small().model, 256, 0.5)
    assert "  50% of the positions are taken as masked" in estimate.page(record)
    config = small()
    config.diffusion.t_range = (0.2, 0.9)
    record, _ = estimate.plan(config, "v5e:2x4")
    assert record["masked_share"] == pytest.approx(0.55)
    assert record["flops_per_token"] == pytest.approx(flops.flops_per_token(config.model, 256, 0.55))
    assert "  55% of the positions are taken as masked" in estimate.page(record)


def test_turns_of_the_loss_are_those_of_a_device():
    config = small()  # 16 x 256 positions, chunks of 128
    assert estimate.loss_turns(config, 4) == 4  # 512 of 1024 positions
    config.accumulation = 2
    assert estimate.loss_turns(config, 4) == 2
    config.diffusion.t_range = (0.5, 1.0)
    assert estimate.loss_turns(config, 4) == 3  # 384 of 512 positions
    config.diffusion.t_range = (0.0, 1.0)
    config.mesh.tensor = 2  # Two devices now hold the same rows, so each device's loop covers twice as many.
    assert estimate.loss_turns(config, 4) == 4
    config.compute.loss_chunk = 10_000
    assert estimate.loss_turns(config, 4) == 1


@pytest.mark.parametrize(
    ("group", "name"), [("compute", "remat"), ("diffusion", "objective"), ("compute", "attention")]
)
def test_names_are_checked_as_in_training(group, name):
    config = small()
    setattr(getattr(config, group), name, "bogus")
    with pytest.raises(UserError, match=f"config.{group}.{name}='bogus': choose one of"):
        estimate.plan(config, "v5e:2x2")


def test_vocabulary_must_be_known():
    config = small()
    config.model.vocab_size = 0
    with pytest.raises(UserError, match="config.model.vocab_size is 0"):
        estimate.plan(config, "v5e:2x2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5p", r"write \[SLICESx\]CHIP:SHAPE"),
        ("0xv5p:2x2x1", r"write \[SLICESx\]CHIP:SHAPE"),
        ("v9:2x2", "no chip 'v9': choose from v5e"),
        ("h200:2x2", "GPUs are given by their number per node"),
        ("h200:0", "no such number of chips"),
        ("99999xv5p:4x4x8", "no such number of chips"),
        ("v5e:16x16x2", "no such number of chips"),
        ("v5e:2x2x2", "v5e has 2 dimensions"),
        pytest.param("v5e:3x3", "no such slice", marks=needs_tpu_compiler),
    ],
)
def test_topologies_that_do_not_exist(text, problem):
    with pytest.raises(UserError, match=problem):
        topology.describe(text)


def test_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for text, extra in (("v5e:2x2", "tpu"), ("h200:8", "cuda13")):
        with pytest.raises(UserError, match=rf"jax\[{extra}\]"):
            topology.describe(text)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--config=configs/8b.py:v9", "--topology=v5e:2x2"], "configs/8b.py:v9: choose one of v5e-16x16"),
        (["--topology=v5e:2x2", "--kernel_share=2"], "--kernel_share=2: must be greater than 0 and at most 1"),
        (["--topology=h200:8", "--html=x.html"], "--html: only the compilers for TPUs estimate times"),
    ],
)
def test_a_mistake_ends_in_one_line(flags, problem):
    if not flags[0].startswith("--config"):
        flags = ["--config=configs/8b.py:v5e-16x16", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "llada_jax.plan", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert problem in done.stderr and done.stderr.count("\n") == 1


HARDWARE = runpy.run_path(str(ROOT / "configs" / "8b.py"))["HARDWARE"]


@pytest.mark.plans
@pytest.mark.parametrize("name", [name for name in HARDWARE if name])
def test_the_8b_configs_fit(name):
    target = name.replace("-", ":", 1)
    if not topology.installed(topology.parse(target)[1].name):
        pytest.skip(f"the compiler for {target} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "llada_jax.plan", f"--config=configs/8b.py:{name}", f"--topology={target}", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["fits"]


@pytest.mark.parametrize("name", [name for name in HARDWARE if name])
def test_the_recorded_8b_plans_are_of_these_configs(name):
    """If this fails because the config has changed, record benchmarks/plans/NAME.json anew (benchmarks/plans.sh)."""
    record = json.loads((ROOT / "benchmarks" / "plans" / f"{name}.json").read_text())
    assert record["fits"] and record["topology"] == name.replace("-", ":", 1)
    wanted = HARDWARE[name]
    assert (record["accumulation"], record["compute"]["remat"], record["mesh"]["data"]) == wanted
    assert record["sequences_per_step"] * record["sequence_length"] == 1280 * 4096
    assert record["parameters"] == 8_015_581_184


TUNING = runpy.run_path(str(ROOT / "configs" / "8b_sft.py"))["HARDWARE"]


@pytest.mark.parametrize("name", [name for name in TUNING if name])
def test_the_recorded_tuning_plans_are_of_these_configs(name):
    record = json.loads((ROOT / "benchmarks" / "plans" / f"8b_sft-{name}.json").read_text())
    wanted = TUNING[name]
    assert record["fits"] and record["topology"] == name.removeprefix("lora-").replace("-", ":", 1)
    assert (record["accumulation"], record["compute"]["remat"]) == (wanted.accumulation, wanted.remat)
    assert record["sequences_per_step"] * record["sequence_length"] == 256 * 4096
    assert record["parameters"] == 8_015_581_184 and record["adapter_parameters"] == wanted.rank * 2_621_440


SMALLER = runpy.run_path(str(ROOT / "configs" / "1b.py"))["HARDWARE"]


@pytest.mark.parametrize("name", [name for name in SMALLER if name])
def test_the_recorded_plans_of_1b_are_of_this_config(name):
    record = json.loads((ROOT / "benchmarks" / "plans" / f"1b-{name}.json").read_text())
    assert record["fits"] and record["topology"] == name.replace("-", ":", 1)
    assert (record["accumulation"], record["compute"]["remat"], record["mesh"]["data"]) == SMALLER[name]
    assert record["sequences_per_step"] * record["sequence_length"] == 1280 * 4096
    assert record["parameters"] == 1_487_243_264


def test_the_recorded_plan_of_the_autoregressive_baseline_is_of_its_config():
    get_config = runpy.run_path(str(ROOT / "configs" / "arm_7b.py"))["get_config"]
    config = get_config("v5p-4x4x8")
    record = json.loads((ROOT / "benchmarks" / "plans" / "arm_7b-v5p-4x4x8.json").read_text())
    assert record["fits"] and record["topology"] == "v5p:4x4x8" and record["parameters"] == 6_834_851_840
    wanted = (config.accumulation, config.compute.remat, config.mesh.data)
    assert (record["accumulation"], record["compute"]["remat"], record["mesh"]["data"]) == wanted
    with pytest.raises(UserError, match="arm_7b.py:v9: choose one of v5e-16x16"):
        get_config("v9")
    assert record["sequences_per_step"] * record["sequence_length"] == 1280 * 4096
