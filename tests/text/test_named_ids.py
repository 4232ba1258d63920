"""Tests which ids a tokenizer takes from the files of a model's folder: roles, ends of a text, MASK, and holes."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada_jax.config import UserError
from llada_jax.text.tokenizer import find_tokenizer, load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

TEXT = [f"The quiet fox walked {i} miles, and nobody said a word.\n" for i in range(200)]


def word_level(folder, vocab, special=(), **files):
    """Writes a tokenizer.json with this vocabulary, and other files as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": vocab[name], "content": name, **flags} for name in special]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


VOCAB = {f"w{i}": i for i in range(10)} | {"</s>": 10, "<|im_end|>": 12, "<|eom|>": 14, "plain": 20}


@pytest.mark.parametrize(
    ("files", "eos", "ends"),
    [
        ({}, 10, ()),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, 12, ()),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "special_tokens_map": {"eos_token": "</s>"}}, 12, (10,)),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}, "eom_token": "<|eom|>"}}, 10, (14,)),
        ({"tokenizer_config": {"eos_token": "</s>", "eos_token_id": [10, 12], "eod_token": "plain"}}, 10, (20, 12)),
        ({"tokenizer_config": {"eos_token": "nowhere", "eot_token": None, "eos_token_id": "x"}}, 10, ()),
    ],
)
def test_every_end_that_the_files_name(tmp_path, files, eos, ends):
    tokenizer = load_tokenizer(word_level(tmp_path, VOCAB, ("</s>", "<|im_end|>", "<|eom|>"), **files))
    assert (tokenizer.eos_id, tokenizer.end_ids) == (eos, ends)


def test_the_eos_of_a_sentencepiece_model_stays_an_end(tmp_path):
    train_tokenizer(TEXT, 320, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 330}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (330, (2,))
    assert tokenizer.holes(340) == ((316, 330), (335, 340))  # MASK and the tokens of the template are 331 to 334


def test_holes_are_the_ids_of_no_token(tmp_path):
    tokenizer = load_tokenizer(word_level(tmp_path, VOCAB, ("</s>", "<|im_end|>", "<|eom|>")))
    # 21 to 25 are appended: BOS, MASK, two headers, and the end of a turn.
    assert tokenizer.size == 26
    assert tokenizer.holes(30) == ((11, 12), (13, 14), (15, 20), (26, 30))
    model = tokenizer.of_model(mask_id=29, bos_id=None, eos_id=11)
    assert model.holes(30) == ((13, 14), (15, 20), (22, 23), (26, 29)) and model.end_ids == (10,)


