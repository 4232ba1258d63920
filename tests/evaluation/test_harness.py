"""Tests the model for lm_eval: what it passes to the scoring functions and the sampler, and what it returns."""

import json
import math
import os
import subprocess
import sys

import bench
import jax
import lm_eval
import numpy as np
import pytest
import rounding
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import llada_jax
from llada_jax.config import UserError
from llada_jax.evaluation import harness
from llada_jax.scoring import likelihood
from llada_jax.scoring.likelihood import Score
from llada_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bench.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def loaded(folder):
    return llada_jax.load(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return TaskManager(include_path=str(bench.write_tasks(tmp_path_factory.mktemp("t"))), include_defaults=False)


def instances(kind, arguments):
    return [Instance(kind, {}, given, 0) for given in arguments]


class Told:
    """Replaces the scoring functions and the sampler: records their arguments, and returns given results."""

    def __init__(self, monkeypatch, tokenizer, score=lambda prompt, answer: -1.0, text=lambda prompt: ""):
        self.pairs, self.calls = [], []

        def log_likelihoods(model, requests, report=lambda done: None, **settings):
            decoded = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in requests]
            self.pairs += decoded
            self.calls.append(settings)
            report(len(requests))
            return [Score(score(*pair), 0.0) for pair in decoded]

        def greedy_matches(model, requests, **settings):
            return [score(tokenizer.decode(p), tokenizer.decode(a)) > -1.5 for p, a in requests]

        def complete_ids(model, tokenizer, prompts, options, key, batch_size, report, numbers):
            self.calls.append((options, [tokenizer.decode(prompt) for prompt in prompts], list(numbers)))
            return [text(tokenizer.decode(prompt)) for prompt in prompts]

        monkeypatch.setattr(likelihood, "log_likelihoods", log_likelihoods)
        monkeypatch.setattr(likelihood, "greedy_matches", greedy_matches)
        monkeypatch.setattr(harness, "complete_ids", complete_ids)


def test_known_answers_give_known_figures(monkeypatch, loaded, tasks):
    model, tokenizer = loaded
    right = {record["question"]: record["choices"][record["gold"]] for record in bench.DATA["choice"]}
    right |= {record["text"].rsplit(" ", 1)[0]: record["text"].split(" ")[-1] for record in bench.DATA["cloze"]}
    right.pop("After nine comes")

    def score(prompt, answer):
        return -1.0 if right.get(prompt.split("\n")[-1].strip()) == answer.strip() else -2.0

    def text(prompt):
        number = 2 * int(prompt.split("What is ")[-1].split()[0])
        return f" Well. #### {number if number != 8 else 7}\n\n#### 99"

    told = Told(monkeypatch, tokenizer, score, text)
    lm = harness.LLaDA(model, tokenizer, mc_samples=7, cfg_scale=0.5, batch_size=3)
    names = ["choice", "cloze", "sums"]
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=10)["results"]
    # One of the nine questions is unknown. Its choices get equal scores, so the first one is taken, which is wrong.
    assert found["choice"]["acc,none"] == pytest.approx(8 / 9)
    assert found["cloze"]["perplexity,none"] == pytest.approx(math.e) and found["cloze"]["acc,none"] == 1.0
    assert found["sums"]["exact_match,number"] == pytest.approx(8 / 9)
    assert found["sums"]["exact_match_stderr,number"] == pytest.approx(math.sqrt(8 / 9 * 1 / 9 / 8))
    scored = [call for call in told.calls if isinstance(call, dict)]
    assert all(call["samples"] == 7 and call["cfg_scale"] == 0.5 for call in scored)
    assert ("After one comes", " two") in told.pairs and ("one and then", " two") in told.pairs


def test_examples_come_in_front(monkeypatch, loaded, tasks):
    model, tokenizer = loaded
    told = Told(monkeypatch, tokenizer)
    lm = harness.LLaDA(model, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["choice"], task_manager=tasks, num_fewshot=2, limit=2, bootstrap_iters=0)
    questions = {record["question"]: record["choices"][record["gold"]] for record in bench.DATA["choice"]}
    for prompt, _ in told.pairs:
        *examples, question = prompt.split("\n\n")
        assert question in questions and len(examples) == 2
        assert all(questions[q] == a for q, a in (example.rsplit(" ", 1) for example in examples))


