"""Tests that everything that a line of chat data says is honoured, counted or refused."""

import json
import shutil

import pytest

from llada_jax.config import UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.shapes import read_line
from llada_jax.text.tokenizer import load_tokenizer

from .test_chat import make_set, pairs_of
from .test_conversations import write

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
EARLIER = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}]
TOOLS = [{"type": "function", "function": {"name": "look"}}]
CALL = {"name": "look", "arguments": {"at": "it"}}


def said(line):
    return read_line(line, "a.jsonl, line 1")


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        (
            {
                "instruction": "What?", "input": "", "output": "That.", "system": "Be brief.",
                "history": [["Who?", "She."]],
            },
            [SYSTEM, *EARLIER, *ASKED],
        ),
        ({"query": "What?", "response": "That.", "history": EARLIER}, [*EARLIER, *ASKED]),
        ({"system_prompt": "Be brief.", "question": "What?", "response": "That."}, [SYSTEM, *ASKED]),
        ({"prompt": "What?", "completion": "That.", "history": [], "system": ""}, ASKED),
        ({"prompt": None, "instruction": "What?", "output": "That.", "messages": None}, ASKED),
        ({"instruction": "b", "context": "a", "input": "c", "response": "d"}, "a\n\nb\n\nc"),
        ({"messages": ASKED, "system": "Be brief."}, [SYSTEM, *ASKED]),
        ({"messages": [SYSTEM, *ASKED], "system": "Be brief."}, [SYSTEM, *ASKED]),
        ({"messages": ASKED, "prompt": "What?", "instruction": "What"}, ASKED),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "\ufeffWhat?"},
                    {"from": "gpt", "value": "That."},
                ]
            },
            [SYSTEM, *ASKED],
        ),
        ({"messages": [{"from": "User", "value": "What?"}, {"from": "Assistant", "value": "That."}]}, ASKED),
        ({"conversation": ASKED}, ASKED),
        ({"conversations": ["Who?", "She.", "What?", "That."], "source": "x"}, [*EARLIER, *ASKED]),
        ({"id": "5", "data": ["Who?", "She.", "\ufeffWhat?", "That."]}, [*EARLIER, *ASKED]),
        ({"input": "What?", "output": "That."}, ASKED),
        ({"query": "What?", "response": "That.", "data": ["a", "b"]}, ASKED),
        ({"input": "What?", "output": "That.", "data": ["a", "b"]}, ASKED),
        ({"conversation": ["User: I say", "d"]}, "User: I say"),
        ({"prompt": [SYSTEM, ASKED[0]], "system": "Be brief.", "response": "That."}, [SYSTEM, *ASKED]),
        ({"context": "a", "input": "b", "output": "d"}, "a\n\nb"),
        ({"prompt": [SYSTEM, *EARLIER, ASKED[0]], "completion": [ASKED[1]]}, [SYSTEM, *EARLIER, *ASKED]),
        ({"prompt": ASKED[:1], "system": "Be brief.", "response": "That."}, [SYSTEM, *ASKED]),
        ({"prompt": "What?", "completion": ASKED[1:]}, ASKED),
        (
            {"messages": [{"role": "prompter", "content": "What?"}, {"role": "Assistant", "content": "That."}]},
            ASKED,
        ),
        ({"messages": [{"role": "human", "content": "What?"}, {"role": "gpt", "content": "That."}]}, ASKED),
        (
            {
                "conversations": [
                    {"from": "human", "value": "What?"}, {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "5"}, {"from": "gpt", "value": "That."},
                ]
            },
            [
                ASKED[0],
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "5"},
                ASKED[1],
            ],
        ),
    ],
)  # fmt: skip
def test_all_that_is_said_becomes_messages(line, messages):
    found = said(line).messages
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}, {"role": "assistant", "content": "d"}]
    assert found == messages


