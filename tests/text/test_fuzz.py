"""Whatever stands in a tokenizer's files is read as the tokenizers library reads it, or refused in one line."""

import copy
import json

import pytest
import tokenizer_folders as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefixing import train_prefixing

from llada_jax.config import UserError
from llada_jax.text.tokenizer import load_tokenizer

ANY_SPEED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FEW = settings(max_examples=40, derandomize=True, **ANY_SPEED)
MANY = settings(max_examples=120, **ANY_SPEED)

PARTS = ["a", "b", "ab", "fox", " ", "  ", "\n", "_", "1", "\u00e9", "\u0301", "\u2581", "\U0001f600", "\x1c", "\ufeff"]
LITERALS = ["<s>", "</s>", "<mask>", "[MASK]", "<x>", "CLS", "<a b>", "\u00e9!", "<|eot_id|>"]
texts = st.lists(st.sampled_from(PARTS + LITERALS), max_size=10).map("".join)

scalars = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4)
scalars |= st.sampled_from([*LITERALS, "\ud800", "", "WordLevel", "BPE", "Lowercase", 0, 1, 4, 7, 100])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def contents(draw):
    """Draws a tokenizer.json that the library takes, with added tokens that have any properties."""
    content = draw(st.sampled_from([
        tf.words(), tf.unigram("always"), tf.unigram("first"), tf.unigram("never"), tf.bytes_pairs(),
        tf.bytes_pairs(space=True), tf.bytes_pairs(ignore_merges=True, dropout=0.3)]))  # fmt: skip
    content = copy.deepcopy(content)
    if (kind := draw(st.sampled_from([None, "Lowercase", "NFC", "NFKC"]))) is not None:
        content["normalizer"] = {"type": kind}
    vocab = content["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    size = len(vocab)
    for literal in draw(st.lists(st.sampled_from(LITERALS), unique=True)):
        flags = draw(st.sets(st.sampled_from(tf.FLAGS)))
        content["added_tokens"].append(tf.added(literal, ids.get(literal, size), *flags))
        size += literal not in ids
    return content


@st.composite
def configs(draw):
    """Draws a tokenizer_config.json, most of whose fields have a usual form."""
    token = st.sampled_from(LITERALS) | st.fixed_dictionaries({"content": st.sampled_from(LITERALS)})
    flags = st.fixed_dictionaries({flag: st.booleans() for flag in tf.FLAGS})
    record = st.builds(lambda literal, flags: {"content": literal, **flags}, st.sampled_from(LITERALS), flags)
    usual = {name: token | values for name in ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")}
    usual |= {name: st.booleans() | values for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")}
    usual |= {name: st.lists(token) | values for name in ("additional_special_tokens", "extra_special_tokens")}
    usual["added_tokens_decoder"] = st.dictionaries(st.integers(0, 300).map(str), record | values, max_size=3) | values
    usual["chat_template"] = st.sampled_from(["{{ bos_token }}{{ messages[0].content }}", "{%", "{{"]) | values
    usual |= {name: values for name in ("sp_model_kwargs", "clean_up_tokenization_spaces", "tokenizer_class")}
    return draw(st.fixed_dictionaries({}, optional=usual))


def read(folder):
    """Returns the tokenizer in a folder, or None if it is refused as it should be."""
    try:
        return load_tokenizer(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and len(str(error)) < 1000, error
        return None


def check(tokenizer, text):
    """Checks what must hold of every tokenizer and text."""
    control = {*tokenizer._special.values()}
    ids = tokenizer.encode(text)
    unknown = tokenizer.encode("\U0001f4a9") if tokenizer.kind == "huggingface" else []
    assert not control & {*ids} - {*unknown} and ids == tokenizer.encode(text)
    special = tokenizer.encode(text, special=True)
    whole = tokenizer.encode_text(text, special=True)
    assert whole[len(whole) - len(special) :] == special
    assert all(0 <= i < tokenizer.size for i in [*ids, *special, *tokenizer.prefix])
    assert isinstance(tokenizer.decode(special), str)
    assert len(tokenizer.token_bytes()) == tokenizer.size


def as_the_library(folder, content, some):
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    tokenizer, library = load_tokenizer(tf.write(folder, content)), None
    content = copy.deepcopy(content)
    content["model"].pop("dropout", None)
    library = tf.library(tf.write(folder, content))
    own = {token["content"] for token in content["added_tokens"]}
    for text in some:
        check(tokenizer, text)
        if not any(literal in text for literal in tokenizer._added.keys() - own):
            assert tokenizer.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids


def any_config(folder, content, config, text):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if (tokenizer := read(tf.write(folder, content))) is not None:
        check(tokenizer, text)
        tokenizer.save(folder / "copy")
        assert load_tokenizer(folder / "copy").sha256 == tokenizer.sha256


def damaged(folder, content, place, value):
    """Puts a value somewhere into a tokenizer.json; `place` chooses where."""
    content = at = copy.deepcopy(content)
    for step in place:
        keys = [*at] if isinstance(at, dict) else range(len(at))
        key = keys[step % len(keys)]
        if not isinstance(at[key], dict | list) or not at[key] or step is place[-1]:
            break
        at = at[key]
    at[key] = value
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    check_if_it_encodes(read(tf.write(folder, content)))


def check_if_it_encodes(tokenizer):
    """Checks a tokenizer that may have no token for some character."""
    if tokenizer is not None:
        try:
            check(tokenizer, "a <s> ab")
        except UserError as error:
            assert "\n" not in str(error) and "cannot encode" in str(error)


def bytes_of_files(folder, name, start, byte, cut):
    """Damages the bytes of one of the files."""
    tf.write(folder, tf.words(), tokenizer_config={"bos_token": "<s>", "chat_template": "x"}, special_tokens_map={})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    content = (folder / name).read_bytes()
    place = cut % len(content)
    (folder / name).write_bytes(start + content[:place] + byte + content[place + 1 :])
    check_if_it_encodes(read(folder))


starts = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
names = st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
places = st.lists(st.integers(0, 1000), min_size=1, max_size=6)
FUZZ = {
    "library": (as_the_library, contents(), st.lists(texts, max_size=6)),
    "config": (any_config, contents(), configs(), texts),
    "damage": (damaged, contents(), places, values),
    "bytes": (bytes_of_files, names, starts, st.binary(max_size=2), st.integers(0, 2000)),
}


@pytest.mark.parametrize("name", FUZZ)
@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_tokenizer_files(tmp_path, name, size):
    function, *arguments = FUZZ[name]
    size(given(st.tuples(*arguments))(lambda drawn: function(tmp_path, *drawn)))()


@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_files_beside_a_sentencepiece_model(tmp_path, size):
    train_prefixing(["The small fox said nothing, one two three."] * 20, tmp_path / "tokenizer.model",
                    hard_vocab_limit=False, user_defined_symbols=["<x>", "<|eot_id|>"])  # fmt: skip

    @size
    @given(configs(), st.dictionaries(st.sampled_from(LITERALS), st.integers(-2, 500)) | values, texts)
    def run(config, more, text):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "added_tokens.json").write_text(json.dumps(more))
        if (tokenizer := read(tmp_path)) is not None:
            check(tokenizer, text)

    run()


@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_any_string_of_a_user(tmp_path, size):
    tokenizer = load_tokenizer(tf.write(tmp_path, tf.bytes_pairs()))

    @size
    @given(st.text(st.characters(exclude_categories=())) | texts)
    def run(text):
        try:
            text.encode()
        except UnicodeEncodeError:
            for call in (tokenizer.encode_text, lambda text: tokenizer.encode(text, special=True)):
                with pytest.raises(UserError, match="lone surrogate"):
                    call(text)
            with pytest.raises(UserError, match="lone surrogate"):
                tokenizer.encode_chat([{"role": "user", "content": text}])
            return
        assert tokenizer.decode(tokenizer.encode(text)) == text

    run()
