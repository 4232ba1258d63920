"""Tests that transformers reads what `convert` writes: the tokenizer, the chat template, and the special ids."""

import json
from pathlib import Path

import chat_folders
import pytest
from paths import PARITY
from safetensors.numpy import load_file, save_file

from llada_jax.formats.conversion import convert
from llada_jax.text.tokenizer import find_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

USER = {"role": "user", "content": "What is 1 < 2? [MASK]"}
SYSTEM, ANSWER = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "b"}
CHATS = [[USER], [SYSTEM, USER, ANSWER, USER]]


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return pytest.importorskip("transformers", reason="transformers is not installed")


def published(folder: Path, kind: str) -> Path:
    """Writes a published folder with a tokenizer.json, as LLaDA-8B has it, or with a SentencePiece model."""
    folder.mkdir(parents=True)
    if kind == "tokenizer.json":
        chat_folders.make_folder(folder)
        config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mdm_mask|>"}
        config |= {"chat_template": chat_folders.PUBLISHED, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        train_tokenizer([Path(__file__).read_text()], 400, folder)
    for file in (PARITY / "mha").iterdir():
        if file.name == "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
        elif file.suffix == ".safetensors":
            save_file(load_file(file), folder / file.name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece"])
def test_the_tokenizer_of_an_export(transformers, tmp_path, kind):
    source = published(tmp_path / "source", kind)
    convert(source, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "out", "huggingface")
    ours, theirs = find_tokenizer(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in (*chat_folders.TEXTS, "class Queue:\n    def __init__(self):"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text
    if ours.chat_template or (tmp_path / "out" / "chat_template.jinja").exists():
        for chat in CHATS:
            found = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert found == ours.encode_chat(chat)
    assert theirs.eos_token_id == ours.eos_id
    fields, _ = transformers.PretrainedConfig.get_config_dict(str(tmp_path / "out"))
    assert fields == fields | json.loads((tmp_path / "out" / "config.json").read_text())