@pytest.mark.parametrize(
    ("mark", "learned"),
    [
        ({"weight": 0}, False), ({"weight": 1.0}, True), ({"weight": None}, True), ({"train": False}, False),
        ({"loss": False}, False), ({"loss_mask": 0}, False), ({"mask": True}, False), ({"mask": 0}, True),
        ({"masked": 1}, False), ({"loss_scale": 0.0}, False), ({"weight": 1, "mask": False}, True),
        ({"trainable": False}, False), ({"training": False}, False),
    ],
)  # fmt: skip
def test_marks_of_messages_and_lines(mark, learned):
    read = said({"messages": [*EARLIER, ASKED[0], ASKED[1] | mark]})
    assert read.masked == (frozenset() if learned else {3})
    assert read.messages == [*EARLIER, *ASKED], "no template sees a mark"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That.", **mark}]
    assert said({"conversations": turns}).masked == (frozenset() if learned else {1})
    assert said({"messages": [*EARLIER, *ASKED], **mark}).masked == (frozenset() if learned else {1, 3})


def test_a_mark_of_a_message_counts_more_than_that_of_its_line():
    assert said({"messages": [*EARLIER, ASKED[0], ASKED[1] | {"train": True}], "train": False}).masked == {1}
    assert said({"messages": ASKED, "mask": "User"}).masked == frozenset()
    assert said({"messages": [ASKED[0] | {"weight": 1}, ASKED[1]]}).unread == [
        "marks to learn a message of the role user"
    ]
    assert said({"messages": [ASKED[0] | {"weight": 0}, ASKED[1]]}).unread == []


def test_what_a_template_is_told_beside_the_messages():
    line = {"messages": ASKED, "tools": json.dumps(TOOLS), "enable_thinking": False, "documents": []}
    assert said(line).variables == {"tools": TOOLS, "enable_thinking": False}
    assert said({"messages": ASKED, "chat_template_kwargs": {"thinking": True}}).variables == {"thinking": True}
    assert said({"messages": ASKED, "tools": "[]"}).variables == {}
    empty = {"enable_thinking": False, "custom_instructions": "", "python_tools": []}
    assert said({"messages": ASKED, "chat_template_kwargs": empty}).variables == {"enable_thinking": False}


def test_of_a_question_that_is_a_list_nothing_is_learned():
    line = {"prompt": [SYSTEM, *EARLIER, ASKED[0]], "completion": [ASKED[1], *EARLIER]}
    assert said(line).masked == {2}
    line["prompt"][2] = EARLIER[1] | {"train": True}
    assert said(line).masked == frozenset(), "its own mark counts"
    line["prompt"][2] = EARLIER[1] | {"weight": None}
    assert said(line).masked == {2}, "null is no mark"
    assert said({"data": ["a", "b", "c"]}).unread == []
    assert said({"messages": ASKED, "data": ["a", "b"]}).unread == ["data"]


