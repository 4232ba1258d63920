"""Tests benchmarks/stories.py and stories_table.py: whose stories are continued, how they are judged and counted."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from experiments import imported
from paths import PYTHONPATH, ROOT

import llada_jax
from llada_jax.config import UserError
from llada_jax.data.prepare.held_out import text_hash
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.sampling.settings import check_settings

stories = imported("stories")


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'llada_jax[plots]'")
    return imported("stories_table")


def test_prompts_are_the_beginnings_of_held_out_stories(tmp_path, model_folder):
    corpus = tiny.write_corpus(tmp_path / "text.jsonl", 400)
    inputs = {"tokenizer": str(model_folder), "sequence_length": 32, "validation_fraction": 0.2, "workers": 1}
    manifest = prepare([corpus], tmp_path / "set", progress=False, **inputs)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    held_out = [text for text in texts if text_hash(text) < manifest.validation_below]
    _, tokenizer = llada_jax.load(model_folder)
    encoded = [tokenizer.encode(text) for text in held_out]
    length = sorted(map(len, encoded))[len(encoded) // 2]  # half of the stories are too short
    wanted = {}
    for ids in encoded[1:]:  # in front of the first, no EOS says that it is a beginning
        if len(ids) >= length and tuple(ids[:2]) not in wanted:
            wanted[tuple(ids[:2])] = ids[:length]
    asked = (tmp_path / "set", 512, 2, length - 2)
    rows_NT = stories.first_tokens(*asked, len(wanted))
    assert rows_NT[:, 1:].tolist() == [*wanted.values()] and 1 < len(wanted) < len(encoded) // 2
    assert {*rows_NT[:, 0].tolist()} == {manifest.eos_id}
    with pytest.raises(UserError, match=f"holds out {len(wanted)} stories that are long enough"):
        stories.first_tokens(*asked, len(wanted) + 1)


@pytest.mark.parametrize("name", stories.WAYS)
def test_ways(name):
    """Every way is possible, and the steps of the schedule are those that its name says, in every block."""
    way = stories.WAYS[name]
    config = check_settings(stories.sampler(way, 64, causal=name.startswith(stories.AUTOREGRESSIVE)))
    if "per step" in name:
        assert config.steps == 64 / int(name.split(", ")[1].split()[0])
    assert config.logits_eos_inf and config.gen_length == 64


def test_the_judge_gives_the_exact_likelihood_of_the_continuation(causal_folder):
    model, tokenizer = llada_jax.load(causal_folder)
    found = [stories.Text("the fox sang", " and a child"), stories.Text("a child", " ran home over the river")]
    judged = stories.judged(model, tokenizer, found)
    assert judged["characters"] == [12, 24] and judged["texts"] == [text.continuation for text in found]
    for text, nats in zip(found, judged["nats"], strict=True):
        ids = tokenizer.encode(text.beginning + text.continuation)
        start = len(tokenizer.encode(text.beginning))
        log_p_TV = np.asarray(jax.nn.log_softmax(model(np.array([ids], np.int32))[0].astype(np.float32)))
        wanted = sum(log_p_TV[at - 1, ids[at]] for at in range(start, len(ids)))
        assert nats == pytest.approx(-wanted, abs=2e-3)


def test_words_and_repetition(table):
    text = '"The cat sat," said the cat. The cat sat, said - Tom!'
    assert table.words(text) == "the cat sat said the cat the cat sat said tom".split()
    # Of ten pairs, "the cat" occurs three times, "cat sat" and "sat said" twice.
    assert table.distinct([text], 2) == 6 / 10
    assert table.distinct(["a b c", "b c d"], 2) == 3 / 4  # none reaches from one text into the next
    assert table.repeats(text) and not table.repeats("the cat sat said the cat the cat sat") and not table.repeats("")


def test_intervals_are_those_of_the_mean(table, rng):
    nats_N, characters_N = rng.normal(50, 10, 400), np.full(400, 100.0)
    low, high = table.interval(table.resampled(nats_N, characters_N))
    error = nats_N.std() / 100 / 20
    assert (low, high) == pytest.approx(
        (nats_N.mean() / 100 - 1.96 * error, nats_N.mean() / 100 + 1.96 * error), abs=5e-4
    )


def line(way, batch, nats, seconds=1.0, passes=None, texts=("a b c d", "a b c e")):
    work = {"tokens": 128, "passes": passes, "seconds": seconds, "cpu_seconds": 9.0} if passes else {}
    return {"way": way, "batch": batch, "nats": nats, "characters": [50, 50], "texts": list(texts)} | work


def test_table_and_picture(table, tmp_path, monkeypatch, capsys):
    lines = [line(stories.EXACT, 0, [50.0, 60.0], 4.0, 128), line(stories.EXACT, 1, [9.0, 9.0], 4.0, 128)]
    lines += [
        line("factor", 0, [55.0, 65.0], 1.0, 32, ["a b c d e a b c d", "a b"]),
        line(stories.TRUE, 0, [20.0, 20.0]),
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    for name in ("a.svg", "b.svg"):
        flags = [f"--input={tmp_path / 'lines.jsonl'}", f"--output={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", ["stories_table.py", *flags])
        table.main()
    rows = capsys.readouterr().out.splitlines()[:7]
    # The second batch is not counted, because only one way has it.
    assert rows[0] == "2 prompts each" and rows[4:] == [
        "| the stories themselves |  |  | 0.400 (0.400 to 0.400) | -0.700 (-0.800 to -0.600) | 67 % | 75 % | 0 % |",
        "| schedule, 1 per step | 1.00 | 1.00 | 1.100 (1.000 to 1.200) |  | 67 % | 75 % | 0 % |",
        "| factor | 4.00 | 4.00 | 1.200 (1.100 to 1.300) | +0.100 (+0.100 to +0.100) | 56 % | 71 % | 50 % |",
    ]
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.slow
def test_both_models_are_trained_and_continue_stories(tmp_path):
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}

    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    corpus = tiny.write_corpus(tmp_path / "text.jsonl")
    prepare([corpus], tmp_path / "set", train_tokenizer=320, sequence_length=32, workers=1, progress=False)
    small = {"data.path": tmp_path / "set", "sequence_length": 32, "steps": 2, "batch_size": 8, "model.layers": 1}
    small |= {"sampling.prompts": "()", "validation.rows": 0, "optimizer.schedule": "((0, 1.0),)"}
    for name in ("llada", "arm"):
        flags = [f"--config.{key}={value}" for key, value in small.items()]
        config = f"--config=benchmarks/stories_config.py:{name}"
        done = call("-m", "llada_jax.train", config, f"--workdir={tmp_path / name}", *flags)
        assert done.returncode == 0, done.stderr
    flags = [f"--model={tmp_path / 'llada'}", f"--causal={tmp_path / 'arm'}", f"--judge={tmp_path / 'arm'}"]
    flags += [f"--data={tmp_path / 'set'}", "--count=4", "--batch_size=2", "--prompt_length=3", "--gen_length=8"]
    output = tmp_path / "out.jsonl"
    flags += [f"--output={output}", "--ways", stories.TRUE, stories.EXACT, f"{stories.AUTOREGRESSIVE}, greedy"]
    done = call("benchmarks/stories.py", *flags)
    assert done.returncode == 0, done.stderr
    lines = output.read_text().splitlines()
    found = [json.loads(each) for each in lines]
    assert [(each["batch"], each["way"]) for each in found] == [(n, way) for n in (0, 1) for way in flags[-3:]]
    for each in found:
        assert len(each["texts"]) == len(each["nats"]) == 2 and min(each["nats"]) > 0
        assert each["way"] == stories.TRUE or (each["passes"], each["tokens"]) == (16, 16)
    output.write_text("\n".join(lines[:4]) + "\n")  # as if the run had been ended
    assert call("benchmarks/stories.py", *flags).returncode == 0
    again = [json.loads(each) for each in output.read_text().splitlines()]
    assert [each["texts"] for each in again] == [each["texts"] for each in found]
    done = call("benchmarks/stories.py", *flags, "--seed=1")
    assert done.returncode == 2 and "has lines with another seed, 0: name another file" in done.stderr
