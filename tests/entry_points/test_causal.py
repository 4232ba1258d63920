"""Tests sample, chat, evaluate and the model for lm_eval with an autoregressive model."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax.config import SamplerConfig, UserError
from llada_jax.conversation.conversation import Conversation, Settings
from llada_jax.evaluation import reversal
from llada_jax.sampling import watching
from llada_jax.sampling.recording import ALTERNATIVES, Recorder
from llada_jax.sampling.text_completion import Options, complete
from llada_jax.scoring.likelihood import greedy_matches, log_likelihoods


@pytest.fixture(scope="module")
def toy(causal_folder):
    model, tokenizer = llada_jax.load(causal_folder)
    assert model.config.causal
    return model, tokenizer


def run(name, *arguments, **options):
    command = [sys.executable, "-m", f"llada_jax.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_sample_continues_and_refuses_what_is_about_masks(causal_folder, toy):
    done = run("sample", f"--model={causal_folder}", "--prompt=def main", "--gen_length=9")
    (wanted,) = complete(*toy, ["def main"], Options(gen_length=9), jax.random.key(0))
    assert done.returncode == 0 and done.stdout == wanted + "\n", done.stderr
    done = run("sample", f"--model={causal_folder}", "--prompt=a [MASK]")
    assert done.returncode == 2 and "a prompt contains [MASK], but this model is causal" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2 and "Traceback" not in done.stderr


def test_a_conversation_answers_token_by_token(toy):
    model, tokenizer = toy
    talk = Conversation(model, tokenizer, Settings(gen_length=10))
    talk.say("What is 1 + 1?")
    ids = np.asarray([tokenizer.encode_chat([{"role": "user", "content": "What is 1 + 1?"}])], np.int32)
    wanted_T = np.asarray(llada_jax.generate(model, ids, SamplerConfig(gen_length=10), jax.random.key(0)))[0, -10:]
    frames = list(talk.answer())
    open_id = watching.open_id(model.config.mask_id)
    assert [int((frame.tokens_T != open_id).sum()) for frame in frames[:4]] == [0, 1, 2, 3]
    length = len(frames[-1].tokens_T)
    np.testing.assert_array_equal(frames[-1].tokens_T, wanted_T[:length])
    assert frames[-1].done and talk.messages[-1]["content"] == talk.text(frames[-1])
    with pytest.raises(UserError, match="block_length=4: this model is causal"):
        talk.set("block_length", "4")
    with pytest.raises(UserError, match="steps=4: this model is causal"):
        Conversation(model, tokenizer, Settings(steps=4))


def test_chat_reads_lines(causal_folder):
    done = run("chat", f"--model={causal_folder}", "--json", "--gen_length=5", input="Hello\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["message"] == "Hello"


def test_lm_eval_gets_exact_likelihoods(toy):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    from llada_jax.evaluation.harness import LLaDA

    model, tokenizer = toy
    lm = LLaDA(model, tokenizer, max_length=64)
    pairs = [("def main", "(x):"), ("import", " numpy"), ("", "text")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    requests = [lm._encode_pair(*pair) for pair in pairs]
    wanted = [score.value for score in log_likelihoods(model, requests, key=jax.random.key(1))]
    np.testing.assert_allclose([value for value, _ in found], wanted, rtol=1e-6)
    assert [match for _, match in found] == greedy_matches(model, requests)
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("def main(x):",), 0)], True)
    (whole,) = log_likelihoods(model, [([], tokenizer.encode("def main(x):"))], key=jax.random.key(1))
    assert rolling == pytest.approx(whole.value, rel=1e-6)
    (text,) = lm.generate_until([Instance("generate_until", {}, ("def main", {"max_gen_toks": 9}), 0)], True)
    assert [text] == complete(model, tokenizer, ["def main"], Options(gen_length=9), jax.random.key(0))
    with pytest.raises(UserError, match="gen_length=auto with length=fixed"):
        LLaDA(model, tokenizer, gen_length="auto", length="fixed")
    automatic = LLaDA(model, tokenizer, gen_length="auto")
    assert (automatic.gen_length, automatic.options.length) == (None, "append")
    with pytest.raises(UserError, match="mc_samples=8: this model is causal, so its likelihoods are exact"):
        LLaDA(model, tokenizer, mc_samples=8)
    guided = LLaDA(model, tokenizer, cfg_scale=0.5)
    with pytest.raises(UserError, match="cfg_scale=0.5: this model is causal"):
        guided.loglikelihood([Instance("loglikelihood", {}, pairs[0], 0)], disable_tqdm=True)


def test_couplets_are_asked_for_but_not_filled_in(toy):
    couplets = [reversal.Couplet("one two", "three four"), reversal.Couplet("five", "six")]
    figures = reversal.evaluate(*toy, couplets, Options(gen_length=6), jax.random.key(0))
    assert list(figures) == ["reversal_forward", "reversal_backward"]


def test_evaluate_refuses_settings_about_masks(causal_folder, tmp_path):
    data = tmp_path / "couplets.json"
    data.write_text(json.dumps([{"first": "one two", "second": "three four"}]))
    shared = [f"--model={causal_folder}", "--tasks=reversal", f"--data={data}", f"--output={tmp_path / 'out.json'}"]
    done = run("evaluate", *shared, "--block_length=8")
    assert done.returncode == 2 and "block_length=8: this model is causal" in done.stderr
    done = run("evaluate", *shared, "--gen_length=6")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "out.json").read_text())["results"]) == {"reversal_forward", "reversal_backward"}


def test_a_recording_has_the_tokens_from_left_to_right(toy, causal_folder, tmp_path):
    model, tokenizer = toy
    texts, options = ["def main", "x"], Options(gen_length=7)
    recorder = Recorder(model, tokenizer, texts, options)
    completions = recorder.complete(jax.random.key(0), 8)
    assert completions == complete(model, tokenizer, texts, options, jax.random.key(0))
    for text, record in ((text, recorder.records[i]) for i, text in enumerate(texts)):
        given = len(tokenizer.encode_text(text, special=True))
        assert record.settings == {"gen_length": 7, "temperature": 0.0}
        assert [token is None for token in record.start] == [False] * given + [True] * 7
        written = [change for step in record.steps for change in step if change.probability is not None]
        assert [change.position for change in written] == list(range(given, given + len(written))) and written
        assert all(len(change.likely) == ALTERNATIVES for change in written)
        assert all(change.token.id == change.likely[0][0].id for change in written), "greedy"
    page = tmp_path / "x.html"
    done = run("sample", f"--model={causal_folder}", "--prompt=x", "--gen_length=3", f"--save_html={page}")
    assert done.returncode == 0, done.stderr
    assert "gen_length" in page.read_text()


def test_options_of_a_causal_model_have_no_steps():
    config = Options(gen_length=70).sampler(0, 70, causal=True)
    assert config == dataclasses.replace(SamplerConfig(gen_length=70))
    with pytest.raises(UserError, match="steps=64: this model is causal"):
        Options(steps=64).sampler(0, 64, causal=True)
