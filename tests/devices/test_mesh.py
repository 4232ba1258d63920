"""Tests of the sizes of the mesh, of what must be divisible by them, and of the placement of the rows of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config, MeshConfig, ModelConfig, UserError
from llada_jax.devices import mesh


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((1, -1, 1), 8, (1, 8, 1)), ((-1, 2, 2), 8, (2, 2, 2)), ((2, 2, -1), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)), ((1, -1, 1), 1, (1, 1, 1)), ((4, 32, 1), 128, (4, 32, 1)),
    ],
)  # fmt: skip
def test_axis_sizes(sizes, devices, expected):
    assert mesh.axis_sizes(MeshConfig(*sizes), devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [((-1, -1, 1), 8), ((0, 1, 1), 8), ((1, -2, 1), 8), ((3, -1, 1), 8), ((2, 2, 1), 8), ((2, 8, 1), 8)],
)
def test_impossible_axis_sizes(sizes, devices):
    with pytest.raises(UserError, match=r"config\.mesh") as caught:
        mesh.axis_sizes(MeshConfig(*sizes), devices)
    assert "\n" not in str(caught.value)


def test_make_mesh_takes_all_devices():
    device_mesh = mesh.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(device_mesh.shape) == {"data": 2, "fsdp": len(jax.devices()) // 4, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in device_mesh.axis_types)


def test_one_device_mesh():
    first, last = jax.devices()[0], jax.devices()[-1]
    assert list(mesh.one_device_mesh().devices.flat) == [first]
    assert list(mesh.one_device_mesh(last).devices.flat) == [last]


@pytest.mark.parametrize(
    ("changes", "sizes", "named"),
    [
        ({"width": 60}, (1, 8, 1), "config.model.width=60 .* config.mesh.fsdp=8"),
        ({"heads": 6, "kv_heads": 6}, (1, 1, 4), "config.model.heads=6 .* config.mesh.tensor=4"),
        ({"kv_heads": 2}, (1, 1, 4), "config.model.kv_heads=2 .* config.mesh.tensor=4"),
        ({"feed_forward": 130}, (1, 1, 4), "config.model.feed_forward=130 .* config.mesh.tensor=4"),
        ({"vocab_size": 126}, (1, 1, 4), "config.model.vocab_size=126 .* config.mesh.tensor=4"),
    ],
)
def test_model_must_divide_by_the_mesh(changes, sizes, named):
    shape = {"layers": 2, "width": 64, "heads": 8, "kv_heads": 8, "feed_forward": 128, "vocab_size": 128}
    mesh.check_model(ModelConfig(**shape), sizes)
    with pytest.raises(UserError, match=named):
        mesh.check_model(ModelConfig(**(shape | changes)), sizes)
    mesh.check_model(ModelConfig(**(shape | changes)), (8, 1, 1))  # replicas of the parameters split no dimension


def test_batch_must_divide_by_the_mesh():
    mesh.check_batch(Config(batch_size=16, accumulation=2), (2, 4, 8))
    for config, sizes in ((Config(batch_size=12), (2, 4, 1)), (Config(batch_size=16, accumulation=4), (2, 4, 1))):
        with pytest.raises(UserError, match=r"config\.batch_size=1[26] .* 8 times config\.accumulation=[14]"):
            mesh.check_batch(config, sizes)


def test_gathered_drops_only_fsdp():
    assert mesh.gathered(P("fsdp", "tensor", None)) == P(None, "tensor", None)
    assert mesh.gathered(P("tensor", None, "fsdp")) == P("tensor", None, None)


def test_batch_shards(make_mesh):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert mesh.batch_shards() == 4


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_place_rows(make_mesh, sizes):
    tokens, length = np.arange(20).reshape(5, 4), np.arange(5)
    with jax.set_mesh(make_mesh(*sizes)):
        shards = mesh.batch_shards()
        placed, none, placed_length = mesh.place_rows(tokens, None, length)
        assert none is None
        assert len(placed) == -(-5 // shards) * shards
        assert jax.typeof(placed).sharding.spec == P(mesh.BATCH, None)
        assert jax.typeof(placed_length).sharding.spec == P(mesh.BATCH)
        np.testing.assert_array_equal(np.asarray(placed)[:5], tokens)
        np.testing.assert_array_equal(np.asarray(placed_length)[5:], 4)  # the last row is repeated
        traced = jax.jit(lambda x: mesh.place_rows(x)[0])(jnp.arange(5.0))
        np.testing.assert_array_equal(np.asarray(traced)[:5], np.arange(5.0))


def test_place_batch_and_local_rows_belong_together(make_mesh):
    """If every process supplies the rows that local_rows lists, in this order, all rows of the batch are in place."""
    device_mesh = make_mesh(2, 2, 2)
    rows = mesh.local_rows(device_mesh, 16)
    assert rows == list(range(16))  # one process supplies every row exactly once
    whole = {"tokens": np.arange(64, dtype=np.int32).reshape(16, 4), "length": np.arange(16, dtype=np.int32)}
    placed = mesh.place_batch({name: x[rows] for name, x in whole.items()}, device_mesh, 16)
    for name, x in whole.items():
        np.testing.assert_array_equal(np.asarray(placed[name]), x)
    shards = {s.device.id: np.asarray(s.data) for s in placed["length"].addressable_shards}
    order = [device.id for device in device_mesh.devices.flat]
    np.testing.assert_array_equal(shards[order[0]], [0, 1, 2, 3])
    np.testing.assert_array_equal(shards[order[1]], [0, 1, 2, 3])  # the neighbour on the 'tensor' axis
    np.testing.assert_array_equal(shards[order[-1]], [12, 13, 14, 15])


def test_local_rows_of_one_of_several_processes(make_mesh):
    """A process with only some devices of the mesh gets exactly the rows of these devices."""

    class Elsewhere:
        def addressable_devices_indices_map(self, shape):
            return {"a": (slice(8, 12, None),), "b": (slice(8, 12, None),), "c": (slice(0, 4, None),)}

    before = mesh.NamedSharding
    mesh.NamedSharding = lambda *_: Elsewhere()
    try:
        assert mesh.local_rows(None, 16) == [0, 1, 2, 3, 8, 9, 10, 11]
    finally:
        mesh.NamedSharding = before


def test_mesh_of_enters_the_mesh_of_an_array(make_mesh):
    device_mesh = make_mesh(1, 2, 1)
    with jax.set_mesh(device_mesh):
        array = jax.device_put(np.zeros(4), P("fsdp"))
    with mesh.mesh_of(array):
        assert jax.sharding.get_mesh() == device_mesh
    with jax.set_mesh(make_mesh()), mesh.mesh_of(array):
        assert jax.sharding.get_mesh().size == 1  # a mesh that is already set stays in use
    with mesh.mesh_of(jnp.zeros(4)):
        assert jax.sharding.get_abstract_mesh().empty


class Chip:
    """A stand-in for a TPU device, with the attributes that mesh_utils reads."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, number, slice_index):
        self.id = self.process_index = number
        self.slice_index, self.core_on_chip = slice_index, 0
        self.coords = (number % 4 % 2, number % 4 // 2, 0)


def test_only_the_data_axis_crosses_slices():
    chips = [Chip(number, number // 4) for number in (5, 0, 7, 2, 1, 4, 3, 6)]
    grid = mesh.device_grid((2, 2, 2), chips)
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    assert mesh.device_grid((4, 2, 1), chips).shape == (4, 2, 1)
    with pytest.raises(UserError, match="config.mesh.data=1 is not a multiple of the 2 slices"):
        mesh.device_grid((1, 8, 1), chips)
