"""Tests which part of the model, and which pass, instructions are counted under."""

import pytest

from llada_jax.planning.hlo import Module
from llada_jax.planning.parts import part_of, pass_of

LAYER = "jit(train_step)/transpose(jvp())/while/body/closed_call/checkpoint"


def module(*entry: str, fused: tuple[str, ...] = ()) -> Module:
    inner = "%inner (p: f32[8]) -> f32[8] {\n" + "".join(f"  {line}\n" for line in fused) + "}\n\n"
    lines = "".join(f"  {line}\n" for line in entry)
    return Module(f"HloModule m\n\n{inner}ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}}}\n")


def first(*entry: str, fused: tuple[str, ...] = ()):
    made = module(*entry, fused=fused)
    one = made.computations["main"][0]
    return part_of(made, one), pass_of(made, one)


@pytest.mark.parametrize(
    ("name", "part", "in_pass"),
    [
        ("jit(train_step)/jvp(embedding)/gather", "embedding", "forward"),
        ("jit(train_step)/transpose(jvp(embedding))/scatter-add", "embedding", "backward"),
        ("jit(train_step)/jvp()/while/body/closed_call/norm/rsqrt", "norms", "forward"),
        (f"{LAYER}/attention/shard_map/reduce_sum", "attention", "backward"),
        (f"{LAYER}/rematted_computation/attention_projections/x", "attention projections", "recomputed"),
        (f"{LAYER}/rematted_computation/feed_forward/jit(silu)/mul", "feed-forward", "recomputed"),
        ("jit(train_step)/jvp(head_and_loss)/shard_map/while/body/exp", "head and loss", "forward"),
        ("jit(train_step)/jvp(head_and_loss)/shard_map/while/body/gradients/mul", "head and loss", "backward"),
        ("jit(train_step)/jvp(attention)/while/body/norm/mul", "norms", "forward"),  # the innermost scope
        ("jit(train_step)/optimizer/add", "optimizer", "update"),
        ("jit(train_step)/while/body/optimizer/add", "optimizer", "update"),
        ("jit(train_step)/jvp(vmap())/random_bits", "other", "forward"),
        ("jit(train_step)/some_attention_like/add", "other", None),
    ],
)
def test_scopes_of_the_model_name_the_parts(name, part, in_pass):
    assert first(f'%a = f32[8] add(%p, %p), metadata={{op_name="{name}"}}') == (part, in_pass)


def test_the_product_in_a_fusion_decides():
    """The activation that stands in front of the product, and the sum behind it, are fused into it."""
    fused = (
        f'%n = f32[8] multiply(%p, %p), metadata={{op_name="{LAYER}/norm/mul"}}',
        f'%d = f32[8] dot(%n, %p), metadata={{op_name="{LAYER}/rematted_computation/feed_forward/dot_general"}}',
        f'ROOT %a = f32[8] add(%d, %p), metadata={{op_name="{LAYER}/norm/add"}}',
    )
    call = f'%f = f32[8] fusion(%p), kind=kOutput, calls=%inner, metadata={{op_name="{LAYER}/norm/add"}}'
    assert first(call, fused=fused) == ("feed-forward", "recomputed")


@pytest.mark.parametrize(("opcode", "part"), [("transpose", "copies"), ("convert", "copies"), ("tanh", "attention")])
def test_fusions_that_only_move_numbers_are_copies(opcode, part):
    fused = (
        "%i = s32[] add(%n, %n)",  # where to: scalars do not count
        f'%t = f32[8] {opcode}(%p), metadata={{op_name="{LAYER}/attention/{opcode}"}}',
        "ROOT %u = f32[9,8] dynamic-update-slice(%q, %t, %i)",
    )
    call = f'%f = f32[9,8] fusion(%p), kind=kLoop, calls=%inner, metadata={{op_name="{LAYER}/dynamic_update_slice"}}'
    assert first(call, fused=fused) == (part, "backward")


def test_where_an_instruction_comes_from():
    """The innermost line of this package counts, but a line that calls a helper of the same file says more."""
    tables = """
FileNames
1 "/home/me/llada_jax/model/transformer.py"
2 "/site-packages/jax/numpy.py"
3 "/home/me/llada_jax/planning/estimate.py"

FunctionNames
1 "Block.__call__"
2 "Block.__call__.<locals>.linear"
3 "_einsum"
4 "einsum"
5 "Transformer.trunk.<locals>.layer"

FileLocations
1 {file_name_id=3 function_name_id=4 line=5 end_line=5 column=1 end_column=1}
2 {file_name_id=1 function_name_id=5 line=200 end_line=200 column=1 end_column=1}
3 {file_name_id=1 function_name_id=1 line=133 end_line=133 column=1 end_column=1}
4 {file_name_id=1 function_name_id=2 line=126 end_line=126 column=1 end_column=1}
5 {file_name_id=1 function_name_id=3 line=79 end_line=79 column=1 end_column=1}
6 {file_name_id=2 function_name_id=4 line=9 end_line=9 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=5}
6 {file_location_id=6 parent_frame_id=6}

"""
    lines = [f"%a{n} = f32[8] add(%p, %p), metadata={{stack_frame_id={n}}}" for n in range(7)]
    lines.append('%b = f32[8] add(%p, %p), metadata={source_file="/x/llada_jax/a/b.py" source_line=4}')
    text = (
        "HloModule m\n" + tables + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "".join(f"  {x}\n" for x in lines) + "}\n"
    )
    made = Module(text)
    found = [made.source(one).removeprefix("llada_jax/model/transformer.py:") for one in made.computations["main"]]
    assert found == ["", "", "200", "133", "133", "133", "133", "llada_jax/a/b.py:4"]
