import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.config import UserError
from llada_jax.data.prepare import text as text_module
from llada_jax.data.prepare.text import PIECE_CHARACTERS, WHOLE_CHARACTERS, Corpus

TEXTS = ["one", "two\r\nlines\t", "caf\u00e9 \U0001f600", "  spaces  "]


def read(*inputs, **options) -> list[str]:
    return [piece.text for piece in Corpus([str(i) for i in inputs], **options)]


def one_line_error(*inputs, **options) -> str:
    with pytest.raises(UserError) as error:
        read(*inputs, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def jsonl(texts, key="text") -> bytes:
    return b"".join(json.dumps({key: t}, ensure_ascii=False).encode() + b"\n" for t in texts)


@pytest.mark.parametrize(
    "name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)]
)
def test_jsonl(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS) + b"\n" + jsonl(["", "last"])))
    assert read(tmp_path / name) == [*TEXTS, "last"]  # an empty line and an empty document are skipped


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)])
def test_txt_is_one_document(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + "".join(TEXTS).encode()))  # begins with a byte order mark
    pieces = list(Corpus([str(tmp_path / name)]))
    assert [(p.text, p.last) for p in pieces] == [("".join(TEXTS), True)]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"body": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", text_key="body") == TEXTS
    assert "has no column" in one_line_error(tmp_path / "a.parquet")
    assert "not text" in one_line_error(tmp_path / "a.parquet", text_key="n")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    assert "row 2" in one_line_error(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    assert "c.parquet" in one_line_error(tmp_path / "c.parquet")


@pytest.mark.parametrize("unit", ["a line of text\n", "a line of text\r\n", "word ", "\U0001f600"])
def test_long_txt_comes_in_pieces(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(text_module, "_READ_CHARACTERS", 50_000)
    content = unit * (300_000 // len(unit))
    (tmp_path / "a.txt").write_bytes(content.encode())
    pieces = list(Corpus([str(tmp_path / "a.txt")]))
    assert "".join(p.text for p in pieces) == content
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(p.text) <= PIECE_CHARACTERS for p in pieces)
    assert len(pieces) <= len(content) // (PIECE_CHARACTERS - 100) + 1
    if "\n" in unit:
        assert all(p.text.endswith("\n") for p in pieces)
    if " " in unit and "\n" not in unit:
        assert all(p.text.startswith(" ") for p in pieces[1:])  # words are not cut


def test_txt_just_short_enough_is_one_piece(tmp_path):
    (tmp_path / "a.txt").write_text("x" * WHOLE_CHARACTERS)
    (tmp_path / "b.txt").write_text("x" * (WHOLE_CHARACTERS + 1))
    assert len(read(tmp_path / "a.txt")) == 1
    assert len(read(tmp_path / "b.txt")) == 5


def test_order_sources_and_position(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "z.jsonl").write_bytes(jsonl(["z"]))
    corpus = Corpus([str(tmp_path / "z.jsonl"), str(tmp_path / "*.txt")])
    expected = [("z", 0), ("text a", 1), ("text b", 1), ("text c", 1)]
    for _ in range(2):  # a corpus can be read again
        assert [(p.text, p.source) for p in corpus] == expected
        assert corpus.position == corpus.total_bytes == 18 + 14
    assert [corpus.file_count(i) for i in (0, 1)] == [1, 3]


def test_a_name_that_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("here")
    assert read(tmp_path / "a[1].txt") == ["here"]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{broken", "not JSON"),
        (b"[1, 2]", 'key "text"'),
        (b'{"body": "x"}', 'key "text"'),
        (b'{"text": null}', 'key "text"'),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not a valid character"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_malformed_line(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]) + line + b"\n")
    message = one_line_error(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2" in message
    assert words in message


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("xz", lzma.compress)])
def test_damaged_compression(tmp_path, suffix, pack):
    whole = pack(jsonl(str(i) * 50 for i in range(1000)))
    for i, content in enumerate((whole[:-30], whole[: len(whole) // 2], b"no such format")):
        (tmp_path / f"{i}.jsonl.{suffix}").write_bytes(content)
        message = one_line_error(tmp_path / f"{i}.jsonl.{suffix}")
        assert f"{i}.jsonl.{suffix}" in message
        assert "damaged or cut short" in message


def test_not_utf8_txt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    assert "a.txt is not UTF-8" in one_line_error(tmp_path / "a.txt")


def test_inputs_that_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    assert "no such file" in one_line_error(tmp_path / "absent.txt")
    assert "no such file" in one_line_error(tmp_path / "*.jsonl")
    assert "unknown kind" in one_line_error(tmp_path / "a.csv")
    assert "is a folder" in one_line_error(tmp_path)
    assert "no input" in one_line_error()
    assert "already given" in one_line_error(tmp_path / "a.txt", tmp_path / "*.txt")
