"""Estimates what a run asks of its storage, and how long it stands still when it is killed.

The checkpoint's bytes, the rows and the bytes of the data follow from the config. How fast a host reads and writes is
an assumption, RATE, which `plan --storage_gb_per_s` replaces.
"""

import math
from collections.abc import Mapping, Sequence

import jax

from llada_jax.config import Config
from llada_jax.devices.hardware import GIB, GPU
from llada_jax.training.step import make_state

RATE = 1e9  # bytes per second that a host is taken to read from the storage, or to write to it
# Seconds from the birth of the processes to the read of the checkpoint. An assumption: imports, devices and data take
# 2.2 seconds of CPU time on a CPU machine ("Restarts" in benchmarks/RESULTS.md), and chips must be initialised too.
STARTUP = 10.0


def costs(config: Config, mesh: jax.sharding.Mesh, record: Mapping, rate: float = RATE) -> dict:
    """Returns what checkpoints, the data and a restart take.

    Args:
      config: The run's configuration, with the architecture filled in.
      mesh: The described devices.
      record: The plan, with the seconds of a step.
      rate: Bytes per second between a host and the storage.

    Returns:
      A dict of JSON values whose names include their units.
    """
    with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(jax.eval_shape(lambda: make_state(config)))
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    shard = sum(math.prod(_on_a_chip(x)) * x.dtype.itemsize for x in leaves)
    hosts = _hosts(list(mesh.devices.flat), record["slices"])
    per_host = min(total, shard * mesh.devices.size // hosts)
    step = record.get("estimated_step_seconds") or record["step_seconds_at_floor"]
    rows = config.batch_size / (2 if config.diffusion.complementary else 1) / step / hosts
    row = 8 + config.sequence_length * (2 if config.model.vocab_size <= 1 << 16 else 4)
    limits = config.distributed
    return {
        "hosts": hosts,
        "storage_bytes_per_second_per_host": rate,
        "checkpoint_bytes": total,
        "checkpoint_write_seconds": total / hosts / rate,  # each host writes an equal part
        "checkpoint_read_bytes_per_host": per_host,
        "checkpoint_read_seconds": per_host / rate,
        "data_rows_per_second_per_host": rows,
        "data_bytes_per_second_per_host": rows * row,
        "restart_seconds": {
            "notice": limits.heartbeat_timeout + limits.shutdown_timeout if hosts > 1 else 0,
            "startup": STARTUP,
            "read": per_host / rate,
        },
        "redone_steps": config.checkpoint.every / 2,
        "redone_seconds": config.checkpoint.every / 2 * step,
    }


def _on_a_chip(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # a scalar has no sharding


def _hosts(devices: Sequence[jax.Device], nodes: int) -> int:
    """Returns the number of hosts: the description of a TPU names them, and a node with GPUs is a host."""
    if devices[0].platform in GPU:
        return nodes
    return len({(getattr(device, "slice_index", 0), device.process_index) for device in devices})


def lines(record: Mapping) -> list[str]:
    """Formats `costs` as lines of text for a person."""
    if "checkpoint_bytes" not in record:
        return []
    parts = record["restart_seconds"]
    noticed = f"{parts['notice']:.0f} s until the others notice, " if parts["notice"] else ""
    return [
        f"storage, at {record['storage_bytes_per_second_per_host'] / 1e9:g} GB/s for each of {record['hosts']} host(s) "
        "(--storage_gb_per_s):",
        f"  checkpoint: {record['checkpoint_bytes'] / GIB:.2f} GiB, written in "
        f"{record['checkpoint_write_seconds']:.1f} s in the background, read in "
        f"{record['checkpoint_read_seconds']:.1f} s",
        f"  data: {record['data_rows_per_second_per_host']:.3g} rows, "
        f"{record['data_bytes_per_second_per_host'] / 1e6:.3g} MB per second for each host",
        f"  from a kill to the next step: {sum(parts.values()):.0f} s ({noticed}{parts['startup']:.0f} s to start, "
        f"{parts['read']:.1f} s to read the checkpoint), and the launcher's time",
        f"  then {record['redone_steps']:,.0f} steps are done again on average, {record['redone_seconds']:,.0f} s",
    ]