def test_keys_that_say_nothing_are_listed():
    line = {"prompt": "What?", "response": "That.", "id": 3, "text": "What? That.", "empty": None, "loss": 0.5}
    assert said(line).unread == ["id", "text", "loss"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, '"chosen": this is preference data'),
        ({"messages": ASKED, "chosen": ASKED, "rejected": ASKED}, "this is preference data"),
        ({"prompt": "a", "completion": "b", "label": False}, "labelled as a bad one"),
        ({"messages": [ASKED[0], ASKED[1] | {"rejected": "x"}]}, "a message has several versions"),
        ({"prompt": "a", "response": ["b", "c"]}, '"response" must be a text'),
        ({"question": "a", "answer": "b", "answers": ["b", "c"]}, "write one line for each answer"),
        ({"question": "a", "choices": ["x", "y"], "answer": "A"}, "choices are not part of the question"),
        ({"prompt": "a", "response": "b", "reasoning": "c"}, "it belongs to the answer"),
        ({"prompt": "a", "response": "b", "images": ["x.png"]}, "only text can be learned"),
        ({"prompt": "a", "question": "b", "response": "c"}, "several of the shapes"),
        ({"data": ["a"]}, "none of the shapes"),
        ({"data": {"a": "b"}}, "none of the shapes"),
        ({"conversations": ["a", None]}, "message 0"),
        ({"instruction": "a", "data": ["b", "c"]}, "none of the shapes"),
        ({"conversations": ["Human: a", "Assistant: b"]}, "name their speakers"),
        ({"prompt": ASKED, "completion": ASKED[1:]}, "ends with a message of the assistant"),
        ({"prompt": "a", "response": ASKED}, 'begins with a message of the role "user"'),
        ({"prompt": "a", "response": ASKED[1:] * 2}, '"response" has several answers'),
        ({"prompt": ASKED[:1], "input": "a", "response": "b"}, '"input" beside a list under "prompt"'),
        ({"prompt": [SYSTEM, ASKED[0]], "system": "Be long.", "response": "b"}, "another one beside it"),
        ({"prompt": ["a"], "response": "b"}, '"prompt" must be a text'),
        ({"prompt": "a", "response": "c", "output": "d"}, "several of the shapes"),
        ({"messages": ASKED, "conversations": ASKED}, "several of the shapes"),
        ({"messages": ASKED, "history": [["a", "b"]]}, '"history" beside "messages" cannot be honoured'),
        ({"messages": ASKED, "context": "elsewhere"}, '"context" beside "messages" cannot be honoured'),
        ({"messages": [SYSTEM, *ASKED], "system": "Be long."}, "another one beside it"),
        ({"prompt": "a", "response": "b", "system": "c", "system_prompt": "d"}, "several system messages"),
        ({"prompt": "a", "response": "b", "history": ["c"]}, '"history" must be a list of questions with answers'),
        ({"prompt": "a", "response": "b", "history": "c"}, '"history" must be a list'),
        ({"prompt": "a", "response": "b", "system": {"x": 1}}, '"system" must be a text'),
        ({"prompt": "a", "response": "b", "tools": "look"}, '"tools" must be a list of objects'),
        ({"prompt": "a", "response": "b", "functions": [{}]}, 'write them as "tools"'),
        ({"prompt": "a", "response": "b", "weight": 0.5}, 'the line has "weight": 0.5'),
        ({"prompt": "a", "response": "b", "loss_mask": [0, 1]}, 'the line has "loss_mask": [0, 1]'),
        ({"messages": ASKED, "weights": [0, 1]}, 'the line has "weights", a list of marks'),
        ({"messages": [ASKED[0], ASKED[1] | {"weight": 2}]}, 'message 1 has "weight": 2'),
        ({"messages": [ASKED[0], ASKED[1] | {"mask": "yes"}]}, 'message 1 has "mask": "yes"'),
        ({"messages": [ASKED[0], ASKED[1] | {"mask": 1, "train": 1}]}, "contradict each other: train, mask"),
        ({"messages": [ASKED[0], ASKED[1] | {"train_detail": [{}]}]}, "mark the whole message"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, 'a message is from "nobody"'),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "must be a call as JSON"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "image"}]}]}, "a part of the type 'image'"),
        ({"messages": [ASKED[0], ASKED[1] | {"x": float("nan")}]}, "number that is not finite"),
        ({"messages": [ASKED[0], ASKED[1] | {"audio": {"id": 1}}]}, 'the key "audio", but only text can be read'),
        ({"prompt": "a", "response": "b", "chat_template_kwargs": "x"}, '"chat_template_kwargs" must be an object'),
    ],
)
def test_what_cannot_be_honoured_is_refused(line, words):
    with pytest.raises(UserError) as error:
        said(line)
    assert str(error.value).startswith("a.jsonl, line 1: ") and words in str(error.value)
    assert "\n" not in str(error.value) and error.value.kind


def test_a_deeply_nested_value_is_refused():
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(UserError, match="message 1 of the chat contains a value that is nested"):
        said({"messages": [ASKED[0], ASKED[1] | {"x": deep}]})


