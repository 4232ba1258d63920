"""Tests that collectives are found in programs whose traffic is known.

Some programs are compiled here on simulated devices; others are lines as the TPU and GPU compilers write them.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llada_jax.planning.collectives import Collective, collectives, totals
from llada_jax.planning.hlo import Module

DEVICES = 8


def compiled(make_mesh, function, shape, spec, sizes=(1, 8, 1)):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros(shape, jnp.float32), spec)
        return Module(jax.jit(function).lower(x).compile().as_text())


def test_gather_and_reduce_are_counted_with_their_bytes(make_mesh):
    text = compiled(make_mesh, lambda x: jax.reshard(x, P(None, None)), (64, 32), P("fsdp", None))
    (gather,) = collectives(text, DEVICES, 1, 1)
    assert (gather.kind, gather.size, gather.group, gather.slices, gather.count) == ("all-gather", 64 * 32 * 4, 8, 1, 1)
    assert gather.link_bytes() == 64 * 32 * 4 * 7 / 8
    assert gather.network_bytes() == 0

    total = lambda x: jnp.einsum("bd->d", x, out_sharding=P(None))  # noqa: E731
    (reduce,) = collectives(compiled(make_mesh, total, (64, 32), P("fsdp", None)), DEVICES, 1, 1)
    assert (reduce.kind, reduce.size, reduce.link_bytes()) == ("all-reduce", 32 * 4, 2 * 32 * 4 * 7 / 8)


def test_loops_count_as_often_as_they_run(make_mesh):
    def layers(x_ld):
        def layer(carry, w_d):
            return carry + jnp.sin(jax.reshard(w_d, P(None))).sum(), None

        def outer(carry, _):
            return jax.lax.scan(layer, carry, x_ld)[0], None

        return jax.lax.scan(outer, jnp.float32(0), length=3)[0]

    text = compiled(make_mesh, layers, (5, 1024), P(None, "fsdp"))
    found = [one for one in collectives(text, DEVICES, 1, 1) if one.size == 4096]
    assert sum(one.count for one in found) in (15, 5)  # It is 5 if the compiler moved the gather out of the outer loop.


def test_a_loop_that_depends_on_data_takes_the_given_count(make_mesh):
    def until(x):
        def body(carry):
            i, total = carry
            return i + 1, total + jnp.einsum("bd->d", x * total.sum(), out_sharding=P(None))

        return jax.lax.while_loop(lambda carry: carry[1].sum() < 10, body, (0, jnp.ones(32)))[1]

    text = compiled(make_mesh, until, (64, 32), P("fsdp", None))
    (one,) = [one for one in collectives(text, DEVICES, 1, 7) if one.size == 32 * 4]
    assert one.count == 7


def test_groups_across_slices(make_mesh):
    """Devices 0 to 3 are on one slice, 4 to 7 on the other: the axis data crosses slices, the axis fsdp does not."""
    gather = lambda x: jax.reshard(x, P(None, None))  # noqa: E731
    (inside,) = collectives(compiled(make_mesh, gather, (64, 32), P("fsdp", None), (2, 4, 1)), 8, 2, 1)
    assert (inside.group, inside.slices, inside.network_bytes()) == (4, 1, 0)
    (across,) = collectives(compiled(make_mesh, gather, (64, 32), P("data", None), (2, 4, 1)), 8, 2, 1)
    assert (across.group, across.slices, across.link_bytes()) == (2, 2, 0)
    assert across.network_bytes() == 64 * 32 * 4 / 2
    (both,) = collectives(compiled(make_mesh, gather, (64, 32), P(("data", "fsdp"), None), (2, 4, 1)), 8, 2, 1)
    assert (both.group, both.slices) == (8, 2)
    assert both.network_bytes() == 64 * 32 * 4 / 2 / 4  # The four devices of a slice share the traffic.


HEADER = "HloModule m\n\nENTRY %main (p: f32[8,16]) -> f32[64,16] {\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %g = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8]",
            Collective("all-gather", 64 * 16 * 2, 4, 1, 1.0),
        ),
        (
            "  %g = f32[64,16] all-gather(%p), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
            Collective("all-gather", 64 * 16 * 4, 2, 2, 1.0),
        ),
        (
            "  %g = f32[64,16] all-gather(%p), replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'},"
            " dimensions={0}",
            Collective("all-gather", 64 * 16 * 4, 4, 1, 1.0),
        ),
        (
            "  %s = (f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}",
            Collective("all-gather", 64 * 16 * 4, 8, 2, 1.0),
        ),
        (
            "  %r = (f32[16]{0}, bf16[4,4]{1,0}) all-reduce(%p, %q), replica_groups={{0,4},{1,5}}, to_apply=%add",
            Collective("all-reduce", 16 * 4 + 16 * 2, 2, 2, 1.0),
        ),
        (
            "  %s = ((f32[64,16], bf16[8]), (f32[8,16], bf16[1])) reduce-scatter-start(%p, %q), "
            "replica_groups=mesh['a'=8] {'a'}, use_global_device_ids=true, dimensions={0}, to_apply=%add",
            Collective("reduce-scatter", 64 * 16 * 4 + 8 * 2, 8, 2, 1.0),
        ),
        (
            "  %r = f32[2,16]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add",
            Collective("reduce-scatter", 8 * 16 * 4, 4, 1, 1.0),
        ),
        (
            "  %v = (bf16[8,16]{1,0}, u32[], token[]) recv(%a), channel_id=2, is_host_transfer=true, "
            'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
            Collective("all-reduce", 8 * 16 * 2, 2, 2, 1.0),
        ),
        (
            "  %r = f32[16]{0:T(128)} all-reduce(%p), replica_groups={}, to_apply=%add",
            Collective("all-reduce", 16 * 4, 8, 2, 1.0),
        ),
        (
            "  %c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{3,4}}",
            Collective("collective-permute", 32, 2, 2, 1.0),
        ),
        (
            "  %c = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            Collective("collective-permute", 32, 2, 1, 1.0),
        ),
    ],
)
def test_forms_of_other_compilers(line, expected):
    assert collectives(Module(f"{HEADER}{line}\n}}\n"), 8, 2, 1) == [expected]


def test_an_asynchronous_gather_in_fusions_counts_once():
    """A TPU's gather appears in three fusions: the one that starts it, the matmul beside it, and the one that waits."""
    gather = "  %g{} = f32[64,16] all-gather(%p), channel_id=9, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}\n"
    fused = "".join(f"%f{i} (p: f32[8,16]) -> f32[64,16] {{\n{gather.format(i)}}}\n\n" for i in range(3))
    kernel = '  %k = f32[8] custom-call(%p), backend_config={"x": {\n}}, metadata={}\n'
    calls = "".join(f"  %c{i} = f32[64,16] fusion(%p), kind=kCustom, calls=%f{i}\n" for i in range(3))
    text = f"HloModule m\n\n{fused}{HEADER.removeprefix('HloModule m')}{kernel}{calls}}}\n"
    found = collectives(Module(text), 8, 2, 1)
    assert found == [Collective("all-gather", 64 * 16 * 4, 4, 1, 1.0)]


