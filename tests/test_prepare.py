import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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
