"""Tests files of prompts and of completions: whatever a file holds is read rightly, or refused in one line."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.sampling.prompt_files import read_records, write_records

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LINES = st.one_of(
    st.binary(max_size=20),
    st.builds(lambda record: json.dumps(record).encode(), VALUES),
    st.builds(lambda text, more: json.dumps({**more, "prompt": text}).encode(), st.text(st.characters(), max_size=8),
              st.dictionaries(st.text(max_size=3), VALUES, max_size=2)),
    st.sampled_from([b"", b"{}", b'{"prompt": 1e999}', b'{"prompt": "\\ud800"}', b"[" * 5000, b'{"prompt": "a"}\r',
                     b"\xef\xbb\xbf" + b'{"prompt": "a"}']),
)  # fmt: skip


def no_constant(name: str) -> None:
    raise AssertionError(f"JSON has no {name}")


def check(path, content: bytes) -> None:
    """Checks that the file is refused in one line, or that its records can be written as JSON and read again."""
    path.write_bytes(content)
    try:
        records = read_records(path)
    except UserError as error:
        assert "\n" not in str(error).strip() and str(path) in str(error)
        return
    written = path.with_name("out.jsonl")
    write_records(written, [record | {"completion": "x"} for record in records])
    lines = written.read_text(encoding="utf-8").split("\n")[:-1]
    again = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert again == [record | {"completion": "x"} for record in records]
    assert all(isinstance(record["prompt"], str) for record in records)


@settings(max_examples=60, deadline=None)
@example([b"[" * 100_000])
@given(st.lists(LINES, max_size=4))
def test_any_file(tmp_path_factory, lines):
    check(tmp_path_factory.getbasetemp() / "any.jsonl", b"\n".join(lines))


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.lists(LINES, max_size=4))
def test_very_many_files(tmp_path_factory, lines):
    check(tmp_path_factory.getbasetemp() / "any.jsonl", b"\n".join(lines))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(tmp_path, number):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "score": ' + number + "}\n")
    with pytest.raises(UserError, match=r"p.jsonl:2 is not JSON"):
        read_records(path)


def test_what_no_encoding_allows_is_written_as_an_escape(tmp_path):
    write_records(tmp_path / "out", [{"prompt": "é \ud800"}, {"prompt": "é"}])
    assert (tmp_path / "out").read_bytes() == b'{"prompt": "\\u00e9 \\ud800"}\n' + '{"prompt": "é"}\n'.encode()
