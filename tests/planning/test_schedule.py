"""Tests the simulation of a step on small programs, written here, whose durations are worked out by hand."""

import dataclasses

import pytest
from programs import CHIP, LOOP, MICRO, SPARSE, START, WHILE, op, program, run

from llada_jax.planning.durations import Rates, kernel_flops, product_flops
from llada_jax.planning.hlo import shapes
from llada_jax.planning.schedule import simulate


def test_instructions_run_one_after_the_other():
    block, found = run(
        program(f"""
            %p = f32[8]{{0}} parameter(0)
            %a = f32[8]{{0}} add(%p, %p), {op("jvp(norm)/add", 1000)}
            %b = f32[8]{{0}} multiply(%a, %a), {op("jvp(norm)/mul", 2000)}
        """)
    )
    assert block.seconds == pytest.approx(3 * MICRO)
    assert [event.start for event in block.events] == pytest.approx([0, MICRO])
    assert found["estimated_parts"] == {"norms": {"forward": pytest.approx(3 * MICRO)}}


@pytest.mark.parametrize(
    ("limit", "annotated", "turns", "expected"),
    [
        ("%n = s32[] constant(32)", "", 7, 32),
        ("%n = s32[] parameter(1)", "", 7, 7),  # depends on data
        ("%n = s32[] constant(32)", ', backend_config={"known_trip_count":{"n":"5"}}', 7, 5),
    ],
)
def test_loops_take_as_long_as_their_trips(limit, annotated, turns, expected):
    block, found = run(program(WHILE + annotated, LOOP.replace("LIMIT", limit)), turns)
    assert block.seconds == pytest.approx(expected * MICRO)
    assert found["estimated_parts"] == {"attention": {"backward": pytest.approx(expected * MICRO)}}
    (dearest,) = found["estimated_dearest"]
    assert (dearest["name"], dearest["runs"]) == ("y", expected)


def test_loops_in_loops_multiply():
    outer = LOOP.replace("%body", "%outer").replace("%condition", "%limit").replace("LIMIT", "%n = s32[] constant(3)")
    outer = outer.replace("  %y = ", "  %v = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body\n  %y = ")
    inner = LOOP.replace("LIMIT", "%n = s32[] constant(10)")
    loop = WHILE.replace("condition=%condition, body=%body", "condition=%limit, body=%outer")
    block, _ = run(program(loop, inner + outer))
    assert block.seconds == pytest.approx(3 * (10 + 1) * MICRO)


def test_a_kernel_with_line_breaks_in_its_description_is_one_instruction():
    module = program(f"""
        %p = f32[8]{{0}} parameter(0)
        %k = f32[8]{{0}} custom-call(%p), custom_call_target="note", frontend_attributes={{x={{
"a":"b"
}}}}, {op("jvp(norm)/k")}
        %a = f32[8]{{0}} add(%k, %k), {op("jvp(norm)/add", 1000)}
    """)
    kernel, addition = module.computations["main"][1:]
    assert kernel.op_name.endswith("jvp(norm)/k") and addition.operands == ("k", "k")


def test_what_the_compiler_does_not_know_takes_its_bytes():
    """2 ** 63 - 1 cycles mean that the compiler has no estimate. 250 floats are read and written: 2,000 bytes."""
    block, found = run(
        program(f"""
            %p = f32[250]{{0}} parameter(0)
            %a = f32[250]{{0}} sort(%p), {op("jvp(embedding)/sort", 2**63 - 1)}
            %b = f32[250]{{0}} sort(%a), {op("jvp(embedding)/sort")}
            %c = f32[250]{{0}} add(%b, %b), {op("jvp(embedding)/add", 4000)}
            %v = f32[250]{{0:S(1)}} sort(%b), {op("jvp(embedding)/sort")}
            %s = s32[] add(%n, %n), {op("jvp()/add")}
        """)
    )
    # The result of %v is in vector memory, so only its operand counts. Scalars take no time.
    assert block.seconds == pytest.approx((2 + 2 + 4 + 1) * MICRO)
    assert found["estimated_basis"]["bytes"] == pytest.approx(5 * MICRO)
    assert found["estimated_unknown"] == {"instructions": pytest.approx(3 / 4), "seconds": pytest.approx(5 / 9)}


