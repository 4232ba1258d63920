"""Tests that bad documents and conversations are left out, counted and listed, if the user wants that."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from llada_jax.config import UserError
from llada_jax.data.manifest import LeftOut, load_manifest
from llada_jax.data.prepare import prepare_chat as prepare_chat_module
from llada_jax.data.prepare.left_out import BadItem, Faults
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.prepare.summary import chat_summary, text_summary
from llada_jax.data.prepare.text import PIECE_CHARACTERS

from .conftest import split_documents, story
from .test_chat import talk
from .test_prepare import content

GOOD = [story(i) for i in range(60)]


def lines_of(texts):
    return [json.dumps({"text": text}).encode() for text in texts]


@pytest.fixture
def texts(tmp_path):
    """Returns three inputs with six bad documents of 66."""
    bad = [b"{", b'{"body": "x"}', b'{"text": null}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"nope"]
    lines = lines_of(GOOD[:40])
    for i, line in enumerate(bad):
        lines.insert(6 * i, line)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.table({"text": GOOD[40:59]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(GOOD[59])
    return [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt")]


def make(inputs, output, tokenizer, **options):
    settings = {"sequence_length": 64, "progress": False, "on_error": "skip", "validation_fraction": 0.1, "workers": 1}
    return prepare(inputs, output, tokenizer=tokenizer, **{**settings, **options})


def test_bad_documents_are_left_out_counted_and_listed(tmp_path, texts, tokenizer_folder):
    manifest = make(texts, tmp_path / "set", tokenizer_folder)
    where = texts[0]
    assert manifest.left_out == (
        LeftOut(
            'no text under "text"', 2,
            tuple(f'{where}, line {n}: there is no text under the key "text" (text_key chooses another key)'
                  for n in (7, 13)),
        ),
        LeftOut(
            "not JSON", 2,
            (f"{where}, line 1: not JSON: Expecting property name enclosed in double quotes at character 2",
             f"{where}, line 31: not JSON: Expecting value at character 1"),
        ),
        LeftOut("half a character", 1, (f"{where}, line 25: '\\ud800' is not a valid character",)),
        LeftOut("not UTF-8", 1, (f"{where}, line 19: not UTF-8 text: invalid start byte",)),
    )  # fmt: skip
    found = [split_documents(tmp_path / "set", manifest, split) for split in ("train", "validation")]
    assert sorted(found[0] + found[1]) == sorted(GOOD)
    assert load_manifest(tmp_path / "set") == manifest
    summary = text_summary("set", manifest, 1.0)
    assert 'left out, no text under "text": 2\n' in summary and f"  {where}, line 19: not UTF-8 text" in summary


def test_the_set_is_that_of_the_good_documents_for_any_number_of_workers(tmp_path, texts, tokenizer_folder):
    for workers in (1, 2):
        make(texts, tmp_path / str(workers), tokenizer_folder, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines_of(GOOD[:40])))
    make(texts, tmp_path / "skip", tokenizer_folder)
    make(texts, tmp_path / "stop", tokenizer_folder, on_error="stop")
    assert content(tmp_path / "skip") == content(tmp_path / "stop"), "without bad documents it makes no difference"
    shards = [{k: v for k, v in content(tmp_path / n).items() if k != "manifest.json"} for n in ("1", "stop")]
    assert shards[0] == shards[1]


def test_strict_is_the_default_and_names_the_way_out(tmp_path, texts, tokenizer_folder):
    with pytest.raises(UserError, match=r"a.jsonl, line 1: not JSON: .*--on_error=skip leaves it out"):
        prepare(texts, tmp_path / "set", tokenizer=tokenizer_folder, progress=False)
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match="on_error='ignore': choose one of stop, skip"):
        make(texts, tmp_path / "set", tokenizer_folder, on_error="ignore")


@pytest.mark.parametrize("good, fails", [(9, False), (8, True), (0, True)])
def test_more_than_a_tenth_is_too_much(tmp_path, tokenizer_folder, good, fails):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines_of(GOOD[:good]), b'{"body": "x"}']))
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "set", tokenizer_folder)
    if not fails:
        assert make(*arguments).left_out[0].count == 1
        return
    with pytest.raises(UserError, match=f"1 of {good + 1} documents are bad, which is more than the 10%") as error:
        make(*arguments)
    assert f"a.jsonl, line {good + 1}: there is no text" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "set").exists()


def test_a_bad_text_file_leaves_no_piece(tmp_path, tokenizer_folder):
    """Pieces of a long file are read before its end is known; none of them may be in the set if the end is bad."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(GOOD[i])
    (tmp_path / "long.txt").write_bytes(b"a line of text\n" * 6000 + b"\xff")
    (tmp_path / "null.parquet").touch()
    pq.write_table(pa.table({"text": [*GOOD[10:20], None]}), tmp_path / "null.parquet")
    manifest = make([str(tmp_path / "*.txt"), str(tmp_path / "null.parquet")], tmp_path / "set", tokenizer_folder)
    found = [split_documents(tmp_path / "set", manifest, split) for split in ("train", "validation")]
    assert sorted(found[0] + found[1]) == sorted(GOOD[:20])
    assert [each.examples for each in manifest.left_out] == [
        (f'{tmp_path}/null.parquet, row 11: there is no text in the column "text"',),
        (f"{tmp_path}/long.txt is not UTF-8 text: invalid start byte in line 6001",),
    ]