def test_a_reduce_scatter_in_the_form_of_a_fused_all_reduce():
    reduce = "  %r = f32[64] all-reduce(%p), replica_groups={{0,1,2,3}}\n"
    fused = f"%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {{\n{reduce}}}\n\n"
    call = "  %c = f32[16]{0:T(128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n"
    text = f"HloModule m\n\n{fused}{HEADER.removeprefix('HloModule m')}{call}}}\n"
    assert collectives(Module(text), 4, 1, 1) == [Collective("reduce-scatter", 64 * 4, 4, 1, 1.0)]


def test_branches_and_calls_are_followed():
    """Calls are also followed if the result's layout contains parentheses."""
    reduce = "  %r = f32[8]{0:T(128)} all-reduce(%p), replica_groups={}, to_apply=%add\n"
    inner = "".join(f"%{name} (p: f32[8]) -> f32[8] {{\n{reduce}}}\n\n" for name in ("one", "two"))
    lines = (
        "  %x = f32[8]{0:T(128)} call(%p), to_apply=%one\n"
        "  %y = f32[8]{0:T(128)} conditional(%p, %p, %p), branch_computations={%one, %two}\n"
    )
    text = f"HloModule m\n\n{inner}{HEADER.removeprefix('HloModule m')}{lines}}}\n"
    assert sum(one.count for one in collectives(Module(text), 4, 1, 1)) == 3


def test_totals_add_up():
    found = [Collective("all-reduce", 100, 4, 2, 3.0), Collective("all-reduce", 10, 2, 1, 1.0)]
    assert totals(found) == {"all-reduce": {"runs": 4.0, "link_bytes": 300 + 10, "network_bytes": 150}}
