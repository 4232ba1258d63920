"""Tests the sampler of causal models against transformers, and against plain passes over the whole text."""

import dataclasses

import jax
import numpy as np
import pytest
from paths import PARITY_AR

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.sampling import causal, warming
from llada_jax.sampling.sampler import denoise_steps, generate

GREEDY = SamplerConfig(gen_length=12)
KEY = jax.random.key(3)


def prompts(rng, lengths):
    """Returns prompts of these lengths, padded in front, behind, or on both sides."""
    width = max(lengths) + 2
    tokens_BT, real_BT = rng.integers(3, 300, (len(lengths), width)), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        first = (0, width - length, (width - length) // 2)[row % 3]
        real_BT[row, first : first + length] = True
    return tokens_BT.astype(np.int32), real_BT


LENGTHS = (8, 1, 7, 4)


@pytest.fixture(scope="module")
def batch(causal_case):
    """Returns a model, its cases, prompts of these lengths, padded, of which transformers continued the first.

    Most tests use prompts of this shape, so that they share the programs.
    """
    model, cases = causal_case
    tokens_BT, real_BT = prompts(np.random.default_rng(0), LENGTHS)
    tokens_BT[0, real_BT[0]] = cases["tokens"][0, :8]
    return model, cases, tokens_BT, real_BT


def test_greedy_is_that_of_transformers(batch):
    model, cases, tokens_BT, real_BT = batch
    out_BT, steps_B = generate(model, tokens_BT, GREEDY, KEY, real_BT, return_steps=True)
    np.testing.assert_array_equal(np.asarray(out_BT)[0, -12:], cases["greedy"].ravel()[-12:])
    np.testing.assert_array_equal(np.asarray(out_BT)[:, :-12], tokens_BT)
    assert steps_B.tolist() == [12] * 4


def texts(model, tokens_BT, real_BT, written_BG) -> tuple[list[int], np.ndarray]:
    """Returns the lengths of the prompts, and the logits (B, T, V) of a pass over each whole text, without a cache."""
    texts = [[*tokens_BT[i][real_BT[i]], *written_BG[i]] for i in range(len(tokens_BT))]
    padded_BT = np.array([text + [0] * (max(map(len, texts)) - len(text)) for text in texts], np.int32)
    return real_BT.sum(axis=1).tolist(), np.asarray(model(padded_BT), np.float64)


def test_neither_the_cache_nor_other_rows_change_anything(batch):
    """Each greedy token is the most probable one after all before it, by a pass over the text of the row alone."""
    model, _, tokens_BT, real_BT = batch
    written_BG = np.asarray(generate(model, tokens_BT, GREEDY, KEY, real_BT))[:, -12:]
    lengths, logits_BTV = texts(model, tokens_BT, real_BT, written_BG)
    for row, length in enumerate(lengths):
        best_G = logits_BTV[row, length - 1 : length + 11].argmax(axis=-1)
        np.testing.assert_array_equal(best_G, written_BG[row])


DRAWN = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, top_k=50)


@pytest.fixture(scope="module")
def drawn(llama):
    """Returns padded prompts, which of their tokens are real, and what is drawn after them."""
    tokens_BT, real_BT = prompts(np.random.default_rng(0), LENGTHS)
    return tokens_BT, real_BT, np.asarray(generate(llama, tokens_BT, DRAWN, KEY, real_BT))[:, -12:]


def test_a_drawn_row_alone_is_as_in_a_batch(llama, drawn):
    tokens_BT, real_BT, _ = drawn
    keys_B = jax.random.split(KEY, 4)
    together_BT = np.asarray(generate(llama, tokens_BT, DRAWN, keys_B, real_BT))
    alone_BT = np.asarray(generate(llama, tokens_BT[2][real_BT[2]][None], DRAWN, keys_B[2:3]))
    np.testing.assert_array_equal(alone_BT[0, -12:], together_BT[2, -12:])