def test_conversations(tmp_path, tokenizer_folder, monkeypatch):
    """Bad lines, and conversations that the template refuses, are left out, with any number of workers."""
    monkeypatch.setattr(prepare_chat_module, "_BATCH", 8)
    lines = [json.dumps(talk(1 + i % 3, i)) for i in range(60)]
    tools = json.dumps({**talk(1, 1), "tools": [{"name": "x"}]})
    bad = ["{", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), tools, tools, tools, tools]
    for i, line in enumerate(bad):
        lines.insert(10 * i, line)
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines))
    options = {"tokenizer": tokenizer_folder, "sequence_length": 256, "progress": False}
    sets = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        manifest = prepare_chat([str(source)], folder, workers=workers, on_error="skip", **options)
        sets.append(content(folder))
    assert sets[0] == sets[1]
    first, *others = manifest.left_out
    assert (first.kind, first.count) == ('"tools" is passed over', 4)
    reason = 'the chat template passes over "tools": use a template that reads it, or remove it '
    reason += "if the messages say the same"
    assert first.examples == tuple(f"{source}, line {n}: {reason}" for n in (21, 31, 41))
    assert [(each.kind, each.count) for each in others] == [("not JSON", 1), ("preference data", 1)]
    assert manifest.train.documents + manifest.validation.documents == 60
    assert 'left out, "tools" is passed over: 4\n' in chat_summary("set", manifest, "x", 1.0)
    with pytest.raises(UserError, match="a.jsonl, line 1: not JSON"):
        prepare_chat([str(source)], tmp_path / "set", workers=1, **options)
    source.write_text("\n".join(bad))
    with pytest.raises(UserError, match="2 of 6 conversations are bad, .*: not JSON, for example"):
        prepare_chat([str(source)], tmp_path / "set", workers=1, on_error="skip", **options)
    assert not (tmp_path / "set").exists()


def test_the_order_of_faults_does_not_depend_on_when_they_are_found():
    errors = [BadItem(f"line {i}", "abc"[i % 3]) for i in range(30)]
    orders = [list(range(30)), [*range(29, -1, -1)], [*range(0, 30, 2), *range(1, 30, 2)]]
    results = []
    for order in orders:
        faults = Faults("skip")
        for i in order:
            faults.add(errors[i], i)
        results.append(faults.checked(1000, "documents"))
    assert results[0] == results[1] == results[2]
    assert [(each.kind, each.count, each.examples[0]) for each in results[0]] == [
        ("a", 10, "line 0"), ("b", 10, "line 1"), ("c", 10, "line 2"),
    ]  # fmt: skip


