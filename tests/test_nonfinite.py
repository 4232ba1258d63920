"""Tests that what is computed from a model whose output is not finite is refused in one line, and never written."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax.config import NonFinite, SamplerConfig, UserError, ValidationConfig
from llada_jax.conversation.conversation import Conversation, Settings
from llada_jax.conversation.session import Chat
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.model.transformer import merge, split
from llada_jax.sampling.remasking import choose
from llada_jax.sampling.sampler import denoise_steps
from llada_jax.scoring import bound
from llada_jax.scoring.likelihood import greedy_matches, log_likelihoods

WORDS = r"^the model's output is not finite \(NaN or infinite\)"
BAD = [np.nan, np.inf, -np.inf]


def spoiled(model, name: str, place: tuple, value: float):
    """Returns a copy of the model with another value at one place of a parameter."""
    graphdef, params = split(model)
    changed = np.array(params[name])
    changed[place] = value
    return merge(graphdef, params | {name: jax.device_put(changed, params[name].sharding)})


@pytest.fixture(scope="module")
def broken(toy):
    """Returns the toy model with one NaN in the column of the head that belongs to token 7."""
    return spoiled(toy.model, "head", (3, 7), np.nan)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("token", range(6))
@pytest.mark.parametrize("noise", [False, True])
def test_no_logit_goes_unseen(value, token, noise):
    """Whatever the token may do: be chosen or not, count in the softmax or not, or be left out altogether."""
    logits = jnp.arange(12, dtype=jnp.float32).reshape(1, 2, 6)
    allowed, unsure, absent = (jnp.arange(6) != i for i in (1, 1, 1))
    unsure, absent = ~unsure | (jnp.arange(6) == 2), jnp.arange(6) == 3
    more = 0.1 * logits[..., ::-1] if noise else None
    _, whole = choose(logits, more, allowed, unsure, absent)
    assert np.isfinite(whole).all()
    _, probability = choose(logits.at[0, 1, token].set(value), more, allowed, unsure, absent)
    assert np.isfinite(probability[0, 0]) and np.isnan(probability[0, 1])


def test_no_token_is_drawn(broken, toy):
    prompt = np.array([[3, 1, 4], [1, 5, 9]])
    # Confidence is random here, so that nothing but the check itself sees the NaN.
    config = SamplerConfig(steps=4, gen_length=4, block_length=2, temperature=0.7, remasking="random")
    with pytest.raises(NonFinite, match=WORDS):
        llada_jax.generate(broken, prompt, config, jax.random.key(0))
    llada_jax.generate(toy.model, prompt, config, jax.random.key(0))  # the same compiled program
    frames = denoise_steps(broken, prompt, config, jax.random.key(0))
    assert next(frames)[0].shape == (2, 7)  # before the first step
    with pytest.raises(NonFinite, match=WORDS):
        next(frames)
    # What is not finite but not used does not matter: token 2 is not on the canvas.
    fine = spoiled(toy.model, "embedding", (2,), np.nan)
    greedy = SamplerConfig(steps=1, gen_length=1, block_length=1, temperature=0.7, remasking="random")
    llada_jax.generate(fine, prompt, greedy, jax.random.key(0))


def test_no_score_is_computed(broken, toy):
    requests = [([3, 1], [4, 1]), ([], [5])]
    for score in (lambda m: log_likelihoods(m, requests, samples=4, key=jax.random.key(0)),
                  lambda m: greedy_matches(m, requests)):  # fmt: skip
        score(toy.model)
        with pytest.raises(NonFinite, match=WORDS):
            score(broken)
    # A logit of -inf makes the sum of a softmax smaller, and nothing else.
    with jax.set_mesh(mesh.one_device_mesh()), pytest.raises(NonFinite, match=WORDS):
        negative = spoiled(toy.model, "head", (3, 7), -np.inf)
        log_likelihoods(negative, requests, samples=4, key=jax.random.key(0))
    rows = HeldOut(toy.x_0[None], np.array([6], np.int32), np.array([0], np.int32), np.array([9]))
    with jax.set_mesh(mesh.one_device_mesh()), pytest.raises(NonFinite, match=WORDS):
        bound.validate(*split(broken), rows, ValidationConfig(), batch_size=1, chunk=64, mask_id=15)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_conversation_ends(loaded, monkeypatch, capsys, as_json):
    model, tokenizer = loaded
    talk = Conversation(spoiled(model, "final_norm", (0,), np.inf), tokenizer, Settings(gen_length=4, block_length=4))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nagain\n"), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    with pytest.raises(NonFinite, match=WORDS):
        Chat(talk, as_json=as_json).run()
    stdout.flush()
    lines = [json.loads(line) for line in stdout.buffer.getvalue().decode().splitlines()]
    assert lines == ([{"message": "hello", "answer": None}] if as_json else [])
    assert capsys.readouterr().err == "" and talk.messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("value", [1e39, 1e31, float("nan"), float("inf")])
def test_settings_that_float32_cannot_hold(toy, value):
    for name in ("temperature", "cfg_scale"):
        with pytest.raises(UserError, match=f"{name}="):
            llada_jax.generate(toy.model, np.zeros((1, 2), int), SamplerConfig(**{name: value}), jax.random.key(0))
    with pytest.raises(UserError, match="cfg_scale="):
        log_likelihoods(toy.model, [], key=jax.random.key(0), cfg_scale=value)
