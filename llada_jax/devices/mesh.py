"""The device mesh, the only table of PartitionSpecs, and the placement of rows on the mesh.

The mesh has three axes: 'data' (replicas of the parameters), 'fsdp' (shards of the batch and of the parameters) and
'tensor' (shards of the heads, the feed-forward width and the vocabulary). All three axes are Explicit: the sharding of
every array is part of its type, and a missing sharding is an error at trace time.
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
BATCH = ("data", "fsdp")  # a batch dimension is split over both axes

# How each parameter is sharded. The comments give the dimensions in the letters of model/transformer.py. The layers
# are stacked: each of their parameters has a leading dimension L in addition, which is not sharded.
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
    # Low-rank adapters (model/lora.py) of rank R: A is sharded like the inputs of its matrix, B like the outputs.
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
    # The scales of int8 matrices (model/int8.py) are sharded like the outputs of their matrix.
    "q_proj_scale": P("tensor", None),  # HK
    "k_proj_scale": P("tensor", None),  # GK
    "v_proj_scale": P("tensor", None),  # GK
    "attn_out_scale": P("fsdp"),  # D
    "ff_proj_scale": P("tensor"),  # F
    "up_proj_scale": P("tensor"),  # F
    "ff_out_scale": P("fsdp"),  # D
    # What models of other families have in addition. A new parameter belongs at the end of this table: its place in it
    # is part of the key of its initial values.
    "q_bias": P("tensor", None),  # HK
    "k_bias": P("tensor", None),  # GK
    "v_bias": P("tensor", None),  # GK
    "q_norm": P(None),  # K
    "k_norm": P(None),  # K
}

ROWS_B = P(BATCH)
TOKENS_BT = P(BATCH, None)
HIDDEN_BTD = P(BATCH, None, None)
HEADS_BTHK = P(BATCH, None, "tensor", None)
KEYS_LBSGK = P(None, BATCH, None, "tensor", None)
FEED_FORWARD_BTF = P(BATCH, None, "tensor")
LOGITS_BTV = P(BATCH, None, "tensor")


def gathered(spec: P) -> P:
    """Returns the spec of a parameter while it is used: gathered over 'fsdp', but still split over 'tensor'."""
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def axis_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the mesh axes, in the order of AXES.

    Args:
      config: The configured sizes, of which one may be -1.
      devices: The number of devices that the mesh must take.

    Returns:
      The sizes, in which -1 is replaced by the number of devices that are left for that axis.

    Raises:
      UserError: If a size is invalid, or if the product of the sizes cannot be the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"config.mesh is {sizes}: every axis must be positive, except that one may be -1 (all devices left)"
        )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % known:
            raise UserError(
                f"config.mesh {dict(zip(AXES, sizes, strict=True))} needs a multiple of {known} devices, "
                f"but there are {devices}: change the sizes of the axes"
            )
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise UserError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} takes {known} devices, but there are {devices}: "
            "set one axis to -1 to use all of them"
        )
    return tuple(sizes)


def mesh_over(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    """Returns the mesh of these axis sizes over these devices, arranged by `device_grid`."""
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * 3)


def device_grid(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices in an array, so that neighbours on an axis are close to each other in the hardware.

    TPU slices are connected by a network that is slower than the links within a slice. Only the 'data' axis crosses it.

    Args:
      sizes: The sizes of AXES, whose product is the number of devices.
      devices: The devices, in any order.

    Returns:
      The array of devices, whose shape is `sizes`.

    Raises:
      UserError: If the size of 'data' is not a multiple of the number of slices.
    """
    devices = list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # An axis may take a part of a dimension of the torus, because some shapes cannot be arranged otherwise.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **split)
    data, fsdp, tensor = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data={data} is not a multiple of the {slices} slices: no other axis may cross slices"
        )
    return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), **split)


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh over all devices of all processes."""
    return mesh_over(axis_sizes(config, len(jax.devices())), jax.devices())


@functools.cache
def one_device_mesh(device: jax.Device | None = None) -> Mesh:
    """Returns a mesh of one device, which is the first local device by default."""
    return mesh_over((1, 1, 1), [device or jax.local_devices()[0]])


def check_model(model: ModelConfig, sizes: tuple[int, int, int]) -> None:
    """Raises UserError if a dimension of a parameter is not divisible by the size of the axis it is split over."""
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
    """Raises UserError unless every micro-batch has the same number of rows for every shard of the batch."""
    shards = sizes[0] * sizes[1]
    if config.batch_size % (shards * config.accumulation):
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by mesh data x fsdp = {shards} "
            f"times config.accumulation={config.accumulation}"
        )


def batch_shards() -> int:
    """Returns the number of shards that a batch dimension is split into on the mesh in use."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape["data"] * shape["fsdp"]


