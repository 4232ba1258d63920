"""The device mesh, the one table of PartitionSpecs, and how rows are placed on it.

The mesh has three axes: 'data' (replicas of the parameters), 'fsdp' (batch and parameters
sharded) and 'tensor' (heads, feed-forward and vocabulary sharded). All are Explicit: every
array's sharding is part of its type, and a forgotten one is an error at trace time.
"""

import contextlib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config, MeshConfig, ModelConfig, UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch dimension is split over both

# Where each parameter lives. Stacked layers have a leading unsharded L in front.
PARAMETERS = {
    "embedding": P("tensor", "fsdp"),  # VD
    "head": P("fsdp", "tensor"),  # DV
    "final_norm": P(None),  # D
    "attn_norm": P(None),  # D
    "q_proj": P("fsdp", "tensor", None),  # DHK
    "k_proj": P("fsdp", "tensor", None),  # DGK
    "v_proj": P("fsdp", "tensor", None),  # DGK
    "attn_out": P("tensor", None, "fsdp"),  # HKD
    "ff_norm": P(None),  # D
    "ff_proj": P("fsdp", "tensor"),  # DF
    "up_proj": P("fsdp", "tensor"),  # DF
    "ff_out": P("tensor", "fsdp"),  # FD
    # Low-rank adapters (lora.py), R their rank: A lies as the inputs of its matrix do, B as the outputs.
    "q_proj_a": P("fsdp", None),  # DR
    "q_proj_b": P(None, "tensor", None),  # RHK
    "k_proj_a": P("fsdp", None),  # DR
    "k_proj_b": P(None, "tensor", None),  # RGK
    "v_proj_a": P("fsdp", None),  # DR
    "v_proj_b": P(None, "tensor", None),  # RGK
    "attn_out_a": P("tensor", None, None),  # HKR
    "attn_out_b": P(None, "fsdp"),  # RD
    "ff_proj_a": P("fsdp", None),  # DR
    "ff_proj_b": P(None, "tensor"),  # RF
    "up_proj_a": P("fsdp", None),  # DR
    "up_proj_b": P(None, "tensor"),  # RF
    "ff_out_a": P("tensor", None),  # FR
    "ff_out_b": P(None, "fsdp"),  # RD
}

ROWS_B = P(BATCH)
TOKENS_BT = P(BATCH, None)
HIDDEN_BTD = P(BATCH, None, None)
HEADS_BTHK = P(BATCH, None, "tensor", None)
FEED_FORWARD_BTF = P(BATCH, None, "tensor")
LOGITS_BTV = P(BATCH, None, "tensor")


def gathered(spec: P) -> P:
    """The spec of a parameter while it is used: its fsdp shards gathered, its tensor shards not."""
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def axis_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of AXES for this many devices, -1 resolved. UserError if they do not multiply to it."""
    sizes = [config.data, config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh is {sizes}: axes must be positive, at most one may be -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % known:
            raise UserError(f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not divide {devices} devices")
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise UserError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} takes {known} devices, there are {devices}: "
            "set one axis to -1 to use all of them"
        )
    return tuple(sizes)


def mesh_over(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these axis sizes over these devices, see `device_grid`."""
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * 3)


def device_grid(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array of these axis sizes, neighbours on an axis near each other.

    Devices of several TPU slices are joined over the slower network: only the 'data' axis crosses it.
    UserError if 'data' is not a multiple of the number of slices.
    """
    devices = list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # An axis may take parts of a torus dimension: some shapes could not be laid out otherwise.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **split)
    data, fsdp, tensor = sizes
    if data % slices:
        raise UserError(f"config.mesh.data={data} is not a multiple of the {slices} slices: only it may cross them")
    return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), **split)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all processes."""
    return mesh_over(axis_sizes(config, len(jax.devices())), jax.devices())


@functools.cache
def one_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device (the first local one by default)."""
    return mesh_over((1, 1, 1), [device or jax.local_devices()[0]])


def check_model(model: ModelConfig, sizes: tuple[int, int, int]) -> None:
    """UserError if a parameter's dimension is not divisible by the mesh axis it is split over."""
    _, fsdp, tensor = sizes
    for name, value, axis, size in (
        ("width", model.width, "fsdp", fsdp),
        ("heads", model.heads, "tensor", tensor),
        ("kv_heads", model.kv_heads, "tensor", tensor),
        ("feed_forward", model.feed_forward, "tensor", tensor),
        ("vocab_size", model.vocab_size, "tensor", tensor),
    ):
        if value % size:
            raise UserError(f"config.model.{name}={value} is not divisible by config.mesh.{axis}={size}")


def check_batch(config: Config, sizes: tuple[int, int, int]) -> None:
    """UserError unless every micro-batch gives every batch shard the same number of rows."""
    shards = sizes[0] * sizes[1]
    if config.batch_size % (shards * config.accumulation):
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by mesh data x fsdp = {shards} "
            f"times config.accumulation={config.accumulation}"
        )


def batch_shards() -> int:
    """Number of shards a batch dimension is split into on the mesh in use."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape["data"] * shape["fsdp"]


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh without devices, for shapes and shardings only."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def place_rows(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Arrays (B, ...) split over the batch axes of the mesh in use; None stays None.

    B is rounded up to a multiple of the batch shards by repeating the last row: drop what is
    beyond B from the result.
    """

    def place(array):
        missing = -len(array) % batch_shards()
        if missing:
            # On the host if it lies there: an implicit transfer may be disallowed.
            xp = np if isinstance(array, np.ndarray) else jnp
            array = xp.concatenate([xp.asarray(array), xp.repeat(xp.asarray(array)[-1:], missing, axis=0)])
        spec = P(BATCH, *(None,) * (array.ndim - 1))
        if isinstance(array, jax.core.Tracer):
            return jax.reshard(array, spec)
        return jax.device_put(array, spec)

    return tuple(None if array is None else place(array) for array in arrays)


def place_batch(batch: dict, mesh: Mesh, batch_size: int) -> dict:
    """The global arrays of a batch of which each process holds its own rows."""

    def place(x):
        spec = P(BATCH, *(None,) * (x.ndim - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, (batch_size, *x.shape[1:]))

    # JAX counts this as an unasked transfer where other processes hold rows too.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: place(x) for name, x in batch.items()}


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that this process feeds, ascending."""
    sharding = NamedSharding(mesh, ROWS_B)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    slices = {index[0].indices(batch_size)[:2] for index in indices}
    return [row for first, last in sorted(slices) for row in range(first, last)]


@contextlib.contextmanager
def mesh_of(array: jax.Array):
    """Enters the mesh that `array` lives on, unless a mesh is set already (or we are inside a trace)."""
    if not jax.sharding.get_abstract_mesh().empty or not isinstance(array.sharding, NamedSharding):
        yield
        return
    with jax.set_mesh(array.sharding.mesh):
        yield