def test_several_devices_write_the_same(make_mesh, drawn):
    tokens_BT, real_BT, written_BG = drawn
    model = llada_jax.load(PARITY_AR / "llama", mesh=make_mesh(2, 2, 2))[0]
    np.testing.assert_array_equal(np.asarray(generate(model, tokens_BT, DRAWN, KEY, real_BT))[:, -12:], written_BG)


def test_tokens_are_drawn_from_the_models_distribution(llama):
    """Frequencies of the first token, drawn 2,000 times, against the probabilities of the logits over a temperature."""
    prompt_T = np.array([5, 6, 7], np.int32)
    logits_V = np.asarray(llama(prompt_T[None]), np.float64)[0, -1] / 0.8
    probability_V = np.exp(logits_V - logits_V.max())
    probability_V /= probability_V.sum()
    count = 2000
    config = SamplerConfig(gen_length=1, temperature=0.8)
    drawn = np.asarray(generate(llama, np.tile(prompt_T, (count, 1)), config, KEY))[:, -1]
    found_V = np.bincount(drawn, minlength=320) / count
    assert np.all(np.abs(found_V - probability_V) < 5 * np.sqrt(probability_V / count) + 3 / count)
    narrow = dataclasses.replace(config, top_p=0.3)
    drawn = np.asarray(generate(llama, np.tile(prompt_T, (count, 1)), narrow, KEY))[:, -1]
    order = np.argsort(-probability_V)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(probability_V[order]), 0.3))]
    assert set(drawn.tolist()) <= set(kept.tolist()) and len(set(drawn.tolist())) > len(kept) / 3


@pytest.fixture(scope="module")
def stopping(drawn):
    """Returns settings with which what row 1 draws as its fifth token ends a text."""
    return dataclasses.replace(DRAWN, stop_at_end=True, end_ids=(int(drawn[2][1, 4]),))


def test_rows_stop_at_their_ends(llama, drawn, stopping):
    tokens_BT, real_BT, free_BG = drawn
    out_BT, steps_B = generate(llama, tokens_BT, stopping, KEY, real_BT, return_steps=True)
    for got_G, free_G, steps in zip(np.asarray(out_BT)[:, -12:], free_BG, steps_B.tolist(), strict=True):
        ends = np.flatnonzero((free_G == stopping.end_ids[0]) | (free_G == 2))
        kept = 12 if not len(ends) else ends[0] + 1
        np.testing.assert_array_equal(got_G, np.where(np.arange(12) < kept, free_G, 2))
        assert steps == kept, "one pass per token of the row itself, whatever the others take"
    assert len(set(steps_B.tolist())) > 1


def test_steps_are_those_of_a_whole_call(llama, drawn):
    tokens_BT, real_BT, written_BG = drawn
    width = tokens_BT.shape[1]
    steps = list(denoise_steps(llama, tokens_BT, DRAWN, KEY, real_BT))
    assert [int((step.tokens_BT == -1).sum(axis=1).max()) for step in steps] == list(range(12, -1, -1))
    for i, step in enumerate(steps[1:]):
        assert (step.new_BT.sum(axis=1) == 1).all() and step.new_BT[:, width + i].all()
    np.testing.assert_array_equal(steps[-1].tokens_BT, np.concatenate([tokens_BT, written_BG], axis=1))


