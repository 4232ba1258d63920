import json
import os
import subprocess
import sys
from pathlib import Path

from paths import PYTHONPATH, ROOT


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", "llada_jax.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def write_texts(path: Path) -> Path:
    texts = [f"Document {i}: " + "words of many kinds and lengths " * (i % 7 + 1) for i in range(60)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


def test_the_command(tmp_path):
    source = write_texts(tmp_path / "a.jsonl")
    arguments = (f"--input={source}", "--text_key=body", "--train_tokenizer=300", "--sequence_length=32", "--workers=2")
    result = run(*arguments, f"--output={tmp_path / 'set'}")
    assert result.returncode == 0, result.stderr
    assert "held out" in result.stdout
    assert "bytes per token" in result.stdout
    assert "python -m llada_jax.train" in result.stdout
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["sequence_length"] == 32
    again = run(*arguments, f"--output={tmp_path / 'set'}")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "already a prepared set" in again.stderr


def test_conversations(tmp_path):
    """The tokenizer of a text set prepares conversations; the summary states how many answers were kept and removed."""
    text = (f"--input={write_texts(tmp_path / 'a.jsonl')}", "--text_key=body", "--train_tokenizer=300")
    run(*text, "--sequence_length=32", f"--output={tmp_path / 'text'}")
    lines = [{"prompt": f"q {i}", "response": "words " * i} for i in range(30)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (
        "--chat",
        f"--input={tmp_path / 'c.jsonl'}",
        f"--tokenizer={tmp_path / 'text'}",
        "--sequence_length=80",
    )
    result = run(*arguments, f"--output={tmp_path / 'set'}", "--too_long=cut", "--workers=1")
    assert result.returncode == 0, result.stderr
    chat = json.loads((tmp_path / "set" / "manifest.json").read_text())["chat"]
    assert chat["empty"] == 1 and chat["cut"] > 0 and chat["dropped"] == 0
    assert f"0 answers left out, {chat['cut']} cut; without text: 1 left out" in result.stdout
    assert f"--config.init_from={tmp_path / 'text'} --config.data.path={tmp_path / 'set'}" in result.stdout
    output = f"--output={tmp_path / 'other'}"
    for more, words in (
        ((*arguments[:2], output), "--tokenizer is missing"),
        ((*arguments, output, "--text_key=body"), "--text_key has no meaning for --chat"),
        (
            (f"--input={tmp_path / 'a.jsonl'}", "--train_tokenizer=300", output, "--group_key=x"),
            "has no meaning for text",
        ),
    ):
        result = run(*more)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_bad_lines_are_left_out_on_request(tmp_path):
    """The command counts bad lines and lists them; `test_mistakes_take_one_line` has the command that stops at them."""
    source = write_texts(tmp_path / "a.jsonl")
    with source.open("ab") as file:
        file.write(b'{"body": null}\n{"body": "\xff"}\n')
    arguments = (f"--input={source}", "--text_key=body", "--train_tokenizer=300", "--sequence_length=32", "--workers=1")
    result = run(*arguments, f"--output={tmp_path / 'set'}", "--on_error=skip")
    assert result.returncode == 0, result.stderr
    assert f"left out, not UTF-8: 1\n  {source}, line 62: not UTF-8 text: invalid start byte\n" in result.stdout
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert [(each["kind"], each["count"]) for each in manifest["left_out"]] == [
        ('no text under "body"', 1), ("not UTF-8", 1),
    ]  # fmt: skip


def test_mistakes_take_one_line(tmp_path):
    source = write_texts(tmp_path / "a.jsonl")
    output = f"--output={tmp_path / 'set'}"
    for arguments, words in (
        ((output, "--train_tokenizer=300"), "--input"),
        ((f"--input={source}", output), "either tokenizer"),
        ((f"--input={source}", output, "--train_tokenizer=300"), 'no text under the key "text"'),
        ((f"--input={source}", output, "--train_tokenizer=many"), "train_tokenizer"),
        (("--input=/absent/*.txt", output, "--train_tokenizer=300"), "no such file"),
    ):
        result = run(*arguments)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert words in result.stderr
        assert os.listdir(tmp_path) == ["a.jsonl"]