def test_a_folder_with_a_model_gives_its_tokenizer_the_models_ids(tmp_path):
    folder = word_level(tmp_path / "m", VOCAB, ("</s>",), config={"mask_token_id": 31, "eos_token_id": 30})
    assert (find_tokenizer(folder).mask_id, find_tokenizer(folder).eos_id) == (22, 10)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.end_ids) == (31, 30, (10,))
        assert tokenizer.notes == [
            "EOS is 30 in the model's config.json, but 10 (</s>) in the tokenizer's files: 30 is used; set "
            "eos_token_id in config.json, or eos_token in tokenizer_config.json, if that is wrong"
        ]  # no file of the tokenizer names a MASK, so there is nothing to disagree with
        assert tokenizer.sha256 == find_tokenizer(folder).sha256
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").roles == tokenizer.roles
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"mask_token_id": 31, "eos_token_id": 30}

    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    find_tokenizer(folder).save(tmp_path / "run" / "tokenizer")
    record = {"config": {"model": {"mask_id": 31, "bos_id": None, "eos_id": 30, "vocab_size": 32}}, "identity": {}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert load_tokenizer(tmp_path / "run").roles == tokenizer.roles


@pytest.mark.parametrize(
    ("config", "generation", "eos", "notes"),
    [
        ({"eos_token_id": [30, 10]}, {}, 30, 0),  # both end a text: nothing disagrees
        ({"eos_token_id": 30}, {"eos_token_id": [10]}, 30, 0),
        ({}, {"eos_token_id": 12}, 10, 0),
        ({"eos_token_id": 10, "mask_token_id": 31}, {}, 10, 0),
        ({"eos_token_id": None, "mask_token_id": "x"}, {}, 10, 0),
        ({"eos_token_id": 99, "vocab_size": 32}, {}, 10, 0),  # this model is refused when it is loaded
        ({"bos_token_id": 3, "mask_token_id": 20}, {}, 10, 1),  # 20 is the token of "plain"
    ],
)
def test_what_config_json_says_of_eos(tmp_path, config, generation, eos, notes):
    tokenizer = load_tokenizer(word_level(tmp_path, VOCAB, ("</s>",), config=config, generation_config=generation))
    assert tokenizer.eos_id == eos and len(tokenizer.notes) == notes


def test_an_eos_that_only_generation_config_knows(tmp_path):
    vocab = {f"w{i}": i for i in range(10)}
    folder = word_level(tmp_path, vocab, config={"mask_token_id": 15}, generation_config={"eos_token_id": [9, 8]})
    assert load_tokenizer(folder).eos_id == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "is not a JSON object"), ("{", "is not JSON: "), ("3", "is not a JSON object"), ("", "is not JSON: "),
        ('{"config": 3}', "cannot be read: "), ("\xff", "is not JSON in UTF-8: line 1"),
        ("\xff\xfe{\0}\0", "is UTF-16: "), ("[" * 10**5, "nested too deeply"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_a_damaged_config_is_named(tmp_path, name, content, words):
    folder = word_level(tmp_path, VOCAB, config={})
    (folder / f"{name}.json").write_text(content, encoding="latin-1")
    if (name, content) == ("generation_config", '{"config": 3}'):
        assert load_tokenizer(folder).notes == []
        return
    with pytest.raises(UserError, match=rf"/{name}.json .*{words}"):
        load_tokenizer(folder)


def bpe(byte_level):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Fuse()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return tokenizer


def unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["<unk>"]))
    return tokenizer


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "characters", "unigram", "word_piece"])
def test_text_never_becomes_the_models_mask(tmp_path, kind):
    """A model may use a token of ordinary text as MASK. Such text still works, in other tokens, and this is told."""
    if kind == "sentencepiece":
        train_tokenizer(TEXT, 320, tmp_path)
    else:
        make = {"byte_level": lambda: bpe(True), "characters": lambda: bpe(False)}
        make |= {"unigram": unigram, "word_piece": word_piece}
        make[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = find_tokenizer(tmp_path), "The quiet fox walked 17 miles"
    ids = tokenizer.encode(text)
    longest = max(ids, key=lambda i: len(tokenizer.decode([i], continuation=True)))
    (tmp_path / "config.json").write_text(json.dumps({"mask_token_id": longest}))
    changed = load_tokenizer(tmp_path)
    assert changed.mask_id == longest and len(changed.notes) == 1
    assert f"MASK is {longest}, which is also the token of ordinary text" in changed.notes[0]
    assert "is encoded as other tokens" in changed.notes[0]
    new = changed.encode(text)
    assert longest not in new and len(new) > len(ids) and changed.decode(new) == tokenizer.decode(ids)
    assert changed.encode("[MASK]", special=True) == [longest] and changed.decode([longest]) == "[MASK]"
    assert changed.encode("said") == tokenizer.encode("said")
    changed.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text) == new
    assert load_tokenizer(tmp_path / "copy").sha256 == tokenizer.sha256


def test_a_token_that_nothing_can_replace_is_told(tmp_path):
    bpe(True).save(str(tmp_path / "tokenizer.json"))
    (i,) = find_tokenizer(tmp_path).encode("q")
    (tmp_path / "config.json").write_text(json.dumps({"mask_token_id": i}))
    (note,) = load_tokenizer(tmp_path).notes
    assert note.endswith("'q': such text is read as MASK, because no other tokens make it up")
    assert load_tokenizer(tmp_path).encode("q") == [i]
