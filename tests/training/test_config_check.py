"""Tests that wrong types and impossible combinations are found, and that each message names the setting."""

import types

import numpy as np
import pytest

from llada_jax.config import Config, ModelConfig, UserError
from llada_jax.text.agreement import resolve_ids
from llada_jax.training.config_check import validate


def good() -> Config:
    c = Config()
    c.data.input = "stdlib"
    return c


def changed(name: str, value) -> Config:
    config = good()
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
        node = getattr(node, group)
    setattr(node, leaf, value)
    return config


def test_defaults_with_data_are_valid():
    validate(good())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "5"), ("steps", 5.0), ("steps", True), ("steps", None), ("steps", np.float32(5)),
        ("report", 1), ("report", "yes"), ("init_from", None), ("init_step", 1.5),
        ("model", None), ("model", {"layers": 2}), ("model.layers", "2"), ("model.mask_id", 1.0),
        ("model.mask_id", "x"),
        ("model.tied_embeddings", 0), ("model.norm_eps", "1e-5"), ("optimizer.peak_learning_rate", "3e-4"),
        ("optimizer.peak_learning_rate", float("nan")), ("optimizer.peak_learning_rate", float("inf")),
        ("optimizer.weight_decay", True), ("optimizer.schedule", 3), ("optimizer.schedule", ((0, 1.0, 2),)),
        ("optimizer.schedule", ((0,),)), ("optimizer.schedule", (0, 1.0)), ("optimizer.schedule", ((0, "1"),)),
        ("optimizer.schedule", ((0, float("nan")),)), ("data.weights", (1, "2")), ("data.weights", 1.0),
        ("data.path", ("a", "b")), ("sampling.prompts", "text"), ("sampling.prompts", (1,)), ("compute.dtype", None),
    ],
)  # fmt: skip
def test_wrong_type(name, value):
    with pytest.raises(UserError, match=rf"^config\.{name}\b.* must be (of type|a) \S+") as caught:
        validate(changed(name, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.peak_learning_rate", 1),  # a setting of type float accepts an int
        ("optimizer.schedule", [[0, 0.0], [0.5, 1]]),  # lists instead of tuples, as JSON has them
        ("data.weights", [1, 2.5]), ("model.mask_id", 3), ("model.mask_id", None), ("init_step", None),
        ("seed", 2**32 - 1), ("validation.rows", 0), ("sampling.gen_length", 0), ("optimizer.clip_norm", 0.0),
        ("diffusion.random_length_every", 0), ("compute.unroll", 0), ("checkpoint.permanent_every", 5000),
        ("accumulation", 8), ("model.kv_heads", 1), ("diffusion.t_range", (0, 0.5)), ("diffusion.loss_weight", "count"),
    ],
)  # fmt: skip
def test_right_type_and_value(name, value):
    validate(changed(name, value))