def test_values_are_those_of_the_scores(folder, loaded):
    model, tokenizer = loaded
    lm = get_model("llada_jax").create_from_arg_string(f"pretrained={folder},mc_samples=3,seed=5", {"batch_size": 2})
    assert lm.max_length == 256 and (lm.rank, lm.world_size) == (0, 1)
    asked = [("one two ", "three four five"), ("", "six"), ("seven", " eight")]
    found = lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    whole = tokenizer.encode("one two three four five")
    prompt = tokenizer.encode("one two")  # the trailing space becomes part of the answer
    pairs = [(prompt, whole[len(prompt) :]), ([], tokenizer.encode("six")), (tokenizer.encode("seven"), None)]
    pairs[2] = (pairs[2][0], tokenizer.encode("seven eight")[len(pairs[2][0]) :])
    # The batches are other ones. A score is a mean over three samples; scores of attention are of size 4.
    tolerance = rounding.of_nll(model.config, 32, 3, score=4)
    wanted = likelihood.log_likelihoods(model, pairs, samples=3, key=jax.random.key(5))
    greedy = likelihood.greedy_matches(model, pairs)
    np.testing.assert_allclose([value for value, _ in found], [score.value for score in wanted], rtol=tolerance)
    assert [match for _, match in found] == greedy

    texts = ["one two three. " * 40, "four"]
    rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), True)
    documents = [tokenizer.encode(text) for text in texts]
    assert len(documents[0]) > 256
    wanted = likelihood.rolling_log_likelihoods(model, documents, max_length=256, samples=3, key=jax.random.key(5))
    tolerance = rounding.of_nll(model.config, 256, 3, score=4)
    np.testing.assert_allclose(rolling, [score.value for score in wanted], rtol=tolerance)


def test_what_is_too_long_loses_its_beginning(monkeypatch, capsys, loaded):
    model, tokenizer = loaded
    told = Told(monkeypatch, tokenizer)
    lm = harness.LLaDA(model, tokenizer, max_length=12, gen_length=4)
    words = tokenizer.encode("one two three four five six seven eight nine ten")
    text, answer = tokenizer.decode(words), " one"
    lm.loglikelihood(instances("loglikelihood", [(text, answer), ("", text)]), disable_tqdm=True)
    kept = 12 - len(tokenizer.encode(text + answer)[len(words) :])
    assert set(told.pairs) == {(tokenizer.decode(words[-kept:]), answer), ("", tokenizer.decode(words[-12:]))}
    lm.generate_until(instances("generate_until", [(text, {"until": []})]), disable_tqdm=True)
    assert told.calls[-1][1] == [tokenizer.decode(words[-8:])]
    assert capsys.readouterr().err.count("1 prompts lose their beginning: with the answer they pass 12 tokens") == 2
    with pytest.raises(UserError, match="gen_length=4 leaves no room"):
        lm.max_length = 4
        lm.generate_until(instances("generate_until", [(text, {})]), disable_tqdm=True)


LITERALS = "a [MASK] <|mdm_mask|>b<|eot_id|>\n<s></s> <|start_header_id|>user<|end_header_id|> x<y [z]"


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request, loaded):
    """Returns the model's own tokenizer, and one that has its own mask literal and its own chat template."""
    if request.param == "sentencepiece":
        return loaded[1]
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|mdm_mask|>", "<|eot_id|>"]
    )
    made.train_from_iterator([" ".join(bench.WORDS)], trainer)
    source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eot_id|>{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]<|mdm_mask|>{% endif %}"
    config = json.dumps({"chat_template": source, "bos_token": "<s>"}).encode()
    folder = request.getfixturevalue("tmp_path_factory").mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(config)
    return load_tokenizer(folder)


def test_what_a_document_says_is_never_a_control_token(loaded, tokenizer):
    lm = harness.LLaDA(loaded[0], tokenizer)
    assert lm.tok_encode(LITERALS) == tokenizer.encode(LITERALS) != tokenizer.encode(LITERALS, special=True)
    assert not set(lm.tok_encode(LITERALS)) & {i for i, _ in tokenizer.roles.values()}
    assert lm.tok_encode("plain text") == tokenizer.encode("plain text") and lm.tok_encode("") == []
    assert lm.eot_token_id == tokenizer.eos_id


