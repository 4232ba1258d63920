"""Estimates the memory, FLOPs, traffic and time of a run on hardware that need not be present.

`llada_jax/plan.py` is the command line program for these estimates.
"""

import dataclasses
import importlib.metadata
import math
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llada_jax.config import Config, UserError
from llada_jax.devices import mesh
from llada_jax.devices.hardware import GIB, GPU, compiler_options
from llada_jax.diffusion.forward import is_chat, masked_share
from llada_jax.model import lora
from llada_jax.model.compute import resolve_compute
from llada_jax.model.transformer import abstract_model, parameter_count, split
from llada_jax.planning import clock, collectives, report, storage, topology
from llada_jax.planning.hlo import Module
from llada_jax.training import config_check, flops
from llada_jax.training.step import make_state, make_train_step

COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}
# Share of a GPU's memory that the plan lets JAX use (XLA_PYTHON_CLIENT_MEM_FRACTION). CUDA itself needs the rest.
GPU_SHARE = 0.9


def plan(
    config: Config, target: str, kernel_share: float | None = None, storage_rate: float = storage.RATE
) -> tuple[dict, str]:
    """Compiles the train step of a run for a topology and returns what it needs.

    Args:
      config: The run's configuration. config.model.vocab_size must be set, because no tokenizer is read.
      target: The topology, in the form that --topology takes.
      kernel_share: The share of the peak that attention kernels are taken to reach; None means that of the chip.
      storage_rate: The bytes per second that each host is taken to read from the storage, or to write to it.

    Returns:
      A dict of JSON values whose names include their units, and the text of the compiled train step. The text is ""
      if the compiler says that the train step does not fit into memory.

    Raises:
      UserError: If `config` or `target` contains a mistake, or the compiler for the topology is not installed.
    """
    config_check.validate(config)
    if not config.model.layers:
        raise UserError(
            "config.model.layers is 0: a plan does not read config.init_from; set the architecture in config.model"
        )
    if not config.model.vocab_size:
        raise UserError("config.model.vocab_size is 0: a plan does not read a tokenizer; set config.model.vocab_size")
    if config.model.mask_id is None:
        config.model.mask_id = config.model.vocab_size - 1
    hardware = topology.describe(target)
    device, chips = hardware.devices[0], len(hardware.devices)
    sizes = mesh.axis_sizes(config.mesh, chips)
    mesh.check_model(config.model, sizes)
    mesh.check_batch(config, sizes)
    device_mesh = mesh.mesh_over(sizes, hardware.devices)
    config.compute = resolve_compute(config.model, config.compute, device)
    record = {
        "topology": target,
        "chips": chips,
        "slices": hardware.slices,
        "mesh": dict(zip(mesh.AXES, sizes, strict=True)),
        "parameters": parameter_count(lora.plain(config.model)),
        "adapter_parameters": lora.adapter_count(config.model),
        "sequences_per_step": config.batch_size,
        "sequence_length": config.sequence_length,
        "accumulation": config.accumulation,
        "sequences_per_chip": config.batch_size / chips / config.accumulation,
        "compute": dataclasses.asdict(config.compute),
        "optimizer_state_dtype": config.optimizer.state_dtype,
        "versions": {
            name: _version(name) for name in ("jax", COMPILERS["gpu" if device.platform in GPU else device.platform])
        },
    }
    started = time.perf_counter()
    lowered = lower(config, device_mesh)
    limit = hardware.chip.memory * (GPU_SHARE if device.platform in GPU else 1)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        said = f"the train step needs {needed[1]}, a chip has {needed[2]}" if needed else str(error).splitlines()[0]
        return record | {"fits": False, "why": said}, ""
    record["compile_seconds"] = round(time.perf_counter() - started, 1)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    record |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "memory_bytes": int(limit),
        "fits": memory.peak_memory_in_bytes <= limit,
    }
    if not record["fits"]:
        record["why"] = (
            f"the peak is {memory.peak_memory_in_bytes / GIB:.1f} GiB, but only {limit / GIB:.1f} GiB are usable"
        )
    module = Module(text)
    record |= costs(config, hardware, module)
    turns = loss_turns(config, chips)
    record |= clock.estimate(config, target, module, turns, record["flops_per_step"], kernel_share)
    return record | storage.costs(config, device_mesh, record, storage_rate), text


