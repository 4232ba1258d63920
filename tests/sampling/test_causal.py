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


def test_greedy_is_that_of_transformers(causal_case):
    model, cases = causal_case
    prompt_BT = cases["tokens"][:1, :8].astype(np.int32)
    out_BT, steps_B = generate(model, prompt_BT, GREEDY, KEY, return_steps=True)
    np.testing.assert_array_equal(np.asarray(out_BT)[0, 8:], cases["greedy"].ravel()[-12:])
    np.testing.assert_array_equal(np.asarray(out_BT)[:, :8], prompt_BT)
    assert steps_B.tolist() == [12]


def test_a_row_alone_is_as_in_a_batch(causal_case, rng):
    model, _ = causal_case
    assert_alone_as_in_a_batch(model, rng, GREEDY, (0, 2))  # each length is a program of its own


def test_a_drawn_row_alone_is_as_in_a_batch(llama, rng):
    assert_alone_as_in_a_batch(llama, rng, dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, top_k=50), (2,))


def assert_alone_as_in_a_batch(model, rng, config, rows):
    tokens_BT, real_BT = prompts(rng, (1, 7, 4, 9))
    keys_B = jax.random.split(KEY, 4)
    together_BT = np.asarray(generate(model, tokens_BT, config, keys_B, real_BT))
    np.testing.assert_array_equal(together_BT[:, : tokens_BT.shape[1]], tokens_BT)
    for row in rows:
        alone_BT = np.asarray(generate(model, tokens_BT[row][real_BT[row]][None], config, keys_B[row : row + 1]))
        np.testing.assert_array_equal(alone_BT[0, -12:], together_BT[row, -12:])


def test_the_cache_changes_nothing(causal_case, rng):
    """Each greedy token is the most probable one after all before it, by a pass over the whole text without a cache."""
    model, _ = causal_case
    prompt_BT = rng.integers(3, 300, (2, 8)).astype(np.int32)
    # Row by row: the program of a single prompt of 8 tokens is there already.
    out_BT = np.concatenate([np.asarray(generate(model, row_BT, GREEDY, KEY)) for row_BT in np.split(prompt_BT, 2)])
    logits_BTV = np.asarray(model(out_BT))
    np.testing.assert_array_equal(logits_BTV.argmax(axis=-1)[:, 7:-1], out_BT[:, 8:])


def test_several_devices_write_the_same(make_mesh, rng):
    tokens_BT, real_BT = prompts(rng, (3, 6, 2))
    config = dataclasses.replace(GREEDY, temperature=0.7)
    wanted = generate(llada_jax.load(PARITY_AR / "qwen3")[0], tokens_BT, config, KEY, real_BT)
    model = llada_jax.load(PARITY_AR / "qwen3", mesh=make_mesh(2, 2, 2))[0]
    np.testing.assert_array_equal(np.asarray(generate(model, tokens_BT, config, KEY, real_BT)), np.asarray(wanted))


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
    drawn = np.asarray(generate(llama, np.tile(prompt_T, (200, 1)), narrow, KEY))[:, -1]
    order = np.argsort(-probability_V)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(probability_V[order]), 0.3))]
    assert set(drawn.tolist()) <= set(kept.tolist()) and len(set(drawn.tolist())) > len(kept) / 3


def test_rows_stop_at_their_ends(llama, rng):
    prompt_BT = rng.integers(3, 300, (3, 5)).astype(np.int32)
    free_BT = np.asarray(generate(llama, prompt_BT, GREEDY, KEY))[:, 5:]
    end = int(free_BT[1, 4])  # what row 1 writes as its fifth token ends a text
    config = dataclasses.replace(GREEDY, stop_at_end=True, end_ids=(end,))
    out_BT, steps_B = generate(llama, prompt_BT, config, KEY, return_steps=True)
    for got_T, free_T, steps in zip(np.asarray(out_BT)[:, 5:], free_BT, steps_B.tolist(), strict=True):
        ends = np.flatnonzero((free_T == end) | (free_T == 2))
        kept = 12 if not len(ends) else ends[0] + 1
        np.testing.assert_array_equal(got_T, np.where(np.arange(12) < kept, free_T, 2))
        assert steps == kept, "one pass per token of the row itself, whatever the others take"
    assert len(set(steps_B.tolist())) > 1
    for row in range(3):
        _, alone_B = generate(llama, prompt_BT[row : row + 1], config, KEY, return_steps=True)
        assert alone_B.tolist() == steps_B.tolist()[row : row + 1]


def test_steps_are_those_of_a_whole_call(llama, rng):
    prompt_BT = rng.integers(3, 300, (2, 5)).astype(np.int32)
    config = dataclasses.replace(GREEDY, gen_length=4)
    steps = list(denoise_steps(llama, prompt_BT, config, KEY))
    assert [int((step.tokens_BT == -1).sum(axis=1).max()) for step in steps] == [4, 3, 2, 1, 0]
    assert all(
        (step.new_BT.sum(axis=1) == 1).all() and step.new_BT[:, 4 + i].all() for i, step in enumerate(steps[1:], 1)
    )
    np.testing.assert_array_equal(steps[-1].tokens_BT, np.asarray(generate(llama, prompt_BT, config, KEY)))


def test_each_step_tells_the_probabilities_of_its_tokens(llama, rng):
    """Against the softmax of a pass over the whole text without a cache; a row that has ended predicts nothing."""
    tokens_BT, real_BT = prompts(rng, (1, 6, 4))
    config, width = dataclasses.replace(GREEDY, gen_length=6, temperature=1.0), tokens_BT.shape[1]
    free_BT = np.asarray(generate(llama, tokens_BT, config, KEY, real_BT))[:, width:]
    config = dataclasses.replace(config, stop_at_end=True, end_ids=(int(free_BT[1, 2]),))
    out_BT, steps_B = generate(llama, tokens_BT, config, KEY, real_BT, return_steps=True)
    _, *steps = denoise_steps(llama, tokens_BT, config, KEY, real_BT, alternatives=3)
    np.testing.assert_array_equal(steps[-1].tokens_BT, out_BT)
    for row, count in enumerate(steps_B.tolist()):
        text_T = np.concatenate([tokens_BT[row][real_BT[row]], np.asarray(out_BT)[row, width : width + count]])
        logits_TV = np.asarray(llama(text_T[None]), np.float64)[0, -count - 1 : -1]
        chance_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(axis=-1, keepdims=True)
        for i, step in enumerate(steps):
            told = step.probability_BT[row]
            assert np.flatnonzero(~np.isnan(told)).tolist() == ([width + i] if i < count else [])
            if i >= count:
                continue
            assert told[width + i] == step.score_BT[row, width + i]
            np.testing.assert_allclose(told[width + i], chance_TV[i, text_T[len(text_T) - count + i]], rtol=1e-4)
            np.testing.assert_array_equal(step.likely_BTN[row, width + i], np.argsort(-chance_TV[i, :320])[:3])
            best = np.sort(chance_TV[i])[::-1][:3]
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


def test_one_program_for_all_settings_of_drawing(llama, rng):
    prompt_BT = rng.integers(3, 300, (2, 5)).astype(np.int32)
    config = dataclasses.replace(GREEDY, temperature=0.5, top_p=0.5)
    generate(llama, prompt_BT, config, KEY)
    before = causal.extend._cache_size()
    for changes in ({"temperature": 2.0}, {"top_p": 0.9}):
        generate(llama, prompt_BT, dataclasses.replace(config, **changes), jax.random.key(9))
    assert causal.extend._cache_size() == before
