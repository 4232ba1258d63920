"""Tests that every common shape of a line is read, and that any other line gives a one-line error."""

import gzip
import json

import pytest

from llada_jax.config import UserError
from llada_jax.data.prepare.conversations import Conversations, answers

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def write(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    return str(path)


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ({"messages": ASKED}, "What?"),
        ({"prompt": "What?", "response": "That.", "template": 3}, "What?"),
        ({"instruction": "What?", "input": "", "output": "That."}, "What?"),
        ({"instruction": "What?", "output": "That.", "input": None}, "What?"),
        ({"instruction": "What?", "input": "Now.", "output": "That."}, "What?\n\nNow."),
        ({"question": "What?", "answer": "That."}, "What?"),
        ({"context": "It was night.", "question": "What?", "answer": "That.", "story": "s"}, "It was night.\n\nWhat?"),
    ],
)
def test_shapes(tmp_path, line, question):
    (found,) = Conversations([write(tmp_path / "a.jsonl.gz", ["\n", line])])
    assert found.messages == [{"role": "user", "content": question}, ASKED[1]]
    assert found.source == 0 and found.where == f"{tmp_path}/a.jsonl.gz, line 2"


def test_messages_stay_as_they_are(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "user", "content": "Why?", "name": "Ann"}]
    (found,) = Conversations([write(tmp_path / "a.jsonl", [{"messages": messages}])])
    assert found.messages == messages
    assert answers(found.messages) == [2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]\n", "must be a JSON object, but this is [1]"),
        ("{\n", "not JSON"),
        ({"text": "What?"}, "none of the shapes messages, prompt + response"),
        ({}, "its keys are none"),
        ({"prompt": "a", "response": "b", "messages": ASKED}, "several of the shapes"),
        ({"prompt": "a", "response": None}, '"response" must be a text, but it is null'),
        ({"instruction": "a", "input": ["x"], "output": "b"}, '"input" must be a text'),
        ({"messages": []}, "a chat is a list of messages"),
        ({"messages": "hello"}, "a chat is a list of messages"),
        ({"messages": [{"role": "user"}]}, 'message 0 of the chat needs a "content"'),
        ({"messages": ASKED[:1]}, "the conversation has no answer"),
        ({"messages": ASKED[1:]}, "the conversation has no answer"),
        ('{"prompt": "a\\ud800", "response": "b"}\n', "is not a valid character"),
    ],
)
def test_what_is_no_conversation_is_named_by_file_and_line(tmp_path, line, words):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "b"}, line])
    with pytest.raises(UserError) as error:
        list(Conversations([path]))
    said = str(error.value)
    assert said.startswith(f"{path}, line 2: ") and words in said and "\n" not in said


def test_groups(tmp_path):
    lines = [{"prompt": str(i), "response": "b", "story": i % 2} for i in range(4)]
    path = write(tmp_path / "a.jsonl", lines)
    assert [each.group for each in Conversations([path], "story")] == ["0", "1", "0", "1"]
    assert len({each.group for each in Conversations([path])}) == 4
    same = write(tmp_path / "same.jsonl", [{"prompt": "a", "response": str(i)} for i in range(3)])
    assert len({each.group for each in Conversations([same])}) == 1  # their messages before the answer are the same
    odd = write(tmp_path / "odd.jsonl", ['{"prompt": "a", "response": "b", "story": "\\ud800"}\n'])
    with pytest.raises(UserError, match="odd.jsonl, line 1: .* is not a valid character"):
        list(Conversations([odd], "story"))
    with pytest.raises(UserError, match="line 1: group_key needs a text or a number under the key .chapter."):
        list(Conversations([path], "chapter"))


def test_only_lines_of_json_are_read(tmp_path):
    for name in ("a.txt", "a.jsonl.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match="conversations are read from .jsonl files"):
            Conversations([str(tmp_path / name)])
