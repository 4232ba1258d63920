"""Says which part of the model, and which pass over it, an instruction of a compiled train step belongs to.

The name scopes of the model's code (`jax.named_scope`) stay in the instructions' names, and so do JAX's
transformations: "jvp" marks the forward pass, "transpose" the backward pass, "rematted_computation" what the backward
pass computes again.
"""

import re
from collections import Counter

from llada_jax.planning.hlo import Instruction, Module

# The name scopes and the parts that they stand for.
SCOPES = {
    "embedding": "embedding",
    "attention_projections": "attention projections",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "norm": "norms",
    "head_and_loss": "head and loss",
    "optimizer": "optimizer",
}
COPIES, COMMUNICATION, OTHER = "copies", "communication", "other"
PARTS = (
    "embedding", "attention projections", "attention", "feed-forward", "norms", "head and loss", "optimizer",
    COPIES, COMMUNICATION, OTHER,
)  # fmt: skip
FORWARD, RECOMPUTED, BACKWARD, UPDATE = PASSES = ("forward", "recomputed", "backward", "update")
_BACKWARD_SCOPE = "gradients"  # The loss computes its gradients in its forward pass, in this scope.

_NAMES = re.compile(rf"(?<!\w)({'|'.join(SCOPES)})(?!\w)")
PRODUCTS = ("dot", "convolution")
# Instructions that move or convert numbers and compute none.
_MOVES = frozenset(
    ("copy", "transpose", "bitcast", "bitcast-convert", "reshape", "slice", "dynamic-slice", "dynamic-update-slice")
    + ("convert", "broadcast", "concatenate", "pad", "iota", "parameter", "constant", "get-tuple-element", "tuple")
    + ("fusion", "copy-start", "copy-done")
)


def part_of(module: Module, instruction: Instruction) -> str:
    """Returns a name in PARTS. What a fusion is follows from what is fused: a matrix product decides, if there is one.

    A fusion that only moves or converts numbers belongs to the copies, whatever part of the model needs it.
    """
    inner = [one for _, one in module.fused(instruction)]
    for one in inner:
        if one.opcode in PRODUCTS:
            return _scope(one.op_name) or _scope(instruction.op_name) or OTHER
    if all(one.opcode in _MOVES or _is_scalar(one) for one in [instruction, *inner]):
        return COPIES
    if scope := _scope(instruction.op_name):
        return scope
    scopes = Counter(scope for one in inner if (scope := _scope(one.op_name)))
    return scopes.most_common(1)[0][0] if scopes else OTHER


def pass_of(module: Module, instruction: Instruction) -> str | None:
    """Returns a name in PASSES, or None if neither the instruction nor what is fused into it says which pass it is."""
    inner = [one for _, one in module.fused(instruction)]
    names = [one.op_name for one in inner if one.opcode in PRODUCTS] + [instruction.op_name]
    return next((found for name in names + [one.op_name for one in inner] if (found := _pass(name))), None)


def _pass(op_name: str) -> str | None:
    if re.search(r"(?<!\w)optimizer(?!\w)", op_name):
        return UPDATE
    if "rematted_computation" in op_name:
        return RECOMPUTED
    if "transpose(" in op_name or re.search(rf"(?<!\w){_BACKWARD_SCOPE}(?!\w)", op_name):
        return BACKWARD
    return FORWARD if "jvp(" in op_name else None


def _scope(op_name: str) -> str | None:
    """Returns the part that the innermost known scope of a name stands for."""
    found = _NAMES.findall(op_name)
    return SCOPES[found[-1]] if found else None


def _is_scalar(instruction: Instruction) -> bool:
    return all(not shape.dims for shape in instruction.results)
