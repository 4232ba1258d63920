"""Tests that a file of results holds only what JSON can represent, and how many documents a limit means."""

import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.evaluation import run
from llada_jax.evaluation.results import as_json

KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)) | st.none()
NUMBERS = st.integers() | st.floats() | st.floats().map(np.float64) | st.floats(width=32).map(np.float32)
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | st.text(st.characters(), max_size=4) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)  # fmt: skip


def no_constant(name: str) -> None:
    raise AssertionError(f"JSON has no {name}")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_results(results):
    text, broken = as_json(results)
    json.loads(text.encode(), parse_constant=no_constant)
    assert text.endswith("}\n") and all(isinstance(place, str) for place in broken)


def test_what_becomes_of_values():
    results = {"results": {"a": {"acc,none": math.nan, "n": np.int64(3)}}, "samples": [(1.5, -math.inf), {2: len}]}
    text, broken = as_json(results)
    assert broken == ["results/a/acc,none", "samples/0/1"]
    assert json.loads(text) == {
        "results": {"a": {"acc,none": None, "n": 3}}, "samples": [[1.5, None], {"2": "<built-in function len>"}]
    }  # fmt: skip
    assert as_json({"text": "é"})[0] == '{\n  "text": "é"\n}\n'
    assert json.loads(as_json({"text": "\ud800"})[0]) == {"text": "\ud800"}


def test_a_limit_is_a_number_or_a_share():
    assert [run._count(limit, 9) for limit in (None, 4.0, 20.0, 0.5, 0.01)] == [9, 4, 20, 5, 1]
