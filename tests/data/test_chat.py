"""Tests prepared conversations and their batches: complete, padded as in the paper, and the same on every host."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from llada_jax.config import UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.pairs import decode_pair, encode_pair, load_index
from llada_jax.data.prepare import answers
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read import chat
from llada_jax.data.read.chat import ChatData, held_out_answers, width_of, widths
from llada_jax.data.read.pipeline import TrainingData, validation_rows
from llada_jax.text.tokenizer import load_tokenizer

from .conftest import WORDS, story, write_jsonl
from .test_conversations import write

T, VOCAB, BATCH = 256, 512, 4


def talk(turns: int, number: int, words: int = 4) -> dict:
    messages = [{"role": "system", "content": f"Talk {number}."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{WORDS[(number + turn) % 13]} " * words + f"{number}.{turn}?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.{turn} " + "fox " * (number % 7)})
    return {"messages": messages}


def make_set(folder: Path, tokenizer: str, lines: list, **options) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"sequence_length": T, "workers": 1, "shard_rows": 16, "progress": False, "validation_fraction": 0.2}
    source = write(folder / "chat.jsonl", lines)
    prepare_chat([source], folder / "set", tokenizer=tokenizer, **{**settings, **options})
    return str(folder / "set")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder) -> str:
    lines = [talk(1 + i % 3, i) for i in range(40)]
    return make_set(tmp_path_factory.mktemp("chat"), tokenizer_folder, lines)


def open_chat(paths, weights=(), **options) -> ChatData:
    defaults = {"seed": 3, "batch_size": BATCH, "sequence_length": T, "vocab_size": VOCAB}
    return ChatData(paths, weights, **{**defaults, **options})


def pairs_of(path: str, split: str = "train") -> list:
    manifest = load_manifest(path)
    records = []
    for shard in manifest.split(split).shards:
        records += ArrayRecordReader(f"{path}/{shard.name}").read_all()
    return [decode_pair(record, manifest.dtype, manifest.sequence_length) for record in records]


def test_rows_are_what_the_template_writes(prepared, tokenizer_folder):
    """A row is the prompt that the model is asked with, with all earlier turns, then the answer, its end and one EOS.

    Every answer is the answer of exactly one row.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = {}
    for i in range(40):
        messages = talk(1 + i % 3, i)["messages"]
        for k in range(2, len(messages), 2):
            prompt = tokenizer.encode_chat(messages[:k])
            expected[tuple(prompt)] = messages[k]["content"].strip()
    manifest = load_manifest(prepared)
    found = [pair for split in ("train", "validation") for pair in pairs_of(prepared, split)]
    assert len(found) == len(expected) == manifest.train.rows + manifest.validation.rows
    for pair in found:
        text = expected.pop(tuple(pair.tokens[: pair.prompt].tolist()))
        assert pair.tokens[-2:].tolist() == [tokenizer.eot_id, tokenizer.eos_id]
        assert tokenizer.decode(pair.tokens[pair.prompt : -2], continuation=True) == text
        assert pair.bytes == len(text.encode())
    assert manifest.train.documents + manifest.validation.documents == 40
    assert manifest.train.tokens == sum(pair.length for pair in pairs_of(prepared))
    assert manifest.chat.dropped == manifest.chat.cut == manifest.chat.empty == 0
    assert manifest.sources[0].documents == 40


def test_records_come_back():
    tokens = np.arange(5, dtype=np.int32)
    for dtype in ("uint16", "uint32"):
        pair = decode_pair(encode_pair(chat.Pair(tokens, 2, 7), dtype), dtype, 5)
        assert (pair.tokens.tolist(), pair.prompt, pair.bytes) == ([0, 1, 2, 3, 4], 2, 7)
    record = encode_pair(chat.Pair(tokens, 2, 7), "uint16")
    for bad, length in ((record[:-1], 5), (record, 4), (b"", 5), (encode_pair(chat.Pair(tokens, 5, 7), "uint16"), 5)):
        with pytest.raises(ValueError, match="record"):
            decode_pair(bad, "uint16", length)


def test_the_number_of_workers_does_not_matter(prepared, tmp_path, tokenizer_folder):
    again = tmp_path / "again"
    source = str(Path(prepared).parent / "chat.jsonl")
    options = {"sequence_length": T, "shard_rows": 16, "progress": False, "validation_fraction": 0.2}
    prepare_chat([source], again, tokenizer=tokenizer_folder, workers=2, **options)
    names = sorted(p.name for p in Path(prepared).iterdir() if p.is_file())
    assert names == sorted(p.name for p in again.iterdir() if p.is_file())
    assert all((again / name).read_bytes() == (Path(prepared) / name).read_bytes() for name in names)


