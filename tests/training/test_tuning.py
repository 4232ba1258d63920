"""Tests instruction tuning: a pre-trained model learns to answer, with the same trainer and the same guarantees."""

import json
import random
import shutil

import numpy as np
import pytest
import rounding
import tiny
from runs import assert_same_run, terminate, when_done

from llada_jax import loading
from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.read.chat import held_out_answers
from llada_jax.formats import workdir

SETTINGS = {
    "diffusion__objective": "sft",
    "diffusion__random_length_every": 0,
    "model__layers": 0,
    "init_weights_only": True,
    "sequence_length": 64,
    "sampling__prompts": ("repeat: fox",),
    "steps": 30,
    "optimizer__peak_learning_rate": 1e-2,
}


def lines(count: int) -> list[dict]:
    """Returns conversations of one to three turns, in which every answer repeats a word of the message."""
    words, pick = ["fox", "child", "river", "engine"], random.Random(0)
    result = []
    for i in range(count):
        messages = []
        for _ in range(1 + i % 3):
            word = pick.choice(words)
            messages += [{"role": "user", "content": f"repeat: {word} {i}"}, {"role": "assistant", "content": word}]
        result.append({"messages": messages})
    return result


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(120)))
    return path


@pytest.fixture(scope="session")
def chat_set(chats, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_set") / "set"
    settings = {"sequence_length": 64, "validation_fraction": 0.1, "too_long": "cut", "workers": 1, "progress": False}
    prepare_chat([str(chats)], folder, tokenizer=str(reference), **settings)
    return str(folder)


@pytest.fixture(scope="session")
def tuned(run, reference, chat_set, tmp_path_factory):
    """Returns the workdir of an uninterrupted tuning run. Do not change it."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    assert run(folder, **SETTINGS, data__path=chat_set, init_from=str(reference)) == entry_point.FINISHED
    return folder


def validations(folder) -> dict[int, float]:
    records = tiny.records(folder)
    return {r["step"]: r["validation/nats_per_token"] for r in records if "validation/nats_per_token" in r}


def test_the_answers_become_likely(tuned, reference, chat_set):
    """The bound on held-out answers starts at the value of the base model and falls to less than half of it."""
    bounds = validations(tuned)
    assert list(bounds) == [0, 7, 14, 21, 28, 30]
    assert bounds[30] < 0.5 * bounds[0]
    config, _ = workdir.read_config(tuned)
    assert config.model == workdir.read_config(reference)[0].model  # layers=0 takes the architecture of the base model
    rows = held_out_answers([chat_set], config.validation.rows, 64, config.model.vocab_size)
    # The base model has hardly learned anything: it is about as good as a guess.
    assert bounds[0] == pytest.approx(np.log(config.model.vocab_size), rel=0.5)
    assert (rows.prompt_N > 0).all()
    samples = (tuned / "samples.txt").read_text()
    assert "answer to 'repeat: fox'" in samples


def test_stopped_and_resumed_it_is_the_same(run, tuned, reference, chat_set, tmp_path):
    folder = tmp_path / "run"
    again = {**SETTINGS, "data__path": chat_set, "init_from": str(reference)}
    with when_done(13, terminate):
        assert run(folder, **again) == entry_point.PREEMPTED
    assert workdir.steps_in(folder)[-1] < 30
    assert run(folder, **again) == entry_point.FINISHED
    assert_same_run(folder, tuned)


@pytest.mark.slow
def test_on_another_mesh_it_is_the_same_run(run, tuned, reference, chat_set, tmp_path):
    """Rows and noise are the same on another mesh and with micro-batches, so the losses differ only by rounding.

    In micro-batches, too, rows are filled up with EOS to the length of the longest row of the whole batch.
    """
    folder = tmp_path / "run"
    settings = {**SETTINGS, "data__path": chat_set, "init_from": str(reference), "steps": 12}
    settings["optimizer__schedule"] = ((0, 0.0), (6, 1.0), (24, 1.0), (30, 0.1))  # the positions are steps
    assert run(folder, devices=4, **settings, mesh__tensor=2, accumulation=2, logging__every=1) == entry_point.FINISHED
    plain = tmp_path / "plain"
    assert run(plain, **settings, logging__every=1) == entry_point.FINISHED
    losses = [[r["loss"] for r in tiny.records(f) if "loss" in r] for f in (folder, plain)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=rounding.FIRST_STEP)
    np.testing.assert_allclose(*losses, rtol=rounding.LATER_STEPS)


def test_prepared_on_first_use_with_the_tokenizer_of_the_base(run, reference, chats, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = {**SETTINGS, "data__path": "", "data__input": str(chats), "init_from": str(reference), "steps": 2}
    settings["diffusion__objective"] = "sft_whole"
    assert run(folder, **settings) == entry_point.FINISHED
    assert (folder / "data" / "train.index.npy").exists()
    assert loading.load(folder)[1].sha256 == loading.load(reference)[1].sha256
    assert run(folder, **{**settings, "steps": 3}) == entry_point.FINISHED
    assert "resuming" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"diffusion__objective": "pretrain"}, "holds conversations, but config.diffusion.objective trains on text"),
        ({"diffusion__random_length_every": 5}, "random_length_every=5 cuts rows of text: set it to 0"),
        ({"init_from": "", "init_weights_only": False}, "model.layers=0 takes the architecture of config.init_from"),
        ({"sequence_length": 32}, "prepared for a sequence length of 64"),
        ({"diffusion__objective": "dpo"}, "choose one of 'pretrain', 'sft', 'sft_whole'"),
        ({"model__width": 64}, "model.width is 64, but config.model.layers=0 takes the architecture of .* has 32"),
        ({"report": True}, "report=True compares text"),
        ({"init_weights_only": False}, "set --config.init_weights_only to take its weights alone"),
    ],
)
def test_mistakes(run, reference, chat_set, tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path / "run", **{**SETTINGS, "data__path": chat_set, "init_from": str(reference), **settings})
    assert "\n" not in str(error.value)


def test_the_chat_template_is_that_of_the_model(run, reference, chats, tmp_path):
    """A model must be tuned with the chat template that it will be prompted with later."""
    other = tmp_path / "other"
    shutil.copytree(reference / "tokenizer", other)
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    settings = {"sequence_length": 64, "workers": 1, "progress": False}
    for name, tokenizer in (("set", str(other)), ("plain", str(reference))):
        prepare_chat([str(chats)], tmp_path / name, tokenizer=tokenizer, **settings)
    tuning = {**SETTINGS, "init_from": str(reference)}
    with pytest.raises(UserError, match="another chat template than that of .*: prepare them with --tokenizer="):
        run(tmp_path / "run", **tuning, data__path=str(tmp_path / "set"))
    with pytest.raises(UserError, match="have different chat templates"):
        run(tmp_path / "run", **tuning, data__path=f"{tmp_path / 'set'},{tmp_path / 'plain'}")


def test_text_is_not_for_tuning(run, reference, prepared, tmp_path):
    with pytest.raises(UserError, match="holds text, but config.diffusion.objective trains on conversations"):
        run(tmp_path / "run", **{**SETTINGS, "sequence_length": 32}, data__path=prepared, init_from=str(reference))