@pytest.mark.parametrize("value", [[0, 1], (0, 1), [0.0, 1.0]])
def test_a_range_is_kept_as_config_json_gives_it_back(value):
    """Otherwise a resumed run would be refused, because the setting seems to have changed."""
    config = changed("diffusion.t_range", value)
    validate(config)
    assert repr(config.diffusion.t_range) == "(0.0, 1.0)"


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, 0) for n in ("steps", "batch_size", "sequence_length", "accumulation", "model.layers", "model.width",
                      "model.heads", "model.kv_heads", "model.feed_forward", "compute.query_chunk",
                      "compute.loss_chunk", "checkpoint.every", "checkpoint.keep", "logging.every", "logging.buckets",
                      "optimizer.max_nonfinite", "sampling.steps", "sampling.block_length", "validation.samples",
                      "data.prefetch", "data.read_threads", "data.train_tokenizer")]
    + [(n, -1) for n in ("seed", "validation.every", "validation.rows", "validation.seed", "sampling.every",
                         "sampling.gen_length", "sampling.temperature", "checkpoint.permanent_every",
                         "compute.unroll", "diffusion.random_length_every", "optimizer.clip_norm",
                         "optimizer.weight_decay", "optimizer.peak_learning_rate", "data.workers", "profile.steps",
                         "profile.first_step", "model.vocab_size", "optimizer.muon_scale")]
    + [("seed", 2**32), ("validation.seed", 2**32), ("model.heads", 24), ("model.kv_heads", 5),
       ("diffusion.eps", 0.0), ("diffusion.eps", 1.0), ("diffusion.eps", -1e-3), ("data.validation_fraction", 1.0),
       ("data.validation_fraction", -0.1), ("optimizer.beta1", 1.0), ("optimizer.beta2", 1.0),
       ("optimizer.beta2", -0.5), ("optimizer.adam_eps", 0.0), ("optimizer.adam_eps", -1e-8), ("accumulation", 3),
       ("diffusion.eps", 1.5), ("model.rope_theta", 0.0), ("model.norm_eps", -1e-5), ("model.heads", 4096),
       ("optimizer.muon_scale", 0.5)],
)  # fmt: skip
def test_impossible_value(name, value):
    with pytest.raises(UserError, match=rf"^config\.{name}={value} ") as caught:
        validate(changed(name, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_impossible_range_of_t(value):
    with pytest.raises(
        UserError, match=r"^config\.diffusion\.t_range=\(.*\) must be two ascending numbers in \[0, 1\]$"
    ):
        validate(changed("diffusion.t_range", value))


def test_complementary_masks_need_pairs():
    """A pair needs two rows, mask ratios t and 1 - t that are both in the range of t, and room for eps in both."""
    config = changed("diffusion.complementary", True)
    config.diffusion.t_range = (0.2, 0.8)
    validate(config)
    for name, value in (("batch_size", 7), ("diffusion.t_range", (0.2, 1.0)), ("diffusion.eps", 0.5)):
        wrong = changed(name, value)
        validate(wrong)
        wrong.diffusion.complementary = True
        with pytest.raises(UserError, match=rf"^config\.{name}=.* with diffusion\.complementary"):
            validate(wrong)


@pytest.mark.parametrize("name", ["mask_id", "bos_id", "eos_id", "eot_id"])
def test_ids_within_the_vocabulary(name):
    config = changed("model.vocab_size", 128)
    setattr(config.model, name, 127)
    validate(config)
    for value in (128, -1):
        setattr(config.model, name, value)
        with pytest.raises(UserError, match=rf"config\.model\.{name}={value} does not fit model.vocab_size=128"):
            validate(config)


def test_token_count_is_a_count():
    config = changed("model.vocab_size", 128)
    config.model.token_count = 128
    validate(config)
    config.model.token_count = 129
    with pytest.raises(UserError, match="token_count"):
        validate(config)


def test_data_needs_exactly_one_source():
    config = good()
    config.data.path = "prepared"
    with pytest.raises(UserError, match=r"config\.data\.path .* config\.data\.input"):
        validate(config)
    config.data.path = config.data.input = ""
    with pytest.raises(UserError, match="exactly one"):
        validate(config)
    config.data.path = "prepared"
    validate(config)


def test_init_step_needs_init_from():
    with pytest.raises(UserError, match=r"config\.init_step .* config\.init_from"):
        validate(changed("init_step", 3))
    config = changed("init_step", 3)
    config.init_from = "runs/other"
    validate(config)


def test_permanent_checkpoints_are_also_rolling_ones():
    with pytest.raises(UserError, match=r"config\.checkpoint\.permanent_every=1500 is not a multiple"):
        validate(changed("checkpoint.permanent_every", 1500))


def tokenizer(**changes):
    values = dict(
        size=100, own_size=100, vocab_size=128, mask_id=99, bos_id=1, eos_id=2, eot_id=None, end_ids=(), prefix=()
    )
    values |= dict(holes=lambda limit, known: (), is_text=lambda i: True)
    return types.SimpleNamespace(**(values | changes))


def test_ids_come_from_the_tokenizer():
    model = ModelConfig()
    resolve_ids(model, tokenizer())
    assert (model.vocab_size, model.token_count, model.mask_id, model.bos_id, model.eos_id, model.eot_id) == (
        128, 100, 99, 1, 2, None
    )  # fmt: skip
    resolve_ids(model, tokenizer())  # the resolved ids agree with the tokenizer that they come from
    larger = ModelConfig(vocab_size=256, mask_id=99)
    resolve_ids(larger, tokenizer())
    assert larger.vocab_size == 256


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocab_size", 99, "config.model.vocab_size=99 is smaller than the tokenizer's 100 tokens"),
        ("mask_id", 5, "config.model.mask_id=5, but the tokenizer has 99"),
        ("token_count", 50, "config.model.token_count=50, but the tokenizer has 100"),
        ("eot_id", 3, "config.model.eot_id=3, but the tokenizer has None"),
    ],
)
def test_config_against_tokenizer(name, value, message):
    model = ModelConfig()
    setattr(model, name, value)
    with pytest.raises(UserError) as caught:
        resolve_ids(model, tokenizer())
    assert str(caught.value).startswith(message)


def test_prompts_that_are_no_text():
    """Python keeps the bytes of a command line that are not UTF-8 as lone surrogates."""
    with pytest.raises(UserError, match=r"^config\.sampling\.prompts: 'a.udcff' is not UTF-8 text"):
        validate(changed("sampling.prompts", ("", "a\udcff")))