def lower(config: Config, device_mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Traces and lowers the unmodified train step of `llada_jax.train` for devices that need not be present."""
    shape = (config.batch_size, config.sequence_length)
    with jax.set_mesh(device_mesh):

        def rows(shape, spec):
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(device_mesh, spec))

        graphdef, _ = split(abstract_model(config.model, config.compute))
        state = jax.eval_shape(lambda: make_state(config))
        batch = {"tokens": rows(shape, mesh.TOKENS_BT), "length": rows(shape[:1], mesh.ROWS_B)}
        if is_chat(config):  # Batches of conversations vary in length. The plan takes the longest.
            batch["prompt"] = rows(shape[:1], mesh.ROWS_B)
        options = compiler_options(device_mesh.devices.flat[0], config.compute.deterministic)
        return make_train_step(config, graphdef, options).lower(state, batch, frozen(config))


def frozen(config: Config) -> dict:
    """Returns the abstract frozen weights that the train step takes beside the state.

    With low-rank adapters these are all weights except the adapters, in the compute dtype. Without, they are {}.
    """
    if not config.model.lora.rank:
        return {}
    weights = lora.partition(split(abstract_model(config.model, config.compute))[1])[1]
    dtype = jnp.dtype(config.compute.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), weights)


def costs(config: Config, hardware: topology.Topology, module: Module) -> dict:
    """Returns the FLOPs, the collectives, the lower bounds of the step time, and what the whole run costs at best.

    Each floor is the time that one resource (compute, links, network) alone needs at its peak rate. The step time at
    the floor is the largest of them; the days and chip hours of the recipe follow from it.

    Args:
      config: The run's configuration.
      hardware: The topology that the train step was compiled for.
      module: The compiled train step.

    Returns:
      A dict of JSON values whose names include their units.
    """
    chip, chips = hardware.chip, len(hardware.devices)
    tokens = config.batch_size * config.sequence_length
    share = masked_share(config.diffusion)
    per_token = flops.flops_per_token(config.model, config.sequence_length, share)
    executed = per_token + flops.recomputed_flops_per_token(config.model, config.sequence_length, config.compute)
    found = collectives.collectives(module, chips, hardware.slices, unknown_trips=loss_turns(config, chips))
    floors = {
        "compute": executed * tokens / chips / chip.peak_flops,
        "links": sum(one.link_bytes() for one in found) / chip.link,
        "network": sum(one.network_bytes() for one in found) / chip.network,
    }
    seconds = max(floors.values())
    steps = int(60 * config.minutes / seconds) if config.minutes else config.steps
    hours = steps * seconds / 3600
    return {
        "masked_share": share,
        "flops_per_token": per_token,
        "flops_per_token_full_head": flops.flops_per_token(config.model, config.sequence_length, head_share=1.0),
        "flops_per_step": per_token * tokens,
        "executed_flops_per_step": executed * tokens,
        "collectives": collectives.totals(found),
        "floor_seconds": floors,
        "step_seconds_at_floor": seconds,
        "tokens_per_second_at_floor": tokens / seconds,
        "mfu_at_floor": per_token * tokens / seconds / chips / chip.peak_flops,
        "recipe_steps": steps,
        "recipe_tokens": steps * tokens,
        "recipe_days_at_floor": hours / 24,
        "recipe_chip_hours_at_floor": hours * chips,
    }


def loss_turns(config: Config, chips: int) -> int:
    """Returns how often the loop over chunks of the loss runs on each device, for the mean number of masked positions.

    The number matters because the devices of a tensor group hold the same rows and communicate in every iteration.
    """
    data, fsdp, _ = mesh.axis_sizes(config.mesh, chips)
    positions = config.batch_size * config.sequence_length // (data * fsdp * config.accumulation)
    masked = round(positions * masked_share(config.diffusion))
    return max(1, math.ceil(masked / min(config.compute.loss_chunk, positions)))


def page(record: dict) -> str:
    """Formats a plan as text for a person."""
    compute, chips = record["compute"], record["chips"]
    place = "slice" if "libtpu" in record["versions"] else "node"
    adapters = f", of adapters {record['adapter_parameters']:,}" if record["adapter_parameters"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lines = [
        f"{record['topology']}: {chips} chips, {record['slices']} {place}(s), mesh {record['mesh']} ({versions})",
        f"{record['parameters']:,} parameters{adapters}; {record['sequences_per_step']} x {record['sequence_length']} "
        f"tokens per step, {record['sequences_per_chip']:g} sequences per chip x {record['accumulation']}",
        f"{compute['dtype']}, attention {compute['attention']}, remat {compute['remat']}, optimizer state "
        f"{record['optimizer_state_dtype']}",
    ]
    if "peak_bytes" in record:
        gib = {name: f"{record[f'{name}_bytes'] / GIB:.2f}" for name in ("argument", "temporary", "peak", "memory")}
        lines += [
            f"memory per chip, GiB: arguments {gib['argument']}, temporaries {gib['temporary']}, "
            f"peak {gib['peak']} of {gib['memory']}; compiled in {record['compile_seconds']:.0f} s",
            f"FLOPs: {record['flops_per_token'] / 1e9:.1f} G per token, {record['flops_per_step'] / 1e15:.1f} P per "
            f"step; {record['executed_flops_per_step'] / 1e15:.1f} P with what the backward pass computes again",
            f"  {record['masked_share']:.0%} of the positions are taken as masked, for the head and its loop",
        ]
        for kind, sums in sorted(record["collectives"].items()):
            network = f", {sums['network_bytes'] / GIB:.2f} over the network" if sums["network_bytes"] else ""
            lines.append(
                f"  {kind}: {sums['runs']:,.0f} runs per step, {sums['link_bytes'] / GIB:.2f} GiB received per chip"
                + network
            )
        floors = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in record["floor_seconds"].items() if seconds)
        lines += [
            f"floors, each alone at its peak: {floors}",
            f"step at the highest floor: {record['step_seconds_at_floor']:.2f} s, "
            f"{record['tokens_per_second_at_floor']:,.0f} tokens/s, MFU {record['mfu_at_floor']:.1%}",
            f"recipe at that floor: {record['recipe_steps']:,} steps, {record['recipe_tokens'] / 1e12:.2f} T tokens, "
            f"{record['recipe_days_at_floor']:.1f} days, {record['recipe_chip_hours_at_floor']:,.0f} chip hours",
            *report.lines(record),
            *storage.lines(record),
        ]
    if record["fits"] and place == "node":
        lines.append(
            f"this plan uses {GPU_SHARE:.0%} of each GPU's memory: export XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"
        )
    lines.append(
        "fits" if record["fits"] else f"does not fit: {record['why']}; use more accumulation, more chips or more remat"
    )
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