def test_what_a_message_says_is_never_a_control_token(loaded, tokenizer):
    lm = harness.LLaDA(loaded[0], tokenizer)
    messages = [{"role": role, "content": role[0] + LITERALS} for role in ("system", "user", "assistant", "user")]
    for given in (messages, messages[-1:], [{"role": "user", "content": "one\ntwo"}]):
        ids = lm.tok_encode(lm.apply_chat_template(given))
        assert ids == tokenizer.encode_chat(given)
        assert lm.apply_chat_template(given).replace(harness.CONTROL, "") == tokenizer.render_chat(given)
    assert ids.count(tokenizer.eot_id) == 1
    opened = lm.tok_encode(lm.apply_chat_template(messages[:3], add_generation_prompt=False))
    assert opened.count(tokenizer.eot_id) == 2
    # The same prompt in front of an answer: the answer's literals are text as well, and the prompt's ids do not change.
    prompt, answer = lm._encode_pair(lm.apply_chat_template(messages), "x" + LITERALS)
    assert prompt + answer == [*tokenizer.encode_chat(messages), *tokenizer.encode("x" + LITERALS, continuation=True)]


def test_an_answer_that_was_begun_can_stand_alone(loaded, tokenizer):
    lm = harness.LLaDA(loaded[0], tokenizer)
    alone = [{"role": "assistant", "content": "It is <|eot_id|> "}]
    text = lm.apply_chat_template(alone, add_generation_prompt=False)
    assert text.endswith("It is <|eot_id|> ") and tokenizer.eot_id not in lm.tok_encode(text)
    assert tokenizer.render_chat(alone, False).startswith(text.replace(harness.CONTROL, "").rstrip())


def test_settings_of_generation(monkeypatch, capsys, loaded):
    model, tokenizer = loaded
    asked = [
        ("one", {"until": ["b"], "max_gen_toks": 5, "do_sample": False, "temperature": 1.0}),
        ("two", {"until": "c", "max_new_tokens": 5, "top_p": 0.9}),
        ("three", {"do_sample": True, "temperature": 0.7}),
        ("one", {"until": ["b", "-b"], "max_gen_toks": 5}),  # the one that comes first in the text counts
        ("three", {"do_sample": True, "temperature": 0.7}),
    ]
    told = Told(monkeypatch, tokenizer, text=lambda prompt: "a-c-b-c")
    lm = harness.LLaDA(model, tokenizer, block_length=2, logits_eos_inf=True)
    assert lm.generate_until(instances("generate_until", asked), True) == ["a-c-", "a-", "a-c-b-c", "a-c", "a-c-b-c"]
    settings = {(o.gen_length, o.temperature, o.block_length, o.logits_eos_inf): set(p) for o, p, _ in told.calls}
    assert settings == {(5, 0.0, 2, True): {"one", "two"}, (256, 0.7, 2, True): {"three"}}
    numbers = {prompt: n for _, prompts, all_n in told.calls for prompt, n in zip(prompts, all_n, strict=True)}
    assert capsys.readouterr().err.count("top_p") == 1
    drawn = [(prompt, n) for _, prompts, all_n in told.calls for prompt, n in zip(prompts, all_n, strict=True)]
    assert sorted(prompt for prompt, _ in set(drawn)) == ["one", "three", "three", "two"], (
        "each sampled request has its own noise"
    )
    numbers |= dict(reversed(drawn))

    told.calls.clear()
    cache = {"cache": "dual", "cache_refresh": 4, "suffix_window": 8}
    lm = harness.LLaDA(model, tokenizer, gen_length=9, temperature=0.2, steps=3, **cache)
    lm.generate_until(instances("generate_until", asked[1:3]), True)
    ((options, prompts, again),) = told.calls
    assert (options.gen_length, options.temperature, options.steps) == (9, 0.2, 3)
    assert {name: getattr(options, name) for name in cache} == cache
    for length, found in ((None, "append"), ("daedal", "daedal")):
        lm = harness.LLaDA(model, tokenizer, gen_length="auto", length=length, commit="threshold")
        assert (lm.gen_length, lm.options.length) == (None, found), "the task says how long an answer may be"
    assert dict(zip(prompts, again, strict=True)) == {name: numbers[name] for name in ("two", "three")}