def tensor_shards() -> int:
    """Returns the number of shards that heads, the feed-forward width and the vocabulary are split into."""
    return jax.sharding.get_abstract_mesh().shape["tensor"]


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """Returns a mesh without devices, which is used to compute only shapes and shardings."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def place_rows(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Splits arrays over the batch axes of the mesh in use.

    If B is not a multiple of the number of batch shards, it is rounded up by repeating the last row. The caller must
    drop the rows beyond B from whatever it computes.

    Args:
      *arrays: Arrays of shape (B, ...). None is allowed and stays None.

    Returns:
      The placed arrays, in the same order.
    """

    def place(array):
        missing = -len(array) % batch_shards()
        if missing:
            # An array on the host is padded on the host, because implicit transfers may be disallowed.
            xp = np if isinstance(array, np.ndarray) else jnp
            array = xp.concatenate([xp.asarray(array), xp.repeat(xp.asarray(array)[-1:], missing, axis=0)])
        spec = P(BATCH, *(None,) * (array.ndim - 1))
        if isinstance(array, jax.core.Tracer):
            return jax.reshard(array, spec)
        return jax.device_put(array, spec)

    return tuple(None if array is None else place(array) for array in arrays)


def place_batch(batch: dict, mesh: Mesh, batch_size: int) -> dict:
    """Makes the global arrays of a batch from the rows that each process holds.

    Args:
      batch: Arrays by name, with the rows of this process (`local_rows`) along the first dimension.
      mesh: The mesh that the arrays are placed on.
      batch_size: The number of rows of the global batch.

    Returns:
      The global arrays by name, split over the batch axes.
    """

    def place(x):
        spec = P(BATCH, *(None,) * (x.ndim - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, (batch_size, *x.shape[1:]))

    # If other processes hold rows too, JAX counts this as an implicit transfer.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: place(x) for name, x in batch.items()}


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the indices of the rows of the global batch that this process supplies, in ascending order."""
    sharding = NamedSharding(mesh, ROWS_B)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    slices = {index[0].indices(batch_size)[:2] for index in indices}
    return [row for first, last in sorted(slices) for row in range(first, last)]


@contextlib.contextmanager
def without_devices():
    """Enters a mesh for `jax.eval_shape` alone. It needs no device and starts no backend, whatever mesh is in use.

    In a run of several processes a backend starts only when all of them start it, so that one process alone must not.
    """
    current = jax.sharding.get_abstract_mesh()
    size = 1 if current.empty else current.size  # JAX lets no inner mesh have another size
    with jax.sharding.use_abstract_mesh(abstract_mesh((size, 1, 1))):
        yield


@functools.partial(jax.jit, static_argnums=1)
def cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the array in another dtype, computed on the devices that hold it and with the same sharding."""
    return x.astype(dtype)


@contextlib.contextmanager
def mesh_of(array: jax.Array):
    """Sets the mesh that `array` is placed on, unless a mesh is set already or the code is being traced."""
    if not jax.sharding.get_abstract_mesh().empty or not isinstance(array.sharding, NamedSharding):
        yield
        return
    with jax.set_mesh(array.sharding.mesh):
        yield
