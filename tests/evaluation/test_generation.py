"""Tests what generation_kwargs of tasks mean, and that impossible ones are refused in one line."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.evaluation.generation import DEFAULT_GEN_LENGTH, interpret
from llada_jax.sampling.text_completion import Options

ODD = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | st.lists(st.text(max_size=2))
KWARGS = st.dictionaries(
    st.sampled_from(["until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "num_beams", "top_p"]),
    ODD,
)


@settings(max_examples=100, deadline=None)
@given(KWARGS, st.none() | st.integers(-2, 300), st.none() | st.integers(1, 300))
def test_any_arguments(gen_kwargs, gen_length, max_length):
    try:
        found = interpret(gen_kwargs, Options(), gen_length, None, max_length)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found.options.gen_length >= 1 and 0 <= found.options.temperature < math.inf
    assert max_length is None or found.options.gen_length < max_length
    assert all(isinstance(stop, str) and stop for stop in found.until)
    assert not found.unused.keys() & {"until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens"}


def test_what_they_mean():
    asked = {"until": ["\n", "", None], "max_gen_toks": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    found = interpret(asked, Options(steps=3), None, None, 8)
    assert found.options == Options(steps=3, gen_length=7, temperature=0.5)
    assert (found.until, found.unused) == (["\n"], {"top_p": 0.9})
    assert interpret({}, Options(), None, None, None).options.gen_length == DEFAULT_GEN_LENGTH
    assert interpret({"max_gen_toks": 7}, Options(), 5, 0.1, None).options == Options(gen_length=5, temperature=0.1)


@pytest.mark.parametrize(
    ("gen_kwargs", "words"),
    [
        (
            {"max_gen_toks": 256},
            "gen_length=256 leaves no room for a prompt: .* have at most 256 tokens",
        ),
        ({"max_gen_toks": "many"}, "generation_kwargs=.*many"),
        ({"max_gen_toks": 0}, "leaves nothing to generate"),
        ({"max_gen_toks": -3}, "gen_length=-3: it must be at least 0"),
        ({"until": [5]}, r"until=\[5\] must be a text"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1.0"),
        ({"do_sample": True, "temperature": "hot"}, "generation_kwargs=.*hot"),
    ],
)
def test_impossible_ones(gen_kwargs, words):
    with pytest.raises(UserError, match=words):
        interpret(gen_kwargs, Options(), None, None, 256)
