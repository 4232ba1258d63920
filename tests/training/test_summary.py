"""Tests what a run prints: the first row as the train step sees it, the samples, the yardsticks and the report."""

import lzma
import math

import jax
import numpy as np
import pytest

from llada_jax.config import Config, ModelConfig, SamplingConfig
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.model.transformer import split
from llada_jax.training import samples, summary


class Letters:
    """A tokenizer of single letters: ids 0..25 are a..z, 26 is EOS, 27 is BOS, and 28 is MASK."""

    mask_id, bos_id, eos_id = 28, 27, 26

    def encode(self, text, special=False):
        return list(text)

    def decode(self, ids, skip_special=False, continuation=False):
        special = {26: "<eos>", 27: "<bos>", 28: "[MASK]"}
        return "".join(chr(97 + i) if i < 26 else "" if skip_special else special[i] for i in map(int, ids))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_first_batch_is_what_the_step_sees(make_mesh, sizes):
    config = Config(seed=3, batch_size=8, sequence_length=20, model=ModelConfig(mask_id=28))
    tokens = (np.arange(20) + np.arange(8)[:, None]).astype(np.int32) % 26
    length = np.full(8, 14, np.int32)
    device_mesh = make_mesh(*sizes)
    with jax.set_mesh(device_mesh):
        batch = mesh.place_batch({"tokens": tokens, "length": length}, device_mesh, 8)
        text = summary.first_batch(config, batch, Letters(), step=6)
    noisy = forward.pretrain(
        forward.step_key(3, 6),
        {"tokens": tokens, "length": length},
        np.arange(8, dtype=np.int32),
        config.diffusion,
        28,
    )
    mask = np.asarray(noisy.mask_BT)[0]
    masked = "".join("[MASK]" if m else chr(97 + i) for i, m in zip(range(14), mask, strict=False))
    head, clean, corrupted = text.split("\n")
    eps = config.diffusion.eps
    t = (float(noisy.p_mask_B[0]) - eps) / (1 - eps)
    assert head == f"first row of step 6: 14 tokens, t = {t:.3f}, {mask.sum()} masked"
    assert clean == "  text:   'abcdefghijklmn'" and corrupted == f"  masked: {masked!r}"
    with jax.set_mesh(device_mesh):
        short = summary.first_batch(config, batch, Letters(), step=6, characters=5)
    assert "'abcde...'" in short


def test_yardsticks_on_known_bytes():
    """Eight equally frequent letters take 3 bits each, and xz -9 gives its size for the same text.

    Tokens beyond the length of a row do not count.
    """
    tokens = np.stack([np.arange(16) % 8, np.r_[np.arange(8), np.full(8, 9)]]).astype(np.int32)
    rows = HeldOut(tokens, np.array([16, 8], np.int32), np.zeros(2, np.int32), np.array([16, 8], np.int64))
    marks = summary.yardsticks(rows, Letters())
    assert marks["unigram_bits_per_byte"] == pytest.approx(3)
    text = b"abcdefgh" * 3
    assert marks["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / 24)


def test_yardsticks_count_eos_in_bits_but_not_in_bytes():
    rows = HeldOut(np.array([[0, 0, 0, 26]], np.int32), *(np.array([n]) for n in (4, 0, 3)))
    marks = summary.yardsticks(rows, Letters())
    entropy = 4 * (0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert marks["unigram_bits_per_byte"] == pytest.approx(entropy / 3)
    assert marks["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(b"aaa", preset=9)) / 3)


def test_final_report_names_the_run_and_its_marks():
    text = summary.final_report("runs/x", 1.23456, {"unigram_bits_per_byte": 3.5, "xz_bits_per_byte": 1.75}, 1234567)
    for part in ("1.235", "3.500", "1.750", "1,234,567", "--model=runs/x"):
        assert part in text
    assert "bound (Eq. 6)" in text and "[MASK]" in text
    text = summary.final_report("runs/x", 1.23456, {"unigram_bits_per_byte": 3.5, "xz_bits_per_byte": 1.75}, 9, True)
    assert "exact likelihood" in text
    # A causal model refuses these.
    assert "Eq. 6" not in text and "[MASK]" not in text and "block_length" not in text


def test_show_samples():
    shown = samples.show_samples([("ab[MASK][MASK]d", "abccd"), ("def ", "def f():\n  pass")])
    assert shown == "infilling of 'ab__d':\n  | abccd\ncompletion of 'def ':\n  | def f():\n  |   pass"


def test_samples_up_to_the_step_of_a_resume_are_kept(tmp_path):
    """A run writes the samples of a step before its checkpoint, so they stay if it resumes there."""
    path = tmp_path / "samples.txt"
    samples.drop_samples(path, 5)
    assert not path.exists()
    for step in (5, 10, 15):
        samples.append_samples(path, step, samples.show_samples([("a", f"a\n--- step 1\n{step}")]))
    text = path.read_text()
    samples.drop_samples(path, 10)
    assert path.read_text() == text[: text.index("--- step 15")] and text.count("--- step 1\n") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["samples.txt"]


def test_sample_texts(toy, make_mesh, monkeypatch):
    """A prompt with [MASK] is filled in, and any other prompt is continued.

    Both results contain the prompt. The key depends on the seed alone.
    """
    asked = []

    def complete(model, tokenizer, prompts, options, key):
        asked.append((prompts, options, key))
        return ["whole text" if options.gen_length == 0 else " more"]

    monkeypatch.setattr(samples, "complete_ids", complete)
    config = SamplingConfig(prompts=("a [MASK] b", "start"), steps=3, gen_length=9, block_length=4, temperature=0.5)
    graphdef, params = split(toy.model)
    texts = samples.sample_texts(graphdef, params, Letters(), config, seed=2)
    assert texts == [("a [MASK] b", "whole text"), ("start", "start more")]
    (first, options, key), (second, more, _) = asked
    assert (first, second) == ([list("a [MASK] b")], [list("start")])
    assert (options.gen_length, more.gen_length) == (0, 9)
    assert (options.steps, options.block_length, options.temperature) == (3, 4, 0.5)
    assert key == jax.random.key(2)
