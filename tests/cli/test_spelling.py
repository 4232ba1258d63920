"""Tests which settings are suggested for a name that no setting has."""

import pytest

from llada_jax.cli import spelling
from llada_jax.config import Config, leaves

NAMES = {name for name, _ in leaves(Config())}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # What users of other trainers type.
        ("lr", "optimizer.peak_learning_rate"),
        ("optimizer.lr", "optimizer.peak_learning_rate"),
        ("optim.lr", "optimizer.peak_learning_rate"),
        ("bs", "batch_size"),
        ("per_device_train_batch_size", "batch_size"),
        ("n_layers", "model.layers"),
        ("model.num_hidden_layers", "model.layers"),
        ("hidden_size", "model.width"),
        ("model.d_model", "model.width"),
        ("model.num_attention_heads", "model.heads"),
        ("model.num_key_value_heads", "model.kv_heads"),
        ("intermediate_size", "model.feed_forward"),
        ("warmup", "optimizer.schedule"),
        ("optimizer.warmup_steps", "optimizer.schedule"),
        ("seq_len", "sequence_length"),
        ("gradient_accumulation_steps", "accumulation"),
        ("max_grad_norm", "optimizer.clip_norm"),
        ("gradient_checkpointing", "compute.remat"),
        ("epochs", "steps"),
        ("save_steps", "checkpoint.every"),
        ("checkpoint.steps", "checkpoint.every"),
        ("eval_interval", "validation.every"),
        ("logging.frequency", "logging.every"),
        ("resume_from", "init_from"),
        ("tp", "mesh.tensor"),
        ("bf16", "compute.dtype"),
        # A part of the name, a name without its section, and a name in a wrong section.
        ("learning_rate", "optimizer.peak_learning_rate"),
        ("optimizer.learning_rate", "optimizer.peak_learning_rate"),
        ("wandb_project", "logging.wandb_project"),
        ("num_train_steps", "steps"),
        ("model.vocab", "model.vocab_size"),
        ("tied", "model.tied_embeddings"),
        ("heartbeat", "distributed.heartbeat_timeout"),
        ("data.batch_size", "batch_size"),
        ("lora_rank", "model.lora.rank"),
        ("lora.rank", "model.lora.rank"),
        ("remat_policy", "compute.remat"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
        # Typing errors.
        ("stepz", "steps"),
        ("model.layer", "model.layers"),
        ("batch-size", "batch_size"),
        ("batchSize", "batch_size"),
        ("optimizer.beta_1", "optimizer.beta1"),
        ("learningrate", "optimizer.peak_learning_rate"),
        ("steps.x", "steps"),
        ("optimizer.schedule[0]", "optimizer.schedule"),
        ("optimzer", "optimizer"),
    ],
)
def test_the_nearest(typed, meant):
    assert spelling.nearest(typed)[0] == meant
    if meant in NAMES:
        assert f"did you mean --config.{meant}" in spelling.suggestion(typed, "--config.")


def test_several_that_are_equally_near():
    assert spelling.nearest("training.steps") == ["steps", "sampling.steps", "profile.steps"]
    text = spelling.suggestion("optimizer.betas", "config.")
    assert text == "did you mean config.optimizer.beta1 or config.optimizer.beta2?"
    assert len(spelling.nearest("every")) == 3


def test_the_settings_of_the_section_where_nothing_is_near():
    assert spelling.nearest("model.lora.dropout") == []
    text = spelling.suggestion("model.lora.dropout", "--config.")
    assert text == "config.model.lora has the settings rank, alpha, targets; --help describes all settings"
    text = spelling.suggestion("dropout", "--config.")
    assert text.startswith("config has the settings seed, steps, ") and " and the sections model, compute, " in text
    assert spelling.suggestion("nowhere.xyz", "--config.") == text
    # A flag cannot set a section, so the settings of the section are listed.
    assert spelling.suggestion("lora", "--config.").startswith("config.model.lora has the settings rank, ")
    assert spelling.suggestion("optimzer", "config.") == "did you mean config.optimizer?"


def test_the_other_names_belong_to_settings():
    assert set(spelling._OTHER_NAMES) <= NAMES


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("'OptimizerConfig' object has no attribute 'lr'", "did you mean config.optimizer.peak_learning_rate?"),
        ("'Config' object has no attribute 'lr' and no", "did you mean config.optimizer.peak_learning_rate?"),
        ("'Config' object has no attribute 'modle'", "did you mean config.model?"),
        ("LoraConfig.__init__() got an unexpected keyword argument 'r'", "did you mean config.model.lora.rank?"),
        ("'str' object has no attribute 'lr'", None),
        ("get() got an unexpected keyword argument 'lr'", None),
    ],
)  # fmt: skip
def test_mistaken_attribute(message, words):
    assert spelling.mistaken_attribute(message) == words


def test_misspelt_finds_the_first_flag_that_is_no_setting():
    right = ["--workdir=w", "--config.steps=3", "--noconfig.report", "-config.model.layers", "2", "--config.model=1"]
    assert spelling.misspelt(right) is None
    assert spelling.misspelt([*right, "--", "--config.stepz=3"]) is None
    assert spelling.misspelt([*right, "--noconfig.reprot", "--config.x=3"]).startswith("--config.reprot: there is no")
    text = spelling.misspelt([*right, "--config.workdir=w"], plain_flags=["workdir"])
    assert text == "--config.workdir: there is no such setting; did you mean --workdir?"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("steps", "did you mean --config.steps?"),
        ("confg.steps", "did you mean --config.steps?"),
        ("optimizer.lr", "did you mean --config.optimizer.peak_learning_rate?"),
        ("qqq", None),
    ],
)
def test_unknown_flag(flag, words):
    assert spelling.unknown_flag(flag) == words


def test_workdir_is_meant_only_where_there_is_such_a_flag():
    assert spelling.unknown_flag("output_dir", ["workdir"]) == "did you mean --workdir?"
    assert "workdir" not in (spelling.unknown_flag("output_dir") or "")


def test_section_with_a_value():
    text = spelling.section_with_a_value(["--config.steps=3", "--config.optimizer=adamw"])
    assert text.startswith("--config.optimizer is a section and has no value of its own; config.optimizer has the sett")
    assert spelling.section_with_a_value(["--config.steps=3", "--", "--config.optimizer=adamw"]) is None
