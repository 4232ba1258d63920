"""Tests the standard shapes of chat messages: each template gets what it takes, and the answer is what a model writes.

The templates are small ones in the manner of published ones.
"""

import json

import pytest
from chat_folders import PUBLISHED, make_folder

from llada_jax.config import UserError
from llada_jax.text.tokenizer import load_tokenizer

USER = {"role": "user", "content": "Is it cold?"}
ANSWER = {"role": "assistant", "content": "Yes."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]}
ARGUMENTS = {"city": "\u00c5s", "days": [1, None]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "<|eot_id|>", "parameters": {}}}]

HEAD = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
END = "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
STRINGS = HEAD + "{{ m.content | trim }}" + END
EITHER = (
    HEAD + "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}" + END
)
ONLY_PARTS = (
    HEAD + "{% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}" + END
)
AS_JSON = HEAD + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}" + END

CALLS = "{% for call in m.tool_calls or [] %}<b>{{ call.function.name }} "
NO_CALL = "{% if m.content %}{{ m.content }}{% endif %}"
OBJECTS = HEAD + NO_CALL + CALLS + "{{ call.function.arguments | tojson }}{% endfor %}" + END
TEXTS = HEAD + NO_CALL + CALLS + "{{ '' + call.function.arguments }}{% endfor %}" + END
BOTH = (
    HEAD + NO_CALL + CALLS + "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}{% endfor %}" + END
)
PRINTED = HEAD + "{{ m.content }}" + CALLS + "{{ call.function.arguments }}{% endfor %}" + END
WITH_TOOLS = (
    "{% for tool in tools or [] %}{% if tool.type == 'function' %}{{ tool | tojson }}{% endif %}{% endfor %}" + BOTH
)

