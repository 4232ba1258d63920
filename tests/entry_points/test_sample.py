import dataclasses
import io
import json
import os
import pty
import subprocess
import sys

import jax
import numpy as np
import pytest
from paths import PARITY

import llada_jax
from llada_jax.model.transformer import merge, split
from llada_jax.sampling import terminal, text_completion
from llada_jax.sampling.text_completion import Options


def run(*arguments, **options):
    command = [sys.executable, "-m", "llada_jax.sample", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


TEXTS = ["def main", "return [MASK][MASK] + 1", "x", "import jax\nimport numpy as np\n"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_completion_does_not_depend_on_the_batch(loaded, temperature):
    options, key = Options(gen_length=6, block_length=4, temperature=temperature), jax.random.key(0)
    together = text_completion.complete(*loaded, TEXTS, options, key)
    done = []
    assert text_completion.complete(*loaded, TEXTS, options, key, batch_size=3, report=done.append) == together
    assert done == [3, 4]


def test_stopping_at_the_end_changes_no_text(loaded):
    model, tokenizer = loaded
    options, key = Options(gen_length=24, block_length=4, confidence_eos_eot_inf=True), jax.random.key(0)
    (batch,) = text_completion.make_batches(
        model, [text_completion.encode_prompt(text, model, tokenizer, options) for text in TEXTS[::2]], options, 8
    )
    assert batch.config.stop_at_end and batch.config.confidence_eos_eot_inf
    whole = dataclasses.replace(batch.config, stop_at_end=False, confidence_eos_eot_inf=False)
    tokens_BT = np.asarray(llada_jax.generate(model, batch.prompt_BT, whole, key, batch.real_BT))
    liked = int(tokens_BT[0, -20])  # stands in the second of six blocks and becomes EOS below
    ending = merge(*split(model))
    ending.config = dataclasses.replace(model.config, eos_id=liked)
    for rules in ({}, {"cfg_scale": 0.5}):
        options = Options(gen_length=24, block_length=4, **rules)
        prompts = [text_completion.encode_prompt(text, ending, tokenizer, options) for text in TEXTS]
        numbers = [5, 9, 2, 2**32 - 1]
        ids = [tokenizer.encode(text, special=True) for text in TEXTS]
        texts = text_completion.complete_ids(ending, tokenizer, ids, options, key, numbers=numbers)
        for prompt, number, text in zip(prompts, numbers, texts, strict=True):
            config = options.sampler(prompt.masks, prompt.gen_length)
            keys_B = text_completion.row_keys(key, [number])
            tokens_BT = np.asarray(llada_jax.generate(ending, prompt.ids_T[None], config, keys_B))
            assert text == text_completion.finished_text(tokens_BT[0], prompt, ending, tokenizer)


def test_what_is_left_open_depends_on_the_prompt(loaded):
    model, tokenizer = loaded
    fill = text_completion.encode_prompt("a [MASK] b", model, tokenizer, Options())
    assert fill.masks == 1 and fill.gen_length == 0 and 511 in fill.ids_T and tokenizer.mask_id == 511
    assert text_completion.encode_prompt("a", model, tokenizer, Options()).gen_length == 64
    assert text_completion.encode_prompt("a [MASK]", model, tokenizer, Options(gen_length=3)).gen_length == 3
    assert Options(block_length=32).sampler(3, 64).steps == 96  # so no step unmasks more than one token
    assert Options(steps=7).sampler(3, 64).steps == 7


def test_text_ends_at_eos_and_infilling_keeps_the_rest(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("x = 1\n")
    prompt = text_completion.Prompt(np.asarray(ids, np.int32), 0, 4)
    tokens_T = np.array([*ids, *tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("cd")])
    assert text_completion.finished_text(tokens_T, prompt, model, tokenizer) == "ab"
    tokens_T[-len(tokenizer.encode("cd")) - 1] = model.config.eos_id
    assert text_completion.finished_text(tokens_T, prompt, model, tokenizer) == "ab"
    filled = text_completion.Prompt(np.asarray([*ids, tokenizer.eos_id, *ids], np.int32), 1, 1)
    tokens_T = np.array([*filled.ids_T, tokenizer.eos_id])
    assert text_completion.finished_text(tokens_T, filled, model, tokenizer) == "x = 1\nx = 1\n"


def test_many_prompts_into_a_file(model_folder, loaded, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n\n" for i, text in enumerate(TEXTS)))
    flags = [f"--model={model_folder}", f"--prompts={source}", f"--output={target}", "--temperature=0.8", "--seed=3"]
    flags += ["--cfg_scale=0.5", "--logits_eos_inf", "--confidence_eos_eot_inf"]
    many = run(*flags, "--gen_length=6", "--block_length=4", "--batch_size=3", "--show")
    assert many.returncode == 0 and many.stdout == "", many.stderr
    assert "\x1b" not in many.stderr, "nothing may be drawn, because stderr is not a terminal"
    records = [json.loads(line) for line in target.read_text().splitlines()]
    rules = {"cfg_scale": 0.5, "logits_eos_inf": True, "confidence_eos_eot_inf": True}
    options = Options(gen_length=6, block_length=4, temperature=0.8, **rules)
    expected = text_completion.complete(*loaded, TEXTS, options, jax.random.key(3))
    pairs = zip(TEXTS, expected, strict=True)
    assert records == [{"prompt": text, "id": i, "completion": done} for i, (text, done) in enumerate(pairs)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_show_draws_in_a_terminal_and_leaves_stdout_clean(model_folder, loaded):
    main_end, terminal_end = pty.openpty()
    command = [sys.executable, "-m", "llada_jax.sample", f"--model={model_folder}", "--prompt=def main"]
    command += ["--gen_length=6", "--block_length=4"]
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [*command, "--show"], stdout=subprocess.PIPE, stderr=terminal_end, env=environment, text=True
    )
    os.close(terminal_end)
    drawn = b""
    try:
        while part := os.read(main_end, 4096):
            drawn += part
    except OSError:  # the program has closed its end
        pass
    output = child.stdout.read()
    assert child.wait() == 0, drawn.decode()
    options = Options(gen_length=6, block_length=4)
    assert output == text_completion.complete(*loaded, ["def main"], options, jax.random.key(0))[0] + "\n"
    text = drawn.decode()
    assert "░" * 6 in text and "step 6, 6 of 6 tokens" in text and text.endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=MODEL"], "nothing to complete"),
        ([f"--model={PARITY / 'mha'}", "--prompt=a"], "has no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model_folder, arguments, words):
    done = run(*[argument.replace("MODEL", str(model_folder)) for argument in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1


def text_of(line):
    return "".join(character for character, _ in line)


def test_lines_fit_the_terminal():
    lines = terminal.lay_out([("ab\tc", "text"), ("漢字漢", "new"), ("e\u0301f\ng", "text")], 8)
    assert [text_of(line) for line in lines] == ["ab  c漢", "字漢e\u0301f", "g"]
    assert terminal.lay_out([("x" * 17, "text")], 8)[2] == [("x", "text")]
    hostile = terminal.lay_out([("a\x1b[2Jb\r\x07\u202ec", "text")], 20)
    assert [text_of(line) for line in hostile] == ["a\ufffd[2Jb\ufffdc"]


def test_what_happens_is_visible():
    lines = [[(str(i), "new" if i == 30 else "text")] for i in range(50)]
    shown = [text_of(line) for line in terminal.visible(lines, 10)]
    assert len(shown) == 10 and "30" in shown
    assert terminal.visible(lines[:10], 10) == lines[:10]
    masks = [[(str(i), "mask" if i > 5 else "text")] for i in range(50)]
    assert "6" in [text_of(line) for line in terminal.visible(masks, 10)]


def test_spans_say_what_is_what(loaded):
    _, tokenizer = loaded
    ids = tokenizer.encode("def main(x)")
    tokens_T = np.array([*ids, 511, 511, *tokenizer.encode(" return"), tokenizer.eos_id])
    given_T = np.arange(len(tokens_T)) < len(ids)
    new_T = np.arange(len(tokens_T)) == len(ids) + 2
    drawn = terminal.spans(tokens_T, given_T, new_T, 511, tokenizer, "░")
    assert drawn[:2] == [("def main(x)", "prompt"), ("░░", "mask")] and drawn[2][1] == "new"
    assert "".join(text for text, _ in drawn) == "def main(x)░░ return"


def test_a_frame_replaces_the_one_before():
    class Stream(io.StringIO):
        encoding = "ascii"

        def fileno(self):
            raise OSError

    with terminal.Screen(stream := Stream()) as screen:
        assert screen.mask == "_"
        screen.draw([("a\nb\nc", "text"), ("_", "mask")], "step 1")
        stream.truncate(0)
        screen.draw([("d", "new")], "step 2")
        assert stream.getvalue().lstrip("\0").startswith("\x1b[4F\x1b[J\x1b[0m\x1b[30;42md\x1b[0m\n")
        screen.finish([("done é", "text")])
    assert stream.getvalue().endswith("\x1b[2F\x1b[Jdone ?\n\x1b[?25h")