def test_groups_are_held_out_whole(tmp_path, tokenizer_folder):
    lines = [{"prompt": f"q{i}", "response": f"a{i} story{i % 10}", "story": i % 10} for i in range(60)]
    path = make_set(tmp_path, tokenizer_folder, lines, group_key="story", validation_fraction=0.3)
    tokenizer = load_tokenizer(tokenizer_folder)
    sides = [
        {re.search("story([0-9])", tokenizer.decode(p.tokens))[1] for p in pairs_of(path, s)}
        for s in ("train", "validation")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_too_long_ones_are_dropped_or_cut_and_counted(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    many_turns, system = talk(6, 1, words=12), "Talk 1."
    long_answer = {"prompt": "Tell.", "response": "river " * 400}
    long_prompt = {"prompt": "river " * 400, "response": "That."}
    lines = [{"prompt": "a", "response": "b"}, many_turns, long_answer, long_prompt, {"prompt": "c", "response": " \n"}]
    lines.append({"prompt": " ", "response": "d"})
    lengths = [len(sum(tokenizer.encode_answer(many_turns["messages"][: k + 1]), [])) + 1 for k in range(2, 13, 2)]
    over = sum(length > T for length in lengths)
    assert 0 < over < 6

    dropped = make_set(tmp_path / "drop", tokenizer_folder, lines, validation_fraction=0.0)
    chat_ = load_manifest(dropped).chat
    assert (chat_.too_long, chat_.dropped, chat_.cut, chat_.empty) == ("drop", over + 2, 0, 2)
    assert len(pairs_of(dropped)) == 1 + 6 - over

    cut = make_set(tmp_path / "cut", tokenizer_folder, lines, too_long="cut", validation_fraction=0.0)
    chat_ = load_manifest(cut).chat
    assert (chat_.dropped, chat_.cut, chat_.empty) == (1, over + 1, 2)
    found = pairs_of(cut)
    assert len(found) == 1 + 6 + 1 and max(pair.length for pair in found) <= T
    for pair in found[1 + 6 - over : 7]:  # the oldest turns are removed; the system message and the last turn are kept
        text = tokenizer.decode(pair.tokens[: pair.prompt])
        assert system in text and "1.0?" not in text and text.count("user") < 6
        assert pair.tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(found[6].tokens[: found[6].prompt]).count("1.5?") == 1
    answer = found[7]
    assert answer.length == T and tokenizer.eos_id not in answer.tokens and answer.prompt < 40


def test_long_conversations_are_cut_in_no_time_to_speak_of(tmp_path, tokenizer_folder, monkeypatch):
    """The search for the oldest turn starts where it ended for the answer before: at most two renderings per answer."""
    asked = []
    encode = answers._pair
    monkeypatch.setattr(answers, "_pair", lambda *arguments: asked.append(1) or encode(*arguments))
    path = make_set(tmp_path, tokenizer_folder, [talk(60, 1)], too_long="cut", validation_fraction=0.0)
    assert len(pairs_of(path)) == 60 and len(asked) <= 2 * 60
    tokenizer = load_tokenizer(tokenizer_folder)
    for k, pair in enumerate(pairs_of(path)):
        turns = tokenizer.decode(pair.tokens[: pair.prompt]).count("user")
        if turns <= k:  # check that one more turn would not fit
            messages = talk(60, 1)["messages"][: 3 + 2 * k]
            more = [messages[0], *messages[-2 * (turns + 1) :]]
            assert len(sum(tokenizer.encode_answer(more), [])) + 1 > T


def test_what_templates_write_after_the_end_is_not_learned(tmp_path, tokenizer_folder):
    for name, end in (("line", "<|eot_id|>\n"), ("eos", "{{ eos_token }}\n")):
        shutil.copytree(tokenizer_folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}" + end + "{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        path = make_set(tmp_path / f"{name}_set", str(tmp_path / name), [talk(1, 1)], validation_fraction=0.0)
        tokenizer, (pair,) = load_tokenizer(tmp_path / name), pairs_of(path)
        answer = pair.tokens[pair.prompt :].tolist()
        assert answer[-1] == tokenizer.eos_id and answer.count(tokenizer.eos_id) == 1
        text = tokenizer.decode(answer, skip_special=True, continuation=True)
        assert not text.endswith("\n") and text.startswith("Answer 1.0") and pair.bytes == len(text.encode())


def test_widths_are_few_and_divisible():
    assert widths(4096) == [1024, 2048, 3072, 4096]
    assert widths(256) == [128, 256] and widths(128) == [128] and widths(32) == [8, 16, 24, 32]
    assert widths(640) == [256, 512, 640] and widths(10) == [3, 6, 9, 10] and widths(1) == [1]
    for length in range(1, 200):
        assert len(widths(length)) <= 4 and widths(length)[-1] == length
        assert all(width_of(n, length) >= n for n in range(1, length + 1))


def test_answers_are_padded_with_eos_to_the_longest_of_the_global_batch(prepared):
    data = open_chat([prepared])
    found = {tuple(pair.tokens.tolist()): pair for pair in pairs_of(prepared)}
    eos, widths_seen = data.eos_id, set()
    for step in range(30):
        batch = data.batch(step, range(BATCH))
        tokens, length, prompt = batch["tokens"], batch["length"], batch["prompt"]
        rows = []
        for row, p in zip(tokens, prompt, strict=True):
            ends = np.flatnonzero(row == eos)
            rows.append(found[tuple(row[: ends[0] + 1].tolist())])  # each row is a complete record
            assert rows[-1].prompt == p and (row[ends[0] :] == eos).all()
        longest = max(pair.length for pair in rows)
        assert (length == longest).all() and tokens.shape[1] == width_of(longest, T)
        assert tokens.dtype == length.dtype == prompt.dtype == np.int32
        widths_seen.add(tokens.shape[1])
    assert len(widths_seen) > 1


def test_a_host_reads_its_own_rows_and_knows_the_batch(prepared, monkeypatch):
    """Any part of a step's rows has the width and the length of the whole batch; only the rows of the part are read."""
    data = open_chat([prepared])
    read = []
    rows_type = type(data._sets[0])
    get = rows_type.read
    monkeypatch.setattr(rows_type, "read", lambda self, indices: read.extend(indices) or get(self, indices))
    for step in range(8):
        whole = data.batch(step, range(BATCH))
        read.clear()
        part = data.batch(step, [1, 3])
        assert len(read) == 2
        for name, x in part.items():
            assert (x == whole[name][[1, 3]]).all()


def test_every_conversation_once_per_epoch_and_its_answers_in_turn(prepared):
    data = open_chat([prepared])
    starts, _ = load_index(prepared, load_manifest(prepared), "train")
    conversations, most = len(starts) - 1, int(np.diff(starts).max())
    assert conversations == load_manifest(prepared).train.documents
    assert data.epochs(3 * conversations) == {prepared: (conversations, 3.0)}
    twice = open_chat([prepared], copies=2)
    assert twice.epochs(3 * conversations) == {prepared: (conversations, 1.5)}
    for row in range(BATCH):
        np.testing.assert_array_equal(
            *(d.batch(s, [r])["prompt"] for d, s, r in ((twice, 1, row), (data, 0, (BATCH + row) // 2)))
        )
    drawn = [data._record(n)[1] for n in range(6 * conversations)]
    epochs = np.array(drawn).reshape(6, conversations)
    owner = np.searchsorted(starts, epochs, side="right") - 1
    assert all(sorted(epoch) == list(range(conversations)) for epoch in owner.tolist())
    assert (owner[0] != owner[1]).any()
    assert most == 3
    for conversation in range(conversations):
        turns = epochs[owner == conversation]
        count = starts[conversation + 1] - starts[conversation]
        # Six epochs take each answer of a conversation equally often, whether it has one, two or three answers.
        assert sorted(turns.tolist()) == sorted(
            list(range(starts[conversation], starts[conversation + 1])) * (6 // count)
        )
    first = [
        data._record(n)[1] - starts[np.searchsorted(starts, data._record(n)[1], side="right") - 1]
        for n in range(conversations)
    ]
    assert len(set(first)) > 1  # not every conversation begins with its first answer


def test_rows_do_not_depend_on_how_they_are_asked_for(prepared):
    one, other = open_chat([prepared]), open_chat([prepared], seed=4)
    later = dict(
        zip(
            range(5, 8),
            (batch for _, batch in zip(range(3), (b for _, b in one.iterate(5, range(BATCH))), strict=False)),
            strict=True,
        )
    )
    for step, batch in later.items():
        assert all((batch[name] == x).all() for name, x in one.batch(step, range(BATCH)).items())
    assert any(one._record(n) != other._record(n) for n in range(20))


def test_sets_are_mixed_by_weight(prepared, tmp_path, tokenizer_folder):
    second = make_set(tmp_path, tokenizer_folder, [talk(1, i) for i in range(100, 120)], validation_fraction=0.1)
    data = open_chat([prepared, second], (3, 1))
    which = [data._record(n)[0] for n in range(400)]
    assert which.count(1) == 100
    held_out = held_out_answers([prepared, second], 6, T, VOCAB)
    assert len(held_out.tokens_NT) == 6


def test_held_out_answers(prepared, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = held_out_answers([prepared], 100, T, VOCAB)
    manifest = load_manifest(prepared)
    assert len(rows.tokens_NT) == manifest.validation.documents
    starts, lengths = load_index(prepared, manifest, "validation")
    # The rows are the last answer of each conversation, in an order that differs from that of the file.
    pairs = [pairs_of(prepared, "validation")[i] for i in starts[1:] - 1]
    by_tokens = {tuple(pair.tokens.tolist()): pair for pair in pairs}
    found = [by_tokens.pop(tuple(row[:n].tolist())) for row, n in zip(rows.tokens_NT, rows.length_N, strict=True)]
    assert not by_tokens and [pair.length for pair in found] != [pair.length for pair in pairs]
    for tokens_T, length, prompt, size, pair in zip(*rows, found, strict=True):
        assert tokens_T[:length].tolist() == pair.tokens.tolist() and (tokens_T[length:] == tokenizer.eos_id).all()
        assert (length, prompt, size) == (pair.length, pair.prompt, pair.bytes)
    assert rows.tokens_NT.shape[1] == width_of(max(pair.length for pair in pairs), T)
    some = held_out_answers([prepared], 3, T, VOCAB)
    assert (some.length_N == rows.length_N[:3]).all()


def test_text_and_conversations_are_not_taken_for_each_other(prepared, tmp_path, tokenizer_folder):
    text = tmp_path / "text"
    prepare([write_jsonl(tmp_path / "t.jsonl", [story(i) for i in range(20)])], text, tokenizer=tokenizer_folder,
            sequence_length=T, workers=1, progress=False)  # fmt: skip
    with pytest.raises(UserError, match="holds text, .*objective trains on conversations.* --chat$"):
        open_chat([str(text)])
    with pytest.raises(UserError, match="holds conversations, .*objective trains on text.*without --chat$"):
        TrainingData([prepared], seed=0, batch_size=4, sequence_length=T, random_length_every=0, vocab_size=VOCAB)
    with pytest.raises(UserError, match="holds conversations"):
        validation_rows([prepared], 2, T, VOCAB)
    assert "chat" not in json.loads((text / "manifest.json").read_text())


def test_sets_that_are_not_whole(prepared, tmp_path):
    def copy(name):
        shutil.copytree(prepared, tmp_path / name)
        return str(tmp_path / name), tmp_path / name / "train.index.npy"

    path, index = copy("missing")
    index.unlink()
    with pytest.raises(UserError, match="train.index.npy is missing"):
        open_chat([path])
    path, index = copy("torn")
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(UserError, match="train.index.npy is damaged"):
        open_chat([path])
    path, index = copy("other")
    with index.open("wb") as file:
        np.save(file, np.zeros((3, 2), "<u4"))
    with pytest.raises(UserError, match="train.index.npy is damaged, or belongs to another set"):
        open_chat([path])
    path, index = copy("long")
    wrong = np.load(index)
    wrong[:, 1] = 3
    with index.open("wb") as file:
        np.save(file, wrong)
    manifest = tmp_path / "long" / "manifest.json"
    sha256 = load_manifest(path).chat.train_index.sha256
    manifest.write_text(manifest.read_text().replace(sha256, hashlib.sha256(index.read_bytes()).hexdigest()))
    with pytest.raises(UserError, match="row [0-9]+ is not as long as the index says"):
        open_chat([path]).batch(0, range(BATCH))


def test_settings_that_cannot_be(prepared, tmp_path, tokenizer_folder):
    source = str(Path(prepared).parent / "chat.jsonl")
    for options, words in (
        ({"too_long": "squeeze"}, "too_long='squeeze': choose one of drop, cut"),
        ({"sequence_length": 1}, "sequence_length=1"),
        ({"sequence_length": 4}, "no answer is left to train on: .* are too long for sequence_length=4"),
        ({"group_key": "story"}, "chat.jsonl, line 1: group_key needs a text or a number"),
        ({"tokenizer": str(tmp_path / "none")}, "there is no tokenizer"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_chat([source], tmp_path / "out", **{"tokenizer": tokenizer_folder, "workers": 1, **options})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_refuses_names_the_line(tmp_path, tokenizer_folder, workers):
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    lines = [{"prompt": "a", "response": "b"}, talk(1, 0)]
    with pytest.raises(UserError, match="chat.jsonl, line 2: the chat template fails: no system here"):
        make_set(tmp_path / "set", str(tmp_path / "t"), lines, workers=workers, validation_fraction=0.0)
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages|length }}")
    with pytest.raises(UserError, match="line 1: the chat template writes an answer differently"):
        make_set(tmp_path / "other", str(tmp_path / "t"), lines, workers=workers, validation_fraction=0.0)