def test_chat_template(monkeypatch, loaded, tasks):
    model, tokenizer = loaded
    told = Told(monkeypatch, tokenizer)
    lm = harness.LLaDA(model, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["sums"], task_manager=tasks, apply_chat_template=True, limit=1, num_fewshot=1)
    (prompt,) = told.calls[-1][1]
    *examples, question = messages = [
        {"role": "user", "content": "Question: What is 0 + 0?\nAnswer:"},
        {"role": "assistant", "content": "0"},
        {"role": "user", "content": "Question: What is 0 + 0?\nAnswer:"},
    ]
    drawn = prompt.split("What is ")[1].split("?")[0]  # the example that lm_eval chose
    examples[0]["content"] = f"Question: What is {drawn}?\nAnswer:"
    examples[1]["content"] = str(2 * int(drawn.split()[0]))
    assert prompt == tokenizer.render_chat(messages) and prompt.count("<|eot_id|>") == 3
    assert lm.tok_encode(lm.apply_chat_template(messages)) == tokenizer.encode_chat(messages)
    opened = [question, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(opened, add_generation_prompt=False) == lm.apply_chat_template([question]) + "It is"

    assert lm.chat_template(True) == tokenizer.default_chat_template and lm.chat_template(False) is None
    name = lm.tokenizer_name
    monkeypatch.setattr(tokenizer, "chat_template", "another")
    assert lm.chat_template(True) == "another" and lm.tokenizer_name != name
    with pytest.raises(UserError, match="cannot be chosen by name"):
        lm.chat_template("tool_use")


def test_examples_with_literals_through_the_chat_template(monkeypatch, loaded, tmp_path):
    model, tokenizer = loaded
    question, answer = "What is <|eot_id|>[MASK]</s>", "#### 1<|start_header_id|>"
    monkeypatch.setitem(bench.DATA, "sums", [{"question": f"{question} {i}", "answer": answer} for i in range(3)])
    manager = TaskManager(include_path=str(bench.write_tasks(tmp_path / "t")), include_defaults=False)
    prompts = []
    monkeypatch.setattr(harness, "complete_ids", lambda m, t, some, *_, **__: prompts.extend(some) or [""] * len(some))
    settings = {"apply_chat_template": True, "limit": 1, "num_fewshot": 1, "bootstrap_iters": 0}
    for multiturn in (True, False):
        lm = harness.LLaDA(model, tokenizer)
        lm_eval.simple_evaluate(lm, tasks=["sums"], task_manager=manager, fewshot_as_multiturn=multiturn, **settings)
    ends = [prompt.count(tokenizer.eot_id) for prompt in prompts]
    headers = [prompt.count(tokenizer.start_header_id) for prompt in prompts]
    assert (ends, headers) == ([3, 1], [4, 2]), "one per message, and the header that opens the answer"
    assert all(tokenizer.mask_id not in prompt and tokenizer.eos_id not in prompt for prompt in prompts)


def test_completions_do_not_depend_on_what_else_is_asked(loaded):
    model, tokenizer = loaded
    lm = harness.LLaDA(model, tokenizer, gen_length=6, block_length=3, temperature=0.9, batch_size=1)
    asked = [(f"Count: {word}", {"until": []}) for word in bench.WORDS[:5]]
    found = lm.generate_until(instances("generate_until", asked), True)
    assert lm.generate_until(instances("generate_until", asked[3:]), True) == found[3:]
    assert len(set(found)) > 1


def test_an_interruption_loses_one_portion(monkeypatch, loaded, tasks, tmp_path):
    model, tokenizer = loaded
    monkeypatch.setattr(harness, "LIKELIHOOD_PORTION", 10)
    told = Told(monkeypatch, tokenizer, score=lambda prompt, answer: -float(len(prompt) + len(answer)))
    settings = {"tasks": ["choice"], "task_manager": tasks, "bootstrap_iters": 0}
    whole = lm_eval.simple_evaluate(harness.LLaDA(model, tokenizer), **settings)["results"]
    assert len(told.pairs) == 27
    told.pairs.clear()
    score = likelihood.log_likelihoods

    def fails(model, requests, **rest):
        if len(told.pairs) >= 20:
            raise RuntimeError("no more")
        return score(model, requests, **rest)

    monkeypatch.setattr(likelihood, "log_likelihoods", fails)
    cache = str(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="no more"):
        lm_eval.simple_evaluate(harness.LLaDA(model, tokenizer), use_cache=cache, **settings)
    told.pairs.clear()
    monkeypatch.setattr(likelihood, "log_likelihoods", score)
    again = lm_eval.simple_evaluate(harness.LLaDA(model, tokenizer), use_cache=cache, **settings)["results"]
    assert len(told.pairs) == 7 and again == whole


def test_arguments(folder, loaded, tmp_path):
    for arguments, words in (
        ({}, "pretrained=DIR is missing"),
        ({"pretrained": loaded[0]}, "tokenizer is missing: give the model's tokenizer"),
        ({"pretrained": bench.PARITY / "gqa"}, "has no tokenizer"),
        ({"model": str(folder), "mc_samples": 0}, "mc_samples=0"),
        ({"model": str(tmp_path / "none")}, "is not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            harness.LLaDA(**arguments)
    assert harness.LLaDA(model=folder, batch_size="auto", max_length=99).max_length == 99


def test_lm_eval_does_not_fork():
    code = "import llada_jax.evaluation.harness, os; print(os.environ['DISABLE_MULTIPROC'])"
    environment = {name: value for name, value in os.environ.items() if name != "DISABLE_MULTIPROC"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout == "1\n"


def test_what_the_tokenizer_puts_in_front_of_a_text(monkeypatch, loaded):
    """BOS is in front of plain prompts, also where they are cut, and in no answer; a chat has what its template has."""
    model, tokenizer = loaded
    bos = tokenizer.bos_id
    monkeypatch.setattr(tokenizer, "prefix", (bos,))
    pairs, windows, prompts = [], [], []
    score = lambda m, some, **_: pairs.extend(some) or [Score(-1.0, 0.0)] * len(some)  # noqa: E731
    monkeypatch.setattr(likelihood, "log_likelihoods", score)
    monkeypatch.setattr(likelihood, "greedy_matches", lambda m, some, **_: [False] * len(some))
    rolling = lambda m, some, **rest: windows.append((some, rest)) or [Score(-1.0, 0.0)] * len(some)  # noqa: E731
    monkeypatch.setattr(likelihood, "rolling_log_likelihoods", rolling)
    monkeypatch.setattr(harness, "complete_ids", lambda m, t, some, *_, **__: prompts.extend(some) or [""] * len(some))
    lm = harness.LLaDA(model, tokenizer, max_length=12, gen_length=4)
    words = tokenizer.encode("one two three four five six seven eight nine ten")
    text, six = tokenizer.decode(words), tokenizer.encode("six")
    lm.loglikelihood(instances("loglikelihood", [("", "six"), ("one", " two"), (text, " one")]), disable_tqdm=True)
    one = tokenizer.encode(text + " one")[len(words) :]
    assert ([bos], six) in pairs and ([bos, *words[-11 + len(one) :]], one) in pairs
    assert ([bos, *tokenizer.encode("one")], tokenizer.encode("one two")[len(tokenizer.encode("one")) :]) in pairs
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("six",)]), disable_tqdm=True)
    assert windows[0][0] == [six] and windows[0][1]["prefix"] == (bos,)
    chat = lm.apply_chat_template([{"role": "user", "content": "a"}])
    lm.max_length = None
    lm.generate_until(instances("generate_until", [("six", {}), (chat, {})]), disable_tqdm=True)
    assert sorted(prompts, key=len) == [[bos, *six], tokenizer.encode_chat([{"role": "user", "content": "a"}])]
    assert chat.endswith(harness.END) and prompts[0].count(bos) == prompts[1].count(bos) == 1
    lm.max_length = 12
    lm.generate_until(instances("generate_until", [(text, {})]), disable_tqdm=True)
    assert prompts[-1] == [bos, *words[-7:]]


def test_answers_that_alone_are_too_long_are_told_of(monkeypatch, capsys, loaded):
    Told(monkeypatch, loaded[1])
    lm = harness.LLaDA(*loaded, max_length=3)
    lm.loglikelihood(instances("loglikelihood", [("a", "one two three four five six"), ("a", "b")]), disable_tqdm=True)
    assert "1 answers lose their beginning: they alone pass 3 tokens" in capsys.readouterr().err