def test_a_text_that_the_tokenizer_turns_into_nothing_is_no_document(tmp_path, tokenizer_folder, monkeypatch):
    from llada_jax.text.tokenizer import Tokenizer

    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, *a, **k: [] if text == "nothing" else encode(self, text, *a, **k)
    )
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines_of([GOOD[0], "nothing", GOOD[1], "nothing"])))
    manifest = make([str(tmp_path / "a.jsonl")], tmp_path / "set", tokenizer_folder, validation_fraction=0)
    assert split_documents(tmp_path / "set", manifest, "train") == GOOD[:2]
    assert manifest.train.documents == manifest.sources[0].documents == 2
    assert manifest.train.tokens == manifest.sources[0].tokens


@pytest.fixture
def strict_tokenizer(tmp_path):
    """Returns a WordPiece model without a token for unknown words, which refuses every text that has one."""
    split = tokenizers.pre_tokenizers.Whitespace()
    words = sorted({word for text in GOOD for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_that_the_tokenizer_refuses(tmp_path, strict_tokenizer, workers):
    lines = lines_of(GOOD[:40])
    lines.insert(7, b'{"text": "xyzzy"}')
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_text("quux")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    manifest = make(inputs, tmp_path / "set", strict_tokenizer, workers=workers)
    (left,) = manifest.left_out
    assert left.kind == "refused by the tokenizer" and left.count == 2
    assert left.examples[0].startswith(f"{inputs[0]}, line 8: the tokenizer cannot encode 'xyzzy': ")
    assert left.examples[1].startswith(f"{inputs[1]}: the tokenizer cannot encode 'quux': ")
    assert sum(source.documents for source in manifest.sources) == 40
    with pytest.raises(UserError, match=r"a.jsonl, line 8: the tokenizer cannot .*--on_error=skip leaves it out"):
        make(inputs, tmp_path / "strict", strict_tokenizer, workers=workers, on_error="stop")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[7:12]))
    with pytest.raises(UserError, match="2 of 6 documents are bad"):
        make(inputs, tmp_path / "many", strict_tokenizer, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_piece_of_a_long_file(tmp_path, strict_tokenizer, workers):
    """Only the piece is left out, and the text after it does not continue the text before it."""
    line = " ".join(GOOD[0].split()) + "\n"
    lines = [line] * (330_000 // len(line))
    lines[len(lines) // 2] = "xyzzy\n"
    (tmp_path / "a.txt").write_text("".join(lines))
    inputs = [str(tmp_path / "a.txt")]
    manifest = make(inputs, tmp_path / "set", strict_tokenizer, workers=workers, validation_fraction=0)
    (left,) = manifest.left_out
    assert (left.kind, left.count) == ("refused by the tokenizer", 1)
    named = int(re.match(r"(.*), from line (\d+): the tokenizer cannot encode ", left.examples[0])[2])
    here = "".join(lines[named - 1 :])  # the piece begins at this line or within it
    assert 0 <= here.index("xyzzy") < PIECE_CHARACTERS + len(line)
    before, after = split_documents(tmp_path / "set", manifest, "train")
    assert 120_000 < len(before) < 170_000 and 120_000 < len(after) < 170_000
    assert manifest.sources[0].documents == 2 and manifest.sources[0].tokens == manifest.train.tokens


def test_a_column_that_is_all_null(tmp_path, tokenizer_folder):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": GOOD}), tmp_path / "b.parquet")
    inputs = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    (left,) = make(inputs, tmp_path / "set", tokenizer_folder).left_out
    assert (left.kind, left.count) == ('no text under "text"', 3)
    with pytest.raises(UserError, match=r'a.parquet, row 1: there is no text in the column "text"'):
        make(inputs, tmp_path / "strict", tokenizer_folder, on_error="stop")
