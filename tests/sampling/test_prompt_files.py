"""Tests files of prompts and of completions: whatever a file holds is read rightly, or refused in one line."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.sampling.prompt_files import read_records, write_records

RECORD = b'{"prompt": "a [MASK]", "id": 3}\n'
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


def test_what_is_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + RECORD + b"\r\n\n" + '{"prompt": "\u2028\ufeff"}\r\n'.encode())
    records = [{"prompt": "a [MASK]", "id": 3}, {"prompt": "\u2028\ufeff"}]
    assert read_records(path) == records
    write_records(path, records)
    assert read_records(path) == records


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "\\ud800"}', ":3 contains half a character"),
        (b'{"prompt": "a", "\\udcff": 1}', ":3 contains half a character"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":3 is not JSON .*nested too deeply"),
        (b'{"prompt": "a", "x": NaN}', ":3 is not JSON"),
        (b'{"prompt": "a", "x": [-Infinity]}', ":3 is not JSON"),
        (b'{"prompt": "a", "x": 1e999}', ":3 is not JSON"),
        (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", ":3 is not JSON"),
        (b'{"prompt": "\xff"}', "line 3"),
        (b'\xef\xbb\xbf{"prompt": "a"}', ":3 is not JSON"),  # a byte order mark inside a file is content
        (b'{"prompt": null}', ':3 must be an object with a text "prompt"'),
        (b"[]", ':3 must be an object with a text "prompt"'),
    ],
)
def test_what_is_refused(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(RECORD + b"\n" + line + b"\n" + RECORD)
    with pytest.raises(UserError, match=words) as error:
        read_records(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_utf_16_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(RECORD.decode().encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16: save it as UTF-8"):
        read_records(path)


def test_what_no_encoding_allows_is_written_as_an_escape(tmp_path):
    write_records(tmp_path / "out", [{"prompt": "é \ud800"}, {"prompt": "é"}])
    assert (tmp_path / "out").read_bytes() == b'{"prompt": "\\u00e9 \\ud800"}\n' + '{"prompt": "é"}\n'.encode()


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
@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=4))
def test_very_many_files(tmp_path_factory, lines):
    check(tmp_path_factory.getbasetemp() / "any.jsonl", b"\n".join(lines))