# Keeps the thought of the last answer only, and opens none. The variable says whether a model may think.
THINKS = (
    HEAD + "{% set thought = m.reasoning_content or '' %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set text = text.split('</think>')[-1] | trim %}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
    + END
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
# Opens a thought in the prompt, and writes no thought of an answer.
OPENS = HEAD + "{{ m.content.split('</think>')[-1] }}" + END + "{% if add_generation_prompt %}<think>\n{% endif %}"


def loaded(folder, template):
    return load_tokenizer(make_folder(folder, template))


def answer_of(tokenizer, messages, variables=None):
    prompt, ids = tokenizer.encode_answer(messages, variables)
    return tokenizer.decode(prompt), tokenizer.decode(ids, continuation=True)


def call(arguments, content=None):
    function = {"name": "look", "arguments": arguments}
    message = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    return message if content == "absent" else message | {"content": content}


@pytest.mark.parametrize("template", [STRINGS, EITHER, ONLY_PARTS, AS_JSON, None], ids="sepj-")
def test_parts_and_texts_are_the_same_for_every_template(tmp_path, template):
    tokenizer = loaded(tmp_path, template)
    text = "\n\n" if template is None else ""
    for user in (USER, PARTS):
        prompt, answer = answer_of(tokenizer, [user, ANSWER])
        assert f"user<|end_header_id|>{text}Is it cold?<|eot_id|>" in prompt and answer == "Yes.<|eot_id|>"
        parts = {"role": "assistant", "content": [{"type": "text", "text": "Yes<|eot_id|>"}]}
        ids = tokenizer.encode_answer([user, parts])[1]
        assert ids.count(tokenizer.eot_id) == 1 and tokenizer.decode(ids) == "Yes<|eot_id|><|eot_id|>"


@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize("template", [OBJECTS, TEXTS, BOTH, PRINTED, WITH_TOOLS], ids="otbpw")
def test_tool_calls_with_and_without_content(tmp_path, template, content):
    tokenizer = loaded(tmp_path, template)
    spaced = json.dumps(ARGUMENTS, ensure_ascii=False)
    for arguments in (ARGUMENTS, spaced, spaced.replace(" ", "")):
        _, answer = answer_of(tokenizer, [USER, call(arguments, content)])
        as_given = arguments if isinstance(arguments, str) and template != OBJECTS else spaced
        assert answer == f"<b>look {as_given}<|eot_id|>"
    if template != OBJECTS:
        assert answer_of(tokenizer, [USER, call("not JSON", content)])[1] == "<b>look not JSON<|eot_id|>"


def test_arguments_that_only_fit_as_objects_must_be_json(tmp_path):
    with pytest.raises(UserError, match="cannot write a message without text, or the arguments of a tool call"):
        loaded(tmp_path, OBJECTS).encode_answer([USER, call("not JSON")])


def test_tools_are_the_users_text(tmp_path):
    tokenizer = loaded(tmp_path, WITH_TOOLS)
    messages, variables = [USER, call(ARGUMENTS), {"role": "tool", "content": "5"}, ANSWER], {"tools": TOOLS}
    prompt, ids = tokenizer.encode_answer(messages, variables)
    assert tokenizer.decode(prompt).startswith(json.dumps(TOOLS[0]) + "<|start_header_id|>user<|end_header_id|>")
    assert prompt.count(tokenizer.eot_id) == 3, "the literal in the description is text"
    assert tokenizer.decode(ids) == "Yes.<|eot_id|>"
    assert tokenizer.unread_in_chat(messages, variables) == []
    assert loaded(tmp_path / "b", BOTH).unread_in_chat(messages, variables) == ["tools"]
    assert loaded(tmp_path / "c", STRINGS).unread_in_chat(messages[:1] + messages[2:], variables) == ["tools"]


def test_a_template_of_its_own_for_tools(tmp_path):
    named = [{"name": "default", "template": STRINGS}, {"name": "tool_use", "template": WITH_TOOLS}]
    tokenizer = loaded(tmp_path, named)
    assert tokenizer.render_chat([USER], variables={"tools": TOOLS}).startswith(json.dumps(TOOLS[0]))
    assert tokenizer.render_chat([USER]).startswith("<|start_header_id|>user")


@pytest.mark.parametrize(
    ("answer", "variables", "prompt_end", "learned"),
    [
        (ANSWER, {}, "", "<think>\n\n</think>\n\nYes.<|eot_id|>"),
        (ANSWER, {"enable_thinking": False}, "<think>\n\n</think>\n\n", "Yes.<|eot_id|>"),
        (ANSWER, {"enable_thinking": True}, "", "<think>\n\n</think>\n\nYes.<|eot_id|>"),
        (ANSWER | {"reasoning_content": "Snow."}, {}, "", "<think>\nSnow.\n</think>\n\nYes.<|eot_id|>"),
        (ANSWER | {"reasoning": "Snow."}, {}, "", "<think>\nSnow.\n</think>\n\nYes.<|eot_id|>"),
        (ANSWER | {"content": "<think>Snow.</think>Yes."}, {}, "", "<think>\nSnow.\n</think>\n\nYes.<|eot_id|>"),
    ],
)
def test_thoughts(tmp_path, answer, variables, prompt_end, learned):
    tokenizer = loaded(tmp_path, THINKS)
    earlier = {"role": "assistant", "content": "<think>What?</think>No."}
    prompt, text = answer_of(tokenizer, [USER, earlier, USER, answer], variables)
    assert prompt.endswith(f"assistant<|end_header_id|>{prompt_end}") and "What?" not in prompt
    assert text == learned
    assert tokenizer.unread_in_chat([USER, answer], variables) == []


@pytest.mark.parametrize(
    ("content", "learned"),
    [
        ("<think>\nSnow.\n</think>\n\nYes.", "Snow.\n</think>\n\nYes.<|eot_id|>"),
        ("Snow.\n</think>\n\nYes.", "Snow.\n</think>\n\nYes.<|eot_id|>"),
        ("<think>Is <|eot_id|> cold?</think>Yes.", "Is <|eot_id|> cold?</think>Yes.<|eot_id|>"),
        ("Yes.", None),
        ("<think>Snow.</think>", None),
        ("<think>a</think>b</think>c", None),
        ("Hm. <think>a</think>b", None),
    ],
)
def test_a_prompt_that_opens_a_thought(tmp_path, content, learned):
    """The model writes the thought, its end and the answer; without a thought in the data, that cannot be told."""
    tokenizer = loaded(tmp_path, OPENS)
    messages = [USER, {"role": "assistant", "content": content}]
    if learned is None:
        with pytest.raises(UserError, match="differently from the prompt for it, which opens a thought"):
            tokenizer.encode_answer(messages)
        return
    prompt, ids = tokenizer.encode_answer(messages)
    assert prompt == tokenizer.encode_chat([USER]) and tokenizer.decode(prompt).endswith("<think>\n")
    assert tokenizer.decode(ids) == learned and ids.count(tokenizer.eot_id) == 1


@pytest.mark.parametrize("answer", [{"content": "<think>a</think>b"}, {"content": "b", "reasoning_content": "a"}])
def test_a_thought_that_the_template_leaves_out_is_told(tmp_path, answer):
    template = HEAD + "{{ m.content.split('</think>')[-1] }}" + END
    with pytest.raises(UserError, match="leaves out the thought of an answer"):
        loaded(tmp_path, template).encode_answer([USER, {"role": "assistant", **answer}])


def test_what_the_template_marks_as_generated_is_the_answer(tmp_path):
    def marking(before, within, after=""):
        return (
            "{% for m in messages %}<|user|>{{ m.role }}:{% if m.role == 'assistant' %}" + before + "{% generation %}"
            + within + "{% endgeneration %}" + after + "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|user|>assistant:{% endif %}"
        )  # fmt: skip

    messages = [USER, ANSWER, USER, ANSWER]
    for i, (parts, right) in enumerate(
        (
            (("", "{{ m.content }}"), True),
            ((" ", "{{ m.content }}", "."), True),
            (("", "a{% endgeneration %} b {% generation %}{{ m.content }}"), True),
            (("Well: ", "{{ m.content }}"), False),
            (("", "", "{{ m.content }}"), False),
        )
    ):
        tokenizer = loaded(tmp_path / str(i), marking(*parts))
        if right:
            assert "Yes." in answer_of(tokenizer, messages)[1]
            continue
        with pytest.raises(UserError, match="marks with {% generation %} another part"):
            tokenizer.encode_answer(messages)


CHATS = {
    "text": ([USER, ANSWER], {}),
    "parts": ([PARTS, ANSWER], {}),
    "only parts": ([PARTS, ANSWER | {"content": [{"type": "text", "text": "Yes."}]}], {}),
    "call": ([USER, call(ARGUMENTS, None), {"role": "tool", "content": "5"}, ANSWER], {"tools": TOOLS}),
    "other thought": ([USER, ANSWER | {"thinking": "Snow."}], {}),
    "thought": ([USER, ANSWER | {"reasoning_content": "Snow."}], {"enable_thinking": False}),
}


@pytest.mark.parametrize(
    ("template", "chats"),
    [
        (PUBLISHED, ["text"]), (STRINGS, ["text"]), (EITHER, ["text", "parts"]), (ONLY_PARTS, ["only parts"]),
        (OBJECTS, ["text", "call"]), (WITH_TOOLS, ["text", "call"]), (OPENS, ["text"]),
        (THINKS, ["text", "thought", "other thought"]),
    ],
)  # fmt: skip
def test_the_text_is_that_of_transformers(tmp_path, template, chats):
    transformers = pytest.importorskip("transformers")
    folder = make_folder(tmp_path, template)
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "chat_template": template}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    ours = load_tokenizer(folder)
    for name in chats:
        messages, variables = CHATS[name]
        for chat, asks in ((messages[:-1], True), (messages, False)):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks, **variables)
            header = "<|start_header_id|>assistant<|end_header_id|>\n\n"  # PUBLISHED writes it in any case
            wanted = text.removesuffix(header) if template == PUBLISHED and not asks else text
            assert ours.render_chat(chat, asks, variables) == wanted