def test_each_step_tells_the_probabilities_of_its_tokens(llama, drawn, stopping):
    """Against the softmax of a pass over the whole text without a cache; a row that has ended predicts nothing."""
    tokens_BT, real_BT, _ = drawn
    width = tokens_BT.shape[1]
    out_BT, steps_B = generate(llama, tokens_BT, stopping, KEY, real_BT, return_steps=True)
    _, *steps = denoise_steps(llama, tokens_BT, stopping, KEY, real_BT, alternatives=3)
    np.testing.assert_array_equal(steps[-1].tokens_BT, out_BT)
    written_BG = np.asarray(out_BT)[:, width:]
    lengths, logits_BTV = texts(llama, tokens_BT, real_BT, written_BG)
    for row, count in enumerate(steps_B.tolist()):
        logits_GV = logits_BTV[row, lengths[row] - 1 :]
        chance_GV = np.exp(logits_GV) / np.exp(logits_GV).sum(axis=-1, keepdims=True)
        for i, step in enumerate(steps):
            told = step.probability_BT[row]
            assert np.flatnonzero(~np.isnan(told)).tolist() == ([width + i] if i < count else [])
            if i >= count:
                continue
            assert told[width + i] == step.score_BT[row, width + i]
            np.testing.assert_allclose(told[width + i], chance_GV[i, written_BG[row, i]], rtol=1e-4)
            np.testing.assert_array_equal(step.likely_BTN[row, width + i], np.argsort(-chance_GV[i, :320])[:3])
            best = np.sort(chance_GV[i])[::-1][:3]
            np.testing.assert_allclose(step.likely_probability_BTN[row, width + i], best, rtol=1e-4)


def test_an_empty_prompt_follows_eos(llama):
    wanted_BT = np.asarray(generate(llama, np.array([[2]], np.int32), GREEDY, KEY))
    for prompt_BT, real_BT in ((np.zeros((1, 0), np.int32), None), (np.array([[9]], np.int32), np.zeros((1, 1), bool))):
        out_BT = np.asarray(generate(llama, prompt_BT, GREEDY, KEY, real_BT))
        np.testing.assert_array_equal(out_BT[:, prompt_BT.shape[1] :], wanted_BT[:, 1:])
    nothing = generate(llama, np.array([[2, 3]], np.int32), SamplerConfig(gen_length=0), KEY)
    assert nothing.tolist() == [[2, 3]]
    qwen = llada_jax.load(PARITY_AR / "qwen2")[0]
    with pytest.raises(UserError, match="a prompt is empty, and the model does not say which token is EOS"):
        generate(qwen, np.zeros((1, 0), np.int32), GREEDY, KEY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 3}, "steps=3: this model is causal"),
        ({"block_length": 8}, "block_length=8: this model is causal"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0: this model is causal"),
        ({"commit": "threshold"}, "commit=threshold: this model is causal"),
        ({"length": "append", "eos_id": 2}, r"length=append \(or gen_length=auto\): this model is causal"),
        ({"cache": "dual"}, "cache=dual: this model is causal"),
        ({"remasking": "random"}, "remasking=random: this model is causal"),
        ({"confidence_eos_eot_inf": True}, "confidence_eos_eot_inf=True: this model is causal"),
        ({"mask_id": 7}, r"the prompt contains MASK \(id 7\)"),
        ({"top_k": 3}, "top_k has no effect at temperature 0"),
    ],
)
def test_what_means_nothing_is_refused(llama, changes, words):
    with pytest.raises(UserError, match=words):
        generate(llama, np.array([[5, 7]], np.int32), dataclasses.replace(GREEDY, **changes), KEY)


def test_warmed_up_nothing_more_is_compiled(llama):
    config = dataclasses.replace(GREEDY, gen_length=7)
    warming.warm_up(llama, config, [24])
    before = causal.extend._cache_size()
    prompt_BT, real_BT = warming.pad([[5, 6, 7]], [24])
    generate(llama, prompt_BT, config, KEY, real_BT)
    assert causal.extend._cache_size() == before


def test_one_program_for_all_settings_of_drawing(llama, drawn):
    tokens_BT, real_BT, _ = drawn
    before = causal.extend._cache_size()
    for changes in ({"temperature": 2.0}, {"top_p": 0.8}, {"top_k": 7}):
        generate(llama, tokens_BT, dataclasses.replace(DRAWN, **changes), jax.random.key(9), real_BT)
    assert causal.extend._cache_size() == before
