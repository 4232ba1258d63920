import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import published_folders
import pytest
import replayed
from paths import PARITY
from platforms import ON_CPU

import llada_jax
from llada_jax.model.transformer import merge, split
from llada_jax.sampling import text_completion
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
    for rules, alone in (({}, (1, 2)), ({"cfg_scale": 0.5}, (1,))):  # alone, each is a program of its own
        options = Options(gen_length=24, block_length=4, **rules)
        prompts = [text_completion.encode_prompt(text, ending, tokenizer, options) for text in TEXTS]
        numbers = [5, 9, 2, 2**32 - 1]
        ids = [tokenizer.encode(text, special=True) for text in TEXTS]
        texts = text_completion.complete_ids(ending, tokenizer, ids, options, key, numbers=numbers)
        for i in alone:
            prompt, keys_B = prompts[i], text_completion.row_keys(key, numbers[i : i + 1])
            config = options.sampler(prompt.masks, prompt.gen_length)
            tokens_BT = np.asarray(llada_jax.generate(ending, prompt.ids_T[None], config, keys_B))
            assert texts[i] == text_completion.finished_text(tokens_BT[0], prompt, ending, tokenizer)


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
    for end in (tokenizer.eos_id, tokenizer.eot_id, model.config.eos_id, model.config.eot_id):
        tokens_T[-len(tokenizer.encode("cd")) - 1] = end
        assert text_completion.finished_text(tokens_T, prompt, model, tokenizer) == "ab"
    filled = text_completion.Prompt(np.asarray([*ids, tokenizer.eos_id, *ids], np.int32), 1, 1)
    tokens_T = np.array([*filled.ids_T, tokenizer.eos_id])
    assert text_completion.finished_text(tokens_T, filled, model, tokenizer) == "x = 1\nx = 1\n"


@ON_CPU
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


def test_show_draws_in_a_terminal_and_leaves_stdout_clean(model_folder, loaded, tmp_path):
    """A page that is saved beside it changes neither the drawing nor the output."""
    main_end, terminal_end = pty.openpty()
    command = [sys.executable, "-m", "llada_jax.sample", f"--model={model_folder}", "--prompt=def main"]
    command += ["--gen_length=6", "--block_length=4", "--show"]
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [*command, f"--save_html={tmp_path}/page.html"],
        stdout=subprocess.PIPE,
        stderr=terminal_end,
        env=environment,
        text=True,
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
    assert "░" * 6 in text and "step 6, 6 of 6 tokens" in text
    assert re.search(r"\x1b\[\?25hwrote .*/page\.html \(\d+ kB\)\r\n$", text)
    page = replayed.data((tmp_path / "page.html").read_text())
    assert [sample["completion"] + "\n" for sample in page["samples"]] == [output]
    assert page["settings"] == {"model": str(model_folder), "seed": "0"} and len(page["samples"][0]["counts"]) == 6


@ON_CPU
def test_a_length_that_is_found(model_folder, loaded):
    """The largest length is half of what the model was trained with, and the terminal shows blocks that are in use."""
    common = [f"--model={model_folder}", "--prompt=def main", "--block_length=16", "--commit=threshold"]
    common += ["--commit_bound=0.2"]
    for flag, length in (("--gen_length=auto", "append"), ("--length=daedal", "daedal")):
        done = run(*common, flag)
        options = Options(length=length, gen_length=128, block_length=16, commit="threshold", commit_bound=0.2)
        assert (done.returncode, done.stdout[:-1]) == (
            0, text_completion.complete(*loaded, ["def main"], options, jax.random.key(0))[0],
        ), done.stderr  # fmt: skip


def test_weights_that_are_not_finite(model_folder, tmp_path):
    folder, output = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(model_folder, folder)
    published_folders.spoil(folder)
    done = run(f"--model={folder}", "--prompt=a", f"--output={output}", "--gen_length=4", "--block_length=4")
    assert (done.returncode, done.stdout) == (1, "") and not output.exists()
    *notes, last = done.stderr.splitlines()
    assert last.startswith("error: the model's output is not finite")
    assert all(str(folder) in note for note in notes)  # where the files of this folder disagree


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=MODEL"], "nothing to complete"),
        ([f"--model={PARITY / 'mha'}", "--prompt=a"], "has no tokenizer"),
        (["--model=MODEL", "--prompt=a", "--output=MODEL"], "is a folder; pass the name of a file"),
        (["--model=MODEL", "--prompt=a", "--save_html=/no/a.html"], "--save_html=/no/a.html: there is no folder /no;"),
        (["--model=MODEL", "--prompt=a", "--gen_length=soon"], "flag --gen_length=soon: invalid literal for int()"),
        (["--model=MODEL", "--prompt=a", "--gen_length=auto", "--length=fixed"], "gen_length=auto with length=fixed"),
        (["--model=MODEL", "--prompt=a\udcff"], "is not UTF-8 text: it contains half a character"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model_folder, arguments, words):
    done = run(*[argument.replace("MODEL", str(model_folder)) for argument in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_what_the_tokenizer_puts_in_front_of_a_text(monkeypatch, loaded):
    model, tokenizer = loaded
    encode = lambda text: text_completion.encode_prompt(text, model, tokenizer, Options()).ids_T.tolist()  # noqa: E731
    plain = {text: encode(text) for text in ("def main", "", "a [MASK] b", "<|startoftext|>x")}
    monkeypatch.setattr(tokenizer, "prefix", (tokenizer.bos_id,))
    literal = tokenizer.roles["bos"][1]
    for text in ("def main", "", "a [MASK] b"):
        assert encode(text) == [tokenizer.bos_id, *plain[text]] == encode(literal + text)
    asked = []
    monkeypatch.setattr(text_completion, "complete_ids", lambda m, t, prompts, *_: asked.extend(prompts))
    text_completion.complete(model, tokenizer, ["def main"], Options(), jax.random.key(0))
    assert asked == [[tokenizer.bos_id, *plain["def main"]]]
    # A text that begins behind BOS begins like any text, without the space that some tokenizers put in front.
    prompt = text_completion.Prompt(np.array([tokenizer.bos_id], np.int32), 0, 4)
    tokens_T = np.array([tokenizer.bos_id, *tokenizer.encode("ab")])
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **rest: rest["continuation"])
    assert text_completion.finished_text(tokens_T, prompt, model, tokenizer) is False
