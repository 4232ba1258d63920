import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.conversation.conversation import Settings
from llada_jax.conversation.dialogue import named_file, read_record, shortened, write_record


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


MESSAGES = [{"role": "system", "content": "é\n漢"}, user("a"), assistant(""), user("b") | {"name": "me"}]


def test_a_conversation_comes_back_from_its_file(tmp_path):
    path = tmp_path / "chat.json"
    write_record(path, {"messages": MESSAGES})
    assert read_record(path)["messages"] == MESSAGES
    # The file has one line, in the form of training data.
    assert path.read_text().count("\n") == 1 and json.loads(path.read_text()) == {"messages": MESSAGES}
    write_record(path, {"messages": []})
    assert read_record(path) == {"messages": []} and [each.name for each in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory$"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff", "cannot be read"),
        ("[]", "is not a conversation"),
        ('{"messages": "hello"}', "is not a conversation"),
        ('{"messages": ["hello"]}', "message 0"),
        ('{"messages": [{"role": "user"}]}', 'message 0 of the chat needs a "content"'),
        ({"messages": [assistant("a")]}, "message 0 has the role 'assistant', but must have the role 'user'"),
        ({"messages": [*MESSAGES, user("c")]}, "message 4 has the role 'user', but must have the role 'assistant'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"messages": [], "\\ud800": 1}', "surrogate"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, words):
    path = tmp_path / "chat.json"
    if content is not None:
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as raised:
        read_record(path)
    assert str(path) in str(raised.value)


def test_nothing_else_is_overwritten(tmp_path):
    (other := tmp_path / "weights.json").write_text('{"a": 1}')
    (link := tmp_path / "link").symlink_to("nowhere")
    nowhere = tmp_path / "no" / "x"
    for path, words in (
        (other, "exists and is not a conversation"),
        (link, "exists and is not a conversation"),
        (nowhere, "cannot be written: No such f"),
    ):
        with pytest.raises(UserError, match=words):
            write_record(path, {"messages": MESSAGES})
    # The name is short enough for a file, but too long with the suffix of the unfinished file.
    with pytest.raises(UserError, match="cannot be written: File name too long$"):
        write_record(tmp_path / ("x" * 254), {"messages": MESSAGES})
    assert other.read_text() == '{"a": 1}' and sorted(each.name for each in tmp_path.iterdir()) == ["link", other.name]


def test_files_are_named_as_users_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_file("~/x.json") == tmp_path / "x.json" and named_file("x/y").name == "y"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("~nosuchuser/x", "~nosuchuser/x cannot be a file: "),
        ("x" * 300, r"x{48}\.\.\.x{49} cannot be a file: File name too long$"),
        ("x\0", "cannot be a file: embedded null"),
        (f"{__file__}/x", "test_dialogue.py/x cannot be a file: Not a directory$"),
        ("", " is a folder: name a file"),
        ("/", "/ is a folder: name a file"),
    ],
)
def test_what_cannot_be_a_file_is_said(text, words):
    with pytest.raises(UserError, match=words):
        named_file(text)


def test_no_error_repeats_all_of_a_long_text():
    assert shortened("x" * 100) == "x" * 100
    assert shortened("a" * 500 + "b" * 500) == "a" * 48 + "..." + "b" * 49


DIALOGUES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", 3])},
        optional={"content": st.text(st.characters(), max_size=5) | st.none() | st.floats(), "more": st.floats()},
    ),
    max_size=4,
)
CONTENTS = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda messages: json.dumps({"messages": messages}).encode(), DIALOGUES),
    st.builds(lambda messages: b"\xef\xbb\xbf" + json.dumps({"messages": messages, "x": 1}).encode(), DIALOGUES),
    st.sampled_from([b"[" * 100_000, b'{"messages": []}', b'{"messages": [], "score": NaN}',
                     b'{"messages": [], "x": 1e999}', b'{"messages": [], "x": "\\ud800"}', b"\x00"]),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(CONTENTS)
@example(b'{"messages": [], "score": NaN}')
@example(b"[" * 100_000)
def test_any_file_is_a_conversation_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        record = read_record(path)
    except UserError as error:
        assert "\n" not in str(error) and "any.json" in str(error)
        return
    written = path.with_name("again.json")
    written.unlink(missing_ok=True)
    write_record(written, record)
    text = written.read_text(encoding="utf-8")
    assert "NaN" not in text.replace('"NaN"', "") and read_record(written) == record


@given(st.sampled_from([*Settings().described(), "nothing"]), st.text(max_size=6) | st.floats().map(str))
@settings(max_examples=80, deadline=None)
def test_any_value_of_a_setting_is_taken_or_refused_in_one_line(name, text):
    try:
        changed = Settings().changed(name, text)
    except UserError as error:
        assert "\n" not in str(error).replace(text, "")
        return
    assert changed == changed.checked()
