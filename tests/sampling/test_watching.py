"""Tests what a step that is watched tells, and how it is recorded."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import replayed

from llada_jax.config import UserError
from llada_jax.model.transformer import merge, split
from llada_jax.sampling import replay, watching
from llada_jax.sampling.recording import Change, Recorder
from llada_jax.sampling.sampler import denoise_steps, generate
from llada_jax.sampling.text_completion import Options, complete, encode_prompt, make_batches, row_keys
from llada_jax.sampling.watching import Step

TEXTS = ["def main", "return [MASK][MASK] + 1"]
OPTIONS = Options(gen_length=6, block_length=4, temperature=0.7, cfg_scale=0.5, remasking="margin")


@pytest.fixture(scope="module")
def batch(loaded):
    """Returns a batch of a prompt to continue and a shorter one to fill in."""
    model, tokenizer = loaded
    prompts = [encode_prompt(text, model, tokenizer, OPTIONS) for text in TEXTS]
    (batch,) = make_batches(model, prompts, OPTIONS, 8)
    return batch


def test_the_probabilities_are_those_of_the_model(loaded, batch):
    """They are compared with a softmax over all logits of the canvas before each step, in float64."""
    model, _ = loaded
    key = row_keys(jax.random.key(3), batch.rows)
    arguments = (model, batch.prompt_BT, batch.config, key, batch.real_BT)
    steps = list(denoise_steps(*arguments, alternatives=3))
    plain = list(denoise_steps(*arguments))
    for one, other in zip(steps, plain, strict=True):
        np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)
        np.testing.assert_array_equal(one.new_BT, other.new_BT)
        assert other.score_BT is None and other.likely_BTN is None
    np.testing.assert_array_equal(steps[-1].tokens_BT, generate(*arguments))
    mask_id, seen = model.config.mask_id, 0
    allowed_V = np.arange(model.config.vocab_size) < model.config.token_count
    allowed_V[mask_id] = False
    for first, end in model.config.holes:
        allowed_V[first:end] = False
    for before, after in itertools.pairwise(steps):
        predicted_BT = np.isfinite(after.score_BT)
        assert (predicted_BT >= after.new_BT).all() and (before.tokens_BT[predicted_BT] == mask_id).all()
        np.testing.assert_array_equal(predicted_BT, np.isfinite(after.probability_BT))
        np.testing.assert_array_equal(predicted_BT, after.likely_BTN[..., 0] >= 0)
        for row, real_T in enumerate(batch.real_BT):
            start = int(np.sum(~real_T))
            canvas_T, given_T = before.tokens_BT[row, start:], steps[0].tokens_BT[row, start:] != mask_id
            hidden_T = np.where(given_T, mask_id, canvas_T).astype(np.int32)
            with_TV, without_TV = (np.asarray(model(x_T[None])[0], np.float64) for x_T in (canvas_T, hidden_T))
            logits_TV = without_TV + 1.5 * (with_TV - without_TV)  # Eq. 16
            weight_TV = np.exp(logits_TV - logits_TV.max(axis=-1, keepdims=True))
            probability_TV = weight_TV / weight_TV.sum(axis=-1, keepdims=True)
            for at in np.flatnonzero(after.new_BT[row, start:]):
                token = after.tokens_BT[row, start + at]
                expected = probability_TV[at, token]
                assert after.probability_BT[row, start + at] == pytest.approx(expected, rel=1e-4)
                may = [i for i in np.argsort(-probability_TV[at]) if allowed_V[i]]
                margin = probability_TV[at, may[0]] - probability_TV[at, may[1]]
                assert after.score_BT[row, start + at] == pytest.approx(margin, abs=1e-5)
                likely = after.likely_BTN[row, start + at]
                np.testing.assert_allclose(probability_TV[at, likely], probability_TV[at, may[:3]], rtol=1e-4)
                np.testing.assert_allclose(
                    after.likely_probability_BTN[row, start + at], probability_TV[at, likely], rtol=1e-4
                )
                seen += 1
    assert seen == (batch.prompt_BT[batch.real_BT] == mask_id).sum() + 12


def test_without_alternatives_and_with_too_many(loaded, batch):
    model, key = loaded[0], row_keys(jax.random.key(3), batch.rows)
    for wrong in (-1, 512):
        with pytest.raises(UserError, match=f"alternatives={wrong}: it must be at least 0 and below the vocabulary"):
            next(denoise_steps(model, batch.prompt_BT, batch.config, key, batch.real_BT, alternatives=wrong))
    logits_BCV = np.log([[[1.0, 2, 3, 4]]], dtype=np.float32)
    probability_BC, likely_BCN, likely_probability_BCN = watching.likeliest(
        logits_BCV, np.array([[2]]), np.ones(4, bool), 0
    )
    assert probability_BC.tolist() == [[pytest.approx(0.3)]]
    assert likely_BCN.shape == likely_probability_BCN.shape == (1, 1, 0)


@pytest.mark.slow
def test_a_split_vocabulary_has_the_same_probabilities(loaded, make_mesh, model_folder, batch):
    import llada_jax

    model = llada_jax.load(model_folder, mesh=make_mesh(1, 1, 2))[0]
    key = row_keys(jax.random.key(3), batch.rows)
    one, split = (
        list(itertools.islice(denoise_steps(m, batch.prompt_BT, batch.config, key, batch.real_BT, alternatives=3), 3))
        for m in (loaded[0], model)
    )
    for a, b in zip(one[1:], split[1:], strict=True):
        np.testing.assert_array_equal(a.likely_BTN, b.likely_BTN)
        np.testing.assert_allclose(a.likely_probability_BTN, b.likely_probability_BTN, rtol=1e-4)


@pytest.mark.slow
def test_a_cache_has_the_probabilities_of_its_own_passes(loaded, batch):
    """Where the cache is computed anew at every step they are those without it, and else others."""
    model, key = loaded[0], row_keys(jax.random.key(3), batch.rows)
    plain = dataclasses.replace(batch.config, temperature=0.0, top_k=0)
    found = []
    for config in (plain, dataclasses.replace(plain, cache="dual", cache_refresh=1),
                   dataclasses.replace(plain, cache="dual")):  # fmt: skip
        steps = denoise_steps(model, batch.prompt_BT, config, key, batch.real_BT, alternatives=3)
        found.append(list(itertools.islice(steps, 4)))
    for without, anew, kept in zip(*found, strict=True):
        np.testing.assert_array_equal(without.tokens_BT, anew.tokens_BT)
        assert kept.new_BT.sum() == without.new_BT.sum()
        if without.probability_BT is not None:
            np.testing.assert_allclose(anew.probability_BT, without.probability_BT, rtol=1e-4)
    new_BT = found[0][3].new_BT & found[2][3].new_BT
    assert (found[0][3].probability_BT != found[2][3].probability_BT)[new_BT].any()


def test_the_record_and_its_page_are_what_happened(loaded, batch):
    """One prompt is continued, the other filled in."""
    model, tokenizer = loaded
    recorder, key, done = Recorder(model, tokenizer, TEXTS, OPTIONS), jax.random.key(1), []
    assert recorder.complete(key, 8, done.append) == complete(model, tokenizer, TEXTS, OPTIONS, key, 8)
    assert done == [2]
    arguments = (model, batch.prompt_BT, batch.config, row_keys(key, batch.rows), batch.real_BT)
    steps = list(denoise_steps(*arguments, alternatives=4))
    page = replayed.data(replay.page([recorder.records[i] for i in range(2)], {}))
    for row, i in enumerate(batch.rows):
        record, sample = recorder.records[i], page["samples"][i]
        start, masks = int(np.sum(~batch.real_BT[row])), TEXTS[i].count("[MASK]") + 6
        expected = [step.tokens_BT[row, start:].tolist() for step in steps]
        assert record.prompt == sample["prompt"] == TEXTS[i] and len(record.steps) == len(sample["counts"]) == masks
        assert replayed.canvases(record, model.config.mask_id) == expected[: masks + 1]
        played = [[one and one[0] for one in state] for state in replayed.played(page, sample)]
        assert [[model.config.mask_id if j is None else j for j in state] for state in played] == expected[: masks + 1]
        probability = [step.probability_BT[row][step.new_BT[row]] for step in steps[1 : masks + 1]]
        sure = [sure for sure, token in zip(sample["sure"], sample["token"], strict=True) if token >= 0]
        np.testing.assert_allclose(np.array(sure) / 1e4, np.concatenate(probability), atol=5.1e-5)
        likely = np.concatenate([step.likely_BTN[row][step.new_BT[row]] for step in steps[1 : masks + 1]])
        assert [page["tokens"]["id"][j] for j in sample["likely"]] == likely.ravel().tolist()
        assert sample["settings"] == {name: str(value) for name, value in record.settings.items()}
        assert record.settings["remasking"] == "margin" and record.settings["cfg_scale"] == 0.5
        assert not {"top_k", "steps"} & record.settings.keys()  # they were not chosen


@pytest.mark.parametrize("length", ["append", "daedal"])
def test_a_record_holds_what_was_in_use(loaded, length):
    """Of the room for the largest length, a page shows what the text had."""
    model, tokenizer = loaded
    room = {"append": 16, "daedal": 100}[length]
    options = Options(length=length, gen_length=room, block_length=4, commit="threshold", commit_bound=0.2)
    prompt, key = encode_prompt("def main", model, tokenizer, options), jax.random.key(1)
    (batch,) = make_batches(model, [prompt], options, 1)

    def steps_of(model):
        arguments = (batch.prompt_BT, batch.config, row_keys(key, [0]), batch.real_BT)
        return [step.tokens_BT[0] for step in denoise_steps(model, *arguments)]

    ending = merge(*split(model))
    ending.config = dataclasses.replace(model.config, eos_id=501, eot_id=None, end_ids=())
    if length == "append":  # the text ends with its second block
        continuation = steps_of(ending)[-1][len(prompt.ids_T) :].tolist()
        end = next(i for i in range(4, 8) if continuation[i] not in continuation[:4])
        ending.config = dataclasses.replace(ending.config, eos_id=continuation[end])
    recorder, expected = Recorder(ending, tokenizer, ["def main"], options), steps_of(ending)
    assert recorder.complete(key, 1) == complete(ending, tokenizer, ["def main"], options, key, 1)
    record = recorder.records[0]
    reach = len(record.start)
    assert reach == len(prompt.ids_T) + 8 if length == "append" else reach >= len(prompt.ids_T) + 64
    assert (expected[-1][reach:] == ending.config.eos_id).all() and record.end <= reach
    canvases = replayed.canvases(record, model.config.mask_id)
    assert canvases == [tokens_T[:reach].tolist() for tokens_T in expected[: len(canvases)]]


def advance(loaded, before: list[int], *after: list[int]):
    """Returns the record of a made-up denoising, whose canvases these are, in a batch that is filled up with it."""
    model, tokenizer = loaded
    batch = SimpleNamespace(rows=[0, 0], real_BT=np.ones((2, len(before)), bool), config=Options().sampler(0, 4))
    mask_id = model.config.mask_id

    def steps():
        yield Step(np.array([before] * 2), np.zeros((2, len(before)), bool))
        for old, new in itertools.pairwise([before, *after]):
            old, new = np.array([old] * 2), np.array([new] * 2)
            new_BT = (old != new) & (new != mask_id)
            sure_BT = np.where(new_BT, 0.5, np.nan)
            likely_BTN = np.repeat(np.where(new_BT, new, -1)[..., None], 4, axis=-1)
            yield Step(new, new_BT, sure_BT, sure_BT, likely_BTN, np.repeat(sure_BT[..., None], 4, axis=-1))

    recorder = Recorder(model, tokenizer, [""], Options())
    prompt = SimpleNamespace(ids_T=np.array([], int), masks=0)
    assert len(list(recorder.follow(steps(), batch, [prompt]))) == 1 + len(after)
    return recorder.records[0]


def test_a_character_of_several_tokens(loaded):
    """Its bytes arrive in any order, and one of them is taken back in between."""
    model, tokenizer = loaded
    m = model.config.mask_id
    a, *emoji = (i for i in tokenizer.encode("a😀", continuation=True))
    assert len(emoji) == 4, "each byte is a token"
    w, x, y, z = emoji
    canvases = [[a, m, m, m, m], [a, w, m, y, m], [a, w, x, y, z], [a, w, m, y, z], [a, w, x, y, z]]
    record = advance(loaded, [m] * 5, *canvases)
    np.testing.assert_array_equal(replayed.canvases(record, m), [[m] * 5, *canvases])
    texts = replayed.texts(record)
    assert [text if text is None else len(text) for text in texts[2]] == [1, 1, None, 1, None]
    assert texts[3] == texts[5] == [tokenizer.decode([a]), "", "", "", "😀"]
    assert Change(2, None) in record.steps[3] and any(change.same for change in record.steps[3])
    assert record.completion == tokenizer.decode([a, *emoji])


def test_the_texts_of_the_tokens_are_the_text(loaded):
    model, tokenizer = loaded
    m, bos, eos = model.config.mask_id, tokenizer.bos_id, tokenizer.eos_id
    ids = tokenizer.encode(" x = 漢字\n\treturn é😀 + 1", special=False)
    half = [i if at % 2 else m for at, i in enumerate(ids)]
    record = advance(loaded, [bos, *half, m], [bos, *half, eos], [bos, *ids, eos])
    shown = replayed.tokens(record)[-1]
    assert "".join(token.text for token in shown[1:-1]) == tokenizer.decode([bos, *ids], skip_special=True)
    assert shown[0].control and shown[-1].control and not any(token.control for token in shown[1:-1])
    assert record.end == 1 + len(ids)
