"""Byte order marks, other encodings, lone surrogates and deep nesting in the files of a tokenizer."""

import json

import pytest
import tokenizer_folders as tf

from llada_jax.config import UserError
from llada_jax.conversation.dialogue import read_record
from llada_jax.data.manifest import load_manifest
from llada_jax.formats import published, workdir
from llada_jax.text.tokenizer import load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

MARK = b"\xef\xbb\xbf"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")


def folder(path):
    tf.write(path, tf.words(), tokenizer_config={"bos_token": "<s>"}, special_tokens_map={"eos_token": "ab"},
             chat_template={"chat_template": "{{ bos_token }}\n{{ messages[0].content }}"})  # fmt: skip
    return path


def test_a_byte_order_mark_is_no_content(tmp_path):
    plain = load_tokenizer(folder(tmp_path / "a"))
    marked = folder(tmp_path / "b")
    for name in FILES:
        (marked / name).write_bytes(MARK + (marked / name).read_bytes())
    found = load_tokenizer(marked)
    assert found.roles == plain.roles and found.chat_template == plain.chat_template
    found.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").sha256 == found.sha256
    (marked / "chat_template.jinja").write_bytes(MARK + b"{{ messages[0].content }}")
    messages = [{"role": "user", "content": "a b"}]
    assert load_tokenizer(marked).render_chat(messages) == "a b"
    assert load_tokenizer(marked).encode_chat(messages) == [1, 2]


@pytest.mark.parametrize("name", [*FILES[1:], "added_tokens.json", "chat_template.jinja"])
def test_other_contents_are_one_line(tmp_path, name):
    if name == "added_tokens.json":
        train_tokenizer(["one two three four"] * 9, 286, tmp_path)
    else:
        folder(tmp_path)
    wrong = {
        b"\xff": "in UTF-8: line 1",
        b'{"a": 1,\n "b": "\xe9"}': "in UTF-8: line 2",
        '{"a": 1}'.encode("utf-16"): "UTF-16",
    }
    if name != "chat_template.jinja":
        wrong |= {
            b"[" * 100_000: "is not JSON",
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "nested too deeply",
            b"[]": "is not a JSON object",
            b"": "is not JSON",
            b'{"x": "\\ud800"}': "half a character",
        }
    for content, words in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            load_tokenizer(tmp_path)
        assert f"{tmp_path}: {name}" in str(error.value) and "\n" not in str(error.value)


def test_byte_order_marks_in_the_other_files(tmp_path):
    (tmp_path / "config.json").write_bytes(MARK + b'{"max_sequence_length": 64}')
    assert published.read_json(tmp_path / "config.json") == {"max_sequence_length": 64}
    assert workdir.trained_length(tmp_path) == 64
    for nested in ("[" * 100_000, '{"a": "\\ud800"}'):
        (tmp_path / "config.json").write_text(nested)
        with pytest.raises(UserError, match=f"{tmp_path}/config.json (is not JSON|contains half)"):
            published.read_json(tmp_path / "config.json")
    assert workdir.trained_length(tmp_path) is None
    with pytest.raises(UserError, match="is damaged"):
        workdir.read_config(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        load_manifest(tmp_path)
    record = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "chat.json").write_bytes(MARK + json.dumps(record).encode())
    assert read_record(tmp_path / "chat.json") == record
    (tmp_path / "chat.json").write_text(json.dumps(record | {"score": float("nan")}))
    with pytest.raises(UserError, match="is not JSON"):
        read_record(tmp_path / "chat.json")