def test_masked_answers_are_context_only(tmp_path, tokenizer_folder, capsys):
    """The rows are those of the unmarked data, without the row of the marked answer; the counts say so."""
    tokenizer = load_tokenizer(tokenizer_folder)
    marked = [EARLIER[0], EARLIER[1] | {"weight": 0}, ASKED[0], ASKED[1] | {"weight": 1, "name": "Ann"}]
    lines = [{"messages": marked, "id": 1}, {"messages": ASKED, "weight": 0, "id": 2}]
    source = write(tmp_path / "a.jsonl", lines)
    options = {"tokenizer": tokenizer_folder, "sequence_length": 256, "validation_fraction": 0, "workers": 1}
    manifest = prepare_chat([source], tmp_path / "set", **options)
    (pair,) = pairs_of(str(tmp_path / "set"))
    prompt, answer = tokenizer.encode_answer([*EARLIER, *ASKED])
    assert pair.tokens.tolist() == [*prompt, *answer, tokenizer.eos_id] and pair.prompt == len(prompt)
    assert manifest.chat.context_only == 2 and load_manifest(tmp_path / "set") == manifest
    listed = "without effect, with the number of conversations: id (2), name of messages (1)\n"
    assert capsys.readouterr().err.endswith(listed)


def test_an_unmarked_set_is_the_one_that_it_was(tmp_path, tokenizer_folder):
    path = make_set(tmp_path, tokenizer_folder, [{"prompt": f"q{i}", "response": "a", "id": i} for i in range(20)])
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert "context_only" not in text and "left_out" not in text
    assert load_manifest(path).to_json() == text


def test_a_switch_that_is_off_is_listed_if_the_template_has_none(tmp_path, tokenizer_folder, capsys):
    source = write(tmp_path / "a.jsonl", [{"messages": ASKED, "enable_thinking": False}])
    options = {"tokenizer": tokenizer_folder, "sequence_length": 256, "validation_fraction": 0, "workers": 1}
    assert prepare_chat([source], tmp_path / "set", **options).train.rows == 1
    assert "enable_thinking (1)" in capsys.readouterr().err


def test_keys_that_the_template_passes_over_are_refused(tmp_path, tokenizer_folder):
    """LLaDA's template knows neither tools nor thoughts. Learning such answers without them would be something else."""
    answer = ASKED[1] | {"content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    for i, (line, words) in enumerate(
        (
            ({"messages": ASKED, "tools": TOOLS}, 'passes over "tools"'),
            ({"messages": [ASKED[0], answer]}, 'passes over "tool_calls"'),
            ({"messages": [ASKED[0], ASKED[1] | {"reasoning_content": "x"}]}, 'passes over "reasoning_content"'),
            ({"messages": ASKED, "enable_thinking": True}, 'passes over "enable_thinking"'),
        )
    ):
        with pytest.raises(UserError, match=f"chat.jsonl, line 1: the chat template {words}"):
            make_set(tmp_path / str(i), tokenizer_folder, [line], validation_fraction=0)


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path, tokenizer_folder):
    """The texts of these messages occur elsewhere, so that it does not help to look for them."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and loop.first) %}"
        "<{{ m.role }}>{{ m.content | trim }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    make_set(tmp_path / "whole", folder, [{"messages": [SYSTEM, *ASKED]}], validation_fraction=0)
    result = {"role": "tool", "content": "t"}
    for message in (SYSTEM, result):
        line, role = {"messages": [*EARLIER, message, *ASKED]}, message["role"]
        with pytest.raises(UserError, match=f'chat.jsonl, line 1: .* leaves out a message of the role "{role}"'):
            make_set(tmp_path / role, folder, [line], validation_fraction=0)


def test_any_keys_are_listed_in_one_line(tmp_path, tokenizer_folder, capsys):
    lines = [{"messages": ASKED, "id": 1, "\x1b[2J\n": 1, "\ud800": 1, f"key {i}": 1} for i in range(60)]
    make_set(tmp_path, tokenizer_folder, lines, validation_fraction=0, progress=True)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("without effect"))
    assert "id (60), key 0 (1), " in line and "\\x1b[2J\\n (60)" in line and "\\ud800 (60)" in line
    assert line.endswith(" and 13 more keys")