STARTS = {
    "offloaded": (START, "%d = f32[1000]{0} call-done(%s)", SPARSE),
    "plain": (
        "%s = (f32[250]{0}, f32[1000]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}",
        "%d = f32[1000]{0} all-gather-done(%s)",
        "",
    ),
    "fused": (
        "%s = (f32[250]{0}, f32[1000]{0}) fusion(%p), kind=kCustom, calls=%first",
        "%d = f32[1000]{0} fusion(%e), kind=kCustom, calls=%last",
        "".join(
            SPARSE.replace("%gather", f"%{name}").replace("ROOT %g", "%g").replace(
                "\n}", f'\n  ROOT %c = f32[1000]{{0}} custom-call(%g), custom_call_target="AsyncCollective{kind}"\n}}'
            )
            for name, kind in (("first", "Start"), ("last", "Done"))
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", STARTS)
@pytest.mark.parametrize(("beside", "exposed"), [(1000, 2), (5000, 0)])
def test_a_transfer_runs_beside_what_stands_between_its_start_and_its_end(form, beside, exposed):
    """Each of 4 devices receives 3,000 of the 4,000 bytes: 3 microseconds."""
    start, done, others = STARTS[form]
    module = program(
        f"""
        %p = f32[250]{{0}} parameter(0)
        {start}
        %e = f32[250]{{0}} add(%p, %p), {op("jvp()/closed_call/feed_forward/mul", beside)}
        {done}
        %f = f32[250]{{0}} add(%p, %p), {op("jvp()/closed_call/feed_forward/mul", 1000)}
        """,
        others,
    )
    block, found = run(module)
    assert block.seconds == pytest.approx((beside / 1000 + exposed + 1) * MICRO)
    moved = found["communication_seconds"]
    assert moved == {"hidden": pytest.approx((3 - exposed) * MICRO), "exposed": pytest.approx(exposed * MICRO)}
    waits = {"communication": {"forward": pytest.approx(exposed * MICRO)}} if exposed else {}
    assert found["estimated_parts"] == {"feed-forward": {"forward": pytest.approx((beside + 1000) * 1e-9)}} | waits


def test_transfers_share_the_links():
    """The second transfer begins when the first has ended; both are waited for at 6 microseconds, not at 3."""
    start, done, others = STARTS["offloaded"]
    both = "\n".join([start, start.replace("%s", "%s2"), done.replace("%s", "%s2").replace("%d", "%d2"), done])
    block, found = run(program(f"%p = f32[250]{{0}} parameter(0)\n{both}", others))
    assert block.seconds == pytest.approx(6 * MICRO)
    assert found["communication_seconds"] == {
        "hidden": pytest.approx(0, abs=1e-12),
        "exposed": pytest.approx(6 * MICRO),
    }


def test_a_synchronous_collective_is_exposed_as_a_whole():
    """An all-reduce of 1,000 bytes moves 2 x 3/4 of them to each of 4 devices."""
    block, found = run(
        program(f"""
            %p = f32[250]{{0}} parameter(0)
            %e = f32[250]{{0}} add(%p, %p), {op("jvp(norm)/mul", 1000)}
            %r = f32[250]{{0}} all-reduce(%e), replica_groups={{{{0,1,2,3}}}}, to_apply=%add, {op("optimizer/psum")}
        """)
    )
    assert block.seconds == pytest.approx((1 + 1.5) * MICRO)
    assert found["communication_seconds"] == {"hidden": 0, "exposed": pytest.approx(1.5 * MICRO)}
    assert found["estimated_parts"]["communication"] == {"update": pytest.approx(1.5 * MICRO)}


def test_hidden_and_exposed_communication_add_up_to_all_of_it():
    start, done, others = STARTS["offloaded"]
    reduce = f"%r = f32[250]{{0}} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%add, {op('optimizer/psum')}"
    work = f"%e = f32[250]{{0}} add(%p, %p), {op('jvp(norm)/mul', 3000)}"
    _, found = run(program("\n".join(["%p = f32[250]{0} parameter(0)", start, work, done, reduce]), others))
    assert found["communication_seconds"] == {"hidden": pytest.approx(3 * MICRO), "exposed": pytest.approx(1.5 * MICRO)}


def test_copies_run_beside_the_core_until_their_end():
    """A copy of 4,000 bytes from main to vector memory takes 4 microseconds, of which the core waits for 3."""
    block, found = run(
        program(f"""
            %p = f32[1000]{{0}} parameter(0)
            %s = (f32[1000]{{0:S(1)}}, f32[1000]{{0}}, u32[]{{:S(2)}}) copy-start(%p)
            %e = f32[1000]{{0}} add(%p, %p), {op("optimizer/add", 1000)}
            %d = f32[1000]{{0:S(1)}} copy-done(%s)
        """)
    )
    assert block.seconds == pytest.approx(4 * MICRO)
    assert found["estimated_basis"]["wait"] == pytest.approx(3 * MICRO)
    assert found["estimated_parts"] == {
        "optimizer": {"update": pytest.approx(1 * MICRO)}, "copies": {"update": pytest.approx(3 * MICRO)}
    }  # fmt: skip
    assert found["communication_seconds"] == {"hidden": 0, "exposed": 0}


ATTENTION = "bf16[2,4,256,128]{3,2,1,0}"


@pytest.mark.parametrize(
    ("name", "products"),
    [("splash_mha_fwd_residuals", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4), ("splash_mha_dkv_fused", 5)],
)
def test_an_attention_kernel_takes_its_flops_at_a_share_of_the_peak(name, products):
    settings = r'frontend_attributes={kernel_metadata={"x":"{\"use_fused_bwd_kernel\": true}"}}, '
    module = program(f"""
        %m = s8[1,2,2]{{2,1,0}} parameter(0)
        %q = {ATTENTION} parameter(1)
        %{name} = {ATTENTION} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call", {
        settings if "fused" in name else ""
    }{op("attention/x")}
    """)
    flops = products * 2 * 2 * 4 * 256 * 256 * 128
    assert kernel_flops(module, "main", module.find("main", name)) == flops
    quick = Rates(dataclasses.replace(CHIP, memory_bandwidth=1e12), 0.25)
    (event,) = simulate(module, quick, 4, 1, 1).events
    assert event.seconds == pytest.approx(flops / (1e12 * 0.25))
    assert event.basis == "kernel model" and event.part == "attention"
    # At 1e9 bytes/s, the memory is what limits it: four arrays of 2 x 4 x 256 x 128 in bfloat16, and the mask.
    assert run(module)[0].seconds == pytest.approx((4 * 2 * 4 * 256 * 128 * 2 + 4) / 1e9)


def test_products_are_counted_whatever_their_layout():
    module = program(f"""
        %x = bf16[5,64,32]{{1,2,0}} parameter(0)
        %w = bf16[32,16,1]{{0,1,2}} parameter(1)
        %y = bf16[5,64,16]{{1,2,0}} convolution(%x, %w), window={{size=1}}, dim_labels=0bf_io0->0bf, {op("jvp()/y", 9)}
        %a = bf16[4,8,2]{{2,1,0}} parameter(2)
        %b = bf16[4,2,3]{{2,1,0}} parameter(3)
        %c = f32[4,8,3]{{2,1,0}} dot(%a, %b), lhs_batch_dims={{0}}, rhs_batch_dims={{0}}, lhs_contracting_dims={{2}}
    """)
    assert product_flops(module, "main", module.find("main", "y")) == pytest.approx(2 * 5 * 64 * 32 * 16)
    assert product_flops(module, "main", module.find("main", "c")) == pytest.approx(2 * 4 * 8 * 2 * 3)
    assert run(module)[1]["estimated_products"] == {"seconds": pytest.approx(9e-9), "flops": pytest.approx(327680)}


def test_sizes_of_arrays():
    found = shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[7], f8e4m3fn[4])")
    assert [(one.bytes, one.space) for one in found] == [(12, "S(1)"), (4, ""), (7, ""), (4, "")]
