"""Files of prompts as people bring them: read rightly, or refused in one line that names the line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.sampling.prompt_files import read_records, write_records

RECORD = b'{"prompt": "a [MASK]", "id": 3}\n'


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


def damaged(path, values, start, place, byte):
    content = start + b"".join(json.dumps({"prompt": value, "x": value}).encode() + b"\n" for value in values)
    place %= len(content) + 1
    path.write_bytes(content[:place] + byte + content[place + len(byte) :])
    try:
        records = read_records(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    write_records(path, records)
    assert read_records(path) == records


@pytest.mark.parametrize("examples", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_bytes(tmp_path, examples):
    values = st.lists(st.text(st.characters(exclude_categories=()), max_size=5) | st.floats() | st.none(), max_size=3)
    starts = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])
    limits = settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 100,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
    drawn = st.tuples(values, starts, st.integers(0, 300), st.binary(max_size=3))
    limits(given(drawn)(lambda each: damaged(tmp_path / "p.jsonl", *each)))()
