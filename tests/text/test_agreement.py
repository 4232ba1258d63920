"""Tests which rows a model needs for the tokenizer of its data, and what happens if the two disagree."""

import json

import pytest

from llada_jax.config import ModelConfig, UserError
from llada_jax.text.agreement import fitted, resolve_ids, with_tokenizer
from llada_jax.text.tokenizer import find_tokenizer, load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

TEXT = [f"The quiet fox walked {i} miles, and nobody said a word.\n" for i in range(200)]
OWN = 316  # tokens in the file; MASK and the three tokens of the chat template are appended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(TEXT, OWN + 4, path).own_size == OWN
    return path


def with_config(folder, tmp_path, **fields):
    find_tokenizer(folder).save(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "m"


def test_text_needs_no_rows_for_the_tokens_of_a_chat(folder):
    """A published vocabulary with exactly one row for MASK is trained further on text, but not on conversations."""
    tokenizer = find_tokenizer(folder)
    model = ModelConfig(vocab_size=OWN + 1, mask_id=OWN, eos_id=2)
    resolve_ids(model, tokenizer, source="m")
    assert (model.mask_id, model.eos_id, model.bos_id, model.eot_id) == (OWN, 2, 1, None)
    assert (model.token_count, model.holes, model.end_ids) == (OWN + 1, (), ())
    fresh = ModelConfig(vocab_size=OWN + 1)
    resolve_ids(fresh, tokenizer)
    assert (fresh.mask_id, fresh.token_count) == (OWN, OWN + 1)
    words = rf"config.model.vocab_size={OWN + 1} is smaller than the tokenizer's {OWN + 4} tokens that conversations"
    with pytest.raises(UserError, match=words):
        resolve_ids(ModelConfig(vocab_size=OWN + 1), tokenizer, chat=True)
    with pytest.raises(
        UserError, match=rf"vocab_size={OWN} is smaller than the tokenizer's {OWN + 1} tokens that text"
    ):
        resolve_ids(ModelConfig(vocab_size=OWN), tokenizer)
    whole = ModelConfig(vocab_size=OWN + 4)
    resolve_ids(whole, tokenizer, chat=True)
    assert (whole.eot_id, whole.token_count) == (OWN + 3, OWN + 4)


def test_a_chat_template_of_text_alone_needs_no_rows(folder, tmp_path):
    find_tokenizer(folder).save(tmp_path)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    model = ModelConfig(vocab_size=OWN + 1)
    resolve_ids(model, find_tokenizer(tmp_path), chat=True)
    assert model.eot_id is None and model.mask_id == OWN


def test_data_prepared_with_the_models_folder_has_the_models_ids(folder, tmp_path):
    """The tokenizer has no MASK, and another EOS. Prepared with the folder, the data has the ids of config.json."""
    path = with_config(folder, tmp_path, mask_token_id=400, eos_token_id=390, vocab_size=512)
    model = ModelConfig(vocab_size=512, mask_id=400, eos_id=390)
    load_tokenizer(path).save(tmp_path / "set")
    resolve_ids(model, load_tokenizer(tmp_path / "set"), source=str(path))
    assert (model.mask_id, model.eos_id, model.end_ids) == (400, 390, (2,))
    with pytest.raises(UserError) as caught:
        resolve_ids(ModelConfig(vocab_size=512, mask_id=400, eos_id=390), find_tokenizer(folder), source="models/m")
    assert str(caught.value) == (
        "EOS is 390 in models/m (config.model.eos_id), but the data was prepared with 2: prepare it again with the "
        "ids of the model (--tokenizer=models/m), or correct eos_token_id in its config.json or eos_token in its "
        "tokenizer_config.json"
    )


def test_a_mask_that_only_the_model_names_is_no_disagreement(folder):
    model = ModelConfig(vocab_size=512, mask_id=400, eot_id=401)
    resolve_ids(model, find_tokenizer(folder), source="m")
    assert (model.mask_id, model.eot_id, model.token_count) == (400, 401, OWN + 4)
    with pytest.raises(UserError, match="MASK is 300 in m .* but the data was prepared with 316"):
        resolve_ids(ModelConfig(vocab_size=512, mask_id=300), find_tokenizer(folder), source="m")  # 300 is text
    with pytest.raises(UserError, match="EOT is 401 in m .* but the data was prepared with 319"):
        resolve_ids(ModelConfig(vocab_size=512, eot_id=401), find_tokenizer(folder), chat=True, source="m")


def test_either_of_two_ends_may_be_eos(folder):
    model = ModelConfig(vocab_size=512, eos_id=390, end_ids=(2, 7))
    resolve_ids(model, find_tokenizer(folder), source="m")
    assert (model.eos_id, model.end_ids) == (390, (2, 7))


def test_an_existing_model_takes_ends_and_holes_from_its_tokenizer(folder):
    config = ModelConfig(vocab_size=512, mask_id=511, eos_id=500, end_ids=(7, 450), token_count=508)
    tokenizer = fitted(find_tokenizer(folder), config, "m")
    config = with_tokenizer(config, tokenizer)
    assert (config.eos_id, config.end_ids, config.token_count) == (500, (7, 450, 2), 508)
    assert config.holes == ((316, 317), (320, 450), (451, 500), (501, 508))
    assert with_tokenizer(config, tokenizer) == config
    alone = with_tokenizer(ModelConfig(vocab_size=512, end_ids=(7, 450)), None)
    assert (alone.eos_id, alone.end_ids, alone.holes) == (7, (450,), ())


def test_mask_of_the_model_is_no_other_token_of_the_data(folder):
    """The data was prepared without the model's config: there, the id of the model's MASK is that of <|eot_id|>."""
    tokenizer, eot = find_tokenizer(folder), OWN + 3
    assert tokenizer.eot_id == eot
    with pytest.raises(UserError, match=rf"MASK is {eot} in m .* this id for another token: .* \(--tokenizer=m\)"):
        resolve_ids(ModelConfig(vocab_size=OWN + 8, mask_id=eot, eos_id=2), tokenizer, chat=True, source="m")
    model = ModelConfig(vocab_size=OWN + 8, mask_id=eot, eos_id=2)
    resolve_ids(model, tokenizer, source="m")  # text has no such token
    assert (model.mask_id, model.eot_id) == (eot, None)
