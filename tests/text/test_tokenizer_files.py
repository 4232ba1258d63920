"""Tokenizer files as people bring them: what they say holds, or a note names it, as in the tokenizers library."""

import json

import pytest
import sentencepiece
import tokenizer_folders as tf
from prefixing import train_prefixing
from sentencepiece import sentencepiece_model_pb2

from llada_jax.config import UserError
from llada_jax.text.tokenizer import load_tokenizer

BOS = {"bos_token": "<s>"}
S = tf.added("<s>", 4, "special")
LINES = ["The small fox walked over the hill <|eot_id|>, said one; two or three."] * 20


def test_dropout_of_training_is_not_used(tmp_path):
    text = "ab fox abab foxab" * 5
    folder = tf.write(tmp_path, tf.bytes_pairs(dropout=0.9))
    assert len({tuple(tf.library(folder).encode(text).ids) for _ in range(30)}) > 1
    without = tf.library(tf.write(tmp_path / "without", tf.bytes_pairs())).encode(text).ids
    tokenizer = load_tokenizer(folder)
    assert {tuple(tokenizer.encode(text, special)) for _ in range(30) for special in (False, True)} == {tuple(without)}
    assert "dropout=0.9" in tokenizer.notes[0]
    everything = load_tokenizer(tf.write(tmp_path / "all", tf.bytes_pairs(dropout=1.0)))
    assert everything.encode(text) == without


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        (None, ()),
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, ()),
        (tf.front_and_behind([("<s>", 4)]), (4,)),
        (tf.front_and_behind([("<s>", 4), ("<mask>", 6)], [("</s>", 5)]), (4, 6)),
        (tf.front_and_behind([], [("</s>", 5)]), ()),
        ({"type": "BertProcessing", "cls": ["<s>", 4], "sep": ["</s>", 5]}, (4,)),
        ({"type": "RobertaProcessing", "cls": ["<mask>", 6], "sep": ["</s>", 5], "trim_offsets": True,
          "add_prefix_space": False}, (6,)),
        ({"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            tf.front_and_behind([("<s>", 4)])]}, (4,)),
    ],
)  # fmt: skip
def test_what_the_post_processor_puts_in_front(tmp_path, processor, wanted):
    names = [tf.added(name, tf.WORDS[name], "special") for name in ("<s>", "</s>", "<mask>")]
    folder = tf.write(tmp_path, tf.words() | {"post_processor": processor, "added_tokens": names})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prefix == wanted
    for text in ("a b", "", "ab <mask> a"):
        library = tf.library(folder).encode(text, add_special_tokens=True).ids
        assert library[: len(wanted)] == list(wanted)
        ours = tokenizer.encode_text(text, special=True)
        assert ours == library[: len(ours)] and set(library[len(ours) :]) <= {5}
    assert any("behind a text" in note for note in tokenizer.notes) == (5 in tf.library(folder).encode("a").ids)
    # Text cannot write the prefix, and a prompt that writes it itself does not get it twice.
    assert tokenizer.encode_text("<s>")[: len(wanted)] == list(wanted) and 4 not in tokenizer.encode("<s>")
    assert tokenizer.encode_text(tokenizer.decode(wanted) + " a", special=True) == [*wanted, 1]
    copy = tmp_path / "copy"
    tokenizer.save(copy)
    assert load_tokenizer(copy).prefix == wanted and load_tokenizer(copy).sha256 == tokenizer.sha256
    assert set(wanted) <= {i for i in range(tokenizer.size) if not tokenizer.decode([i], skip_special=True)}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (BOS | {"add_bos_token": True}, (4,)),
        (BOS | {"add_bos_token": False}, ()),
        (BOS | {"add_bos_token": None, "add_eos_token": True}, ()),
        (BOS | {"add_bos_token": True, "add_eos_token": True, "eos_token": {"content": "</s>"}}, (4,)),
        ({"add_bos_token": True}, ()),  # no file says which token BOS is
    ],
)
def test_what_the_flags_put_in_front(tmp_path, config, wanted):
    for name, added in (("vocabulary", []), ("added", [S])):
        folder = tf.write(tmp_path / name, tf.words() | {"added_tokens": added}, tokenizer_config=config)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.prefix == wanted and tokenizer.encode_text("a b") == [*wanted, 1, 2]
        assert tokenizer.encode("a b") == [1, 2], "a part of a text has nothing in front of it"


def test_the_post_processor_holds_where_a_flag_differs(tmp_path):
    content = tf.words() | {"added_tokens": [S], "post_processor": tf.front_and_behind([("<s>", 4)])}
    for value in (True, False):
        folder = tf.write(tmp_path / str(value), content, tokenizer_config=BOS | {"add_bos_token": value})
        assert load_tokenizer(folder).prefix == (4,)


def test_a_prefix_makes_another_tokenizer(tmp_path):
    plain = load_tokenizer(tf.write(tmp_path / "a", tf.words(), tokenizer_config=BOS))
    front = load_tokenizer(tf.write(tmp_path / "b", tf.words(), tokenizer_config=BOS | {"add_bos_token": True}))
    assert plain.roles == front.roles and plain.sha256 != front.sha256


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": {}},
        {"type": "BertProcessing", "cls": ["<s>", -4], "sep": ["</s>", 5]},
        {"type": "BertProcessing", "cls": ["<q>", 99], "sep": ["</s>", 5]},
        {"type": "Sequence", "processors": [tf.front_and_behind([("<s>", 4)])] * 2}, {"type": "Later"}, {}, 3, [],
    ],
)  # fmt: skip
def test_post_processors_that_cannot_be_followed_are_refused(tmp_path, processor):
    with pytest.raises(UserError) as error:
        load_tokenizer(tf.write(tmp_path, tf.words() | {"post_processor": processor}))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_roles_in_the_vocabulary_keep_their_ids(tmp_path):
    """No added_tokens at all: names in the files, or usual names, are tokens of the vocabulary."""
    t = load_tokenizer(tf.write(tmp_path / "a", tf.words(), tokenizer_config=BOS))
    assert (t.bos_id, t.eos_id, t.mask_id, t.own_size, t.size) == (4, 5, 6, 7, 10)
    t = load_tokenizer(tf.write(tmp_path / "b", tf.words(), special_tokens_map={"eos_token": {"content": "ab"}}))
    assert (t.bos_id, t.eos_id, t.mask_id) == (4, 3, 6)
    assert t.encode("a ab <s>") == [1, 0, 0] and t.encode("a ab <s>", special=True) == [1, 3, 4]
    t = load_tokenizer(tf.write(tmp_path / "c", tf.unigram()))
    assert t.bos_id == 16 and t.encode("<s>", special=True) == [16] and 16 not in t.encode("a<s>a <s>")
    assert t.decode(t.encode("a<s>a"), continuation=True).strip() == "a<s>a"
    # A piece that the merges make of ordinary text has no role unless a file says so.
    t = load_tokenizer(tf.write(tmp_path / "d", tf.bytes_pairs()))
    assert t.mask_id == 263 and t.bos_id == t.own_size == 264 and t.encode("<s>") == [262]
    t = load_tokenizer(tf.write(tmp_path / "e", tf.bytes_pairs(), tokenizer_config=BOS))
    assert t.bos_id == 262 and t.encode("<s>", special=True) == [262] and 262 not in t.encode("a<s>")
    assert t.decode(t.encode("a<s> \u00e9")) == "a<s> \u00e9"
    vocab = {"<unk>": 0, "<": 1, "##s": 2, "##>": 3, "##s>": 4, "<s>": 5}
    inner = {"vocab": vocab, "merges": ["##s ##>", "< ##s>"], "unk_token": "<unk>", "continuing_subword_prefix": "##"}
    t = load_tokenizer(tf.write(tmp_path / "f", tf.words(type="BPE", **inner), tokenizer_config=BOS))
    assert t.bos_id == 5 and t.encode("<s>", special=True) == [5] and t.encode("<s>") == [1, 4]


def test_no_text_yields_a_control_token(tmp_path):
    """Without this, models that take whole words find <s> in plain text although it is a control token."""
    names = [S, tf.added("</s>", 5, "special"), tf.added("<mask>", 6, "special")]
    for name, content in (("words", tf.words()), ("bytes", tf.bytes_pairs(ignore_merges=True))):
        vocab = content["model"]["vocab"]
        content["added_tokens"] = [each | {"id": vocab[each["content"]]} for each in names if each["content"] in vocab]
        folder = tf.write(tmp_path / name, content)
        t, control = load_tokenizer(folder), {vocab[name] for name in ("<s>", "<mask>")} - {262}
        library = tf.library(folder)
        library.encode_special_tokens = True
        for text in ("a <s> <mask> b", "<mask>", "x<s>"):
            assert not control & set(t.encode(text))
            assert not control & set(t.encode(text, continuation=True))
        assert control & set(library.encode("<mask>").ids), "the library alone does not see to it"
        assert t.encode("<mask>", special=True) == [vocab["<mask>"]]


def test_absent_names_are_appended_or_told_of(tmp_path):
    config = {"eos_token": "<end>", "bos_token": "<new>", "add_bos_token": True, "pad_token": "<pad>"}
    content = tf.words(vocab={"<unk>": 0, "a": 1})
    t = load_tokenizer(tf.write(tmp_path / "a", content, tokenizer_config=config | {"unk_token": "<unk>"}))
    assert t.roles["bos"] == (2, "<new>") and t.roles["eos"] == (3, "<end>") and t.prefix == (2,)
    assert t.encode("a <end>", special=True) == [1, 3] and len(t.notes) == 1 and "'<pad>'" in t.notes[0]
    moved = t.of_model(mask_id=2, bos_id=None, eos_id=None)
    assert moved.prefix == (8,) and moved.sha256 == t.sha256, "the appended token moves, and the files stay the same"
    t = load_tokenizer(tf.write(tmp_path / "b", tf.words(), tokenizer_config={"eos_token": "<end>"}))
    assert t.eos_id == 5 and "'<end>' as eos_token, which the tokenizer lacks: '</s>' is used" in t.notes[0]


def test_a_tokenizer_without_a_token_for_the_unknown(tmp_path):
    content = tf.unigram()
    del content["model"]["unk_id"]
    t = load_tokenizer(tf.write(tmp_path, content))
    assert t.encode("ab") == [6]
    with pytest.raises(UserError, match="cannot encode 'a\\?'.*unk_id"):
        t.encode("a?")


TEXTS = ("a <x> b", "a<x>b", "a  <x>\n b", "<x>a", "a_<x>", "<x>\u00e9 <x> <x>", "a <X> b", "<s> <x><s>", " <x> ", "")


@pytest.mark.parametrize("kind", ["words", "always", "first", "bytes", "lower"])
@pytest.mark.parametrize(
    "flags",
    [(), ("special",), ("special", "lstrip"), ("special", "rstrip"), ("special", "single_word"), ("normalized",),
     ("special", "lstrip", "rstrip", "single_word", "normalized")],
    ids=" ".join,
)  # fmt: skip
def test_added_tokens_are_found_as_the_library_finds_them(tmp_path, kind, flags):
    content = {"words": tf.words, "lower": tf.words, "bytes": lambda: tf.bytes_pairs(space=True)}.get(
        kind, lambda: tf.unigram(kind)
    )()
    if kind == "lower":
        content["normalizer"] = {"type": "Lowercase"}
    size = len(content["model"]["vocab"])
    content["added_tokens"] = [tf.added("<x>", size, *flags), tf.added("<s>", size + 1, "special")]
    if kind != "bytes":
        content["added_tokens"][1]["id"] = 4 if kind in ("words", "lower") else 16
    folder = tf.write(tmp_path, content)
    library, t = tf.library(folder), load_tokenizer(folder)
    assert t.notes == (["tokenizer.json gives '<s>' the id 265, but the tokenizers library 262: 262 holds"]
                       if kind == "bytes" else [])  # fmt: skip
    for text in TEXTS:
        assert t.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids, text
        if "special" not in flags:  # then the token is text, and found in every text
            assert t.encode(text.replace("<s>", "")) == library.encode(text.replace("<s>", "")).ids
    # The same properties hold for the user's own literal of MASK, and for what a chat template writes.
    if "single_word" not in flags and "normalized" not in flags:
        for text in TEXTS:
            assert t._encode_special(text, False, str) == library.encode(text, add_special_tokens=False).ids


def test_the_users_mask_is_found_as_the_tokenizers_own(tmp_path):
    mask = tf.added("<mask>", 6, "special", "lstrip")
    t = load_tokenizer(tf.write(tmp_path, tf.unigram() | {"added_tokens": [mask | {"id": 17}]}))
    assert t.mask_id == 17 and t.encode("a [MASK] b", special=True) == t.encode("a <mask> b", special=True) == [
        5, 17, 1, 3]  # fmt: skip
    moved = t.of_model(30, None, None)
    assert moved.encode("a [MASK] b<mask>", special=True) == [5, 30, 1, 3, 30]


def test_files_beside_tokenizer_json_win(tmp_path):
    decoder = {"7": {"content": "<x>", "lstrip": True, "special": True}, "8": {"content": "<y>", "special": False}}
    content = tf.words() | {"added_tokens": [tf.added("<x>", 7)]}
    t = load_tokenizer(tf.write(tmp_path / "a", content, tokenizer_config={"added_tokens_decoder": decoder}))
    assert t.encode("a <x>b <y>") == [1, 0, 8] and t.encode("a <x> b", special=True) == [1, 7, 2]
    assert t.own_size == 9 and t.bos_id == 4
    content = tf.unigram() | {"added_tokens": [tf.added("<x>", 17)]}
    decoder["17"] = decoder.pop("7")
    del decoder["8"]
    spaces = [load_tokenizer(tf.write(tmp_path / name, content, tokenizer_config={"added_tokens_decoder": each}))
              for name, each in (("b", {}), ("c", decoder))]  # fmt: skip
    assert [t.encode("a <x>", special=True) for t in spaces] == [[5, 1, 17], [5, 17]]
    assert spaces[0].sha256 != spaces[1].sha256


def test_ids_that_the_library_does_not_give(tmp_path):
    t = load_tokenizer(tf.write(tmp_path / "a", tf.words() | {"added_tokens": [tf.added("<x>", 90, "special")]}))
    assert t.encode("a <x>", special=True) == [1, 7] and t.size == 11 and "the id 90" in t.notes[0]
    gap = {"added_tokens_decoder": {"9": {"content": "<y>"}}}
    t = load_tokenizer(tf.write(tmp_path / "b", tf.words(), tokenizer_config=gap))
    assert "leave a gap: '<y>'" in t.notes[0] and t.own_size == 10
    assert t.encode("<y>") == t.encode("<y>", special=True) == [0]
    odd = {"additional_special_tokens": "ab", "extra_special_tokens": {"content": "a"}}  # no lists
    t = load_tokenizer(tf.write(tmp_path / "c", tf.words(), tokenizer_config=odd))
    assert t.encode("a b ab", special=True) == [1, 2, 3] and t.encode("a b ab") == [0, 2, 0]


def test_truncation_and_padding_left_in_the_file(tmp_path):
    content = tf.words() | {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
    }  # fmt: skip
    t = load_tokenizer(tf.write(tmp_path, content, tokenizer_config={"clean_up_tokenization_spaces": True}))
    assert t.encode_text("a b a", special=True) == t.encode("a b a") == [1, 2, 1]
    assert "truncation and padding are not applied" in t.notes[0] and "clean_up" in t.notes[1]


def sentencepiece_folder(folder, change=lambda proto: None, config=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    options = {"hard_vocab_limit": False, **options}
    raw = train_prefixing(LINES, folder / "tokenizer.model", **options).read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
    change(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def test_sentencepiece_flags(tmp_path):
    config = {"bos_token": "<s>", "add_bos_token": True}
    t = load_tokenizer(sentencepiece_folder(tmp_path / "a", config=config))
    assert t.prefix == (1,) and t.encode_text("The fox")[:1] == [1] and t.encode("The fox")[0] != 1
    plain = load_tokenizer(sentencepiece_folder(tmp_path / "b"))
    assert plain.prefix == () and plain.encode("The fox") == t.encode("The fox") and plain.sha256 != t.sha256
    bare = load_tokenizer(sentencepiece_folder(tmp_path / "c", config={"add_prefix_space": False}))
    assert bare.encode("The fox") == plain.encode("The fox", continuation=True) != plain.encode("The fox")
    assert bare.sha256 != plain.sha256 and bare.decode(bare.encode(" The")) == " The"
    newer = load_tokenizer(sentencepiece_folder(tmp_path / "d", config={"legacy": False}))
    assert newer.encode("<s>The", special=True) == [1, *plain.encode("The", continuation=True)]
    sampling = {"sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}}
    t = load_tokenizer(sentencepiece_folder(tmp_path / "e", config=sampling))
    assert {tuple(t.encode("The small fox")) for _ in range(20)} == {tuple(plain.encode("The small fox"))}
    assert "sp_model_kwargs" in t.notes[0]

    def suffix(proto):
        proto.trainer_spec.treat_whitespace_as_suffix = True

    with pytest.raises(UserError, match="treat_whitespace_as_suffix"):
        load_tokenizer(sentencepiece_folder(tmp_path / "f", suffix))


def test_text_never_has_the_id_of_a_control_token(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    size = load_tokenizer(folder).own_size
    (folder / "added_tokens.json").write_text(json.dumps({"<a b>": size, "<mask>": size}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_id == size not in tokenizer.encode("<a b>") and tokenizer.decode([size]) == "[MASK]"
    assert any("give '<a b>' the id of a control token" in note for note in tokenizer.notes)


def test_sentencepiece_roles_among_the_pieces(tmp_path):
    """A user-defined piece with the name of a role has the role; SentencePiece alone would find it in any text."""
    folder = sentencepiece_folder(tmp_path, user_defined_symbols=["<|eot_id|>", "<tool>"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    t = load_tokenizer(folder)
    assert t.eot_id == 3 and t.mask_id == t.own_size and 3 in processor.encode("a <|eot_id|>")
    assert 3 not in t.encode("a <|eot_id|> <tool>") and 4 in t.encode("a <|eot_id|> <tool>")
    assert t.encode("a<|eot_id|>", special=True)[-1] == 3 and t.decode([3]) == "<|eot_id|>"
    assert t.decode(t.encode("a <|eot_id|>")) == "a <|eot_id|>" and t.token_bytes()[3] == 0


def test_the_same_ids_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    chat = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}<x>{% endfor %}"
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": chat}
    names = [tf.added("<x>", 17, "special", "lstrip"), tf.added("<s>", 16, "special")]
    for name, content, config in (
        ("plain", tf.unigram() | {"added_tokens": names}, {}),
        ("first", tf.unigram("first") | {"added_tokens": names}, {"add_bos_token": False, "add_prefix_space": True}),
        ("front", tf.unigram() | {"added_tokens": names, "post_processor": tf.front_and_behind([("<s>", 16)])}, {}),
        ("vocabulary", tf.unigram(), {"eos_token": "\u2581<s>"}),
        ("decoder", tf.unigram() | {"added_tokens": [tf.added("<x>", 17)]},
         {"added_tokens_decoder": {"17": {"content": "<x>", "rstrip": True, "lstrip": False, "normalized": False,
                                          "single_word": False, "special": True}}}),
    ):  # fmt: skip
        folder = tf.write(tmp_path / name, content, tokenizer_config=kind | config)
        t, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("a b", "ab <x> ab", "a <x>b<s> a", ""):
            assert t.encode_text(text, special=True) == theirs(text)["input_ids"], (name, text)
        messages = [{"role": "a", "content": "ab a"}, {"role": "b", "content": " b"}]
        found = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert t.encode_chat(messages, add_generation_prompt=False) == found


def test_two_tokens_with_one_id_are_told(tmp_path):
    """In a vocabulary with holes, the library gives an added token the next id by count, which may be taken."""
    content = tf.words(vocab={"<unk>": 0, "a": 1, "b": 3}) | {"added_tokens": [tf.added("<s>", 4, "special")]}
    tokenizer = load_tokenizer(tf.write(tmp_path, content))
    assert tokenizer.bos_id == 3 == tf.library(tmp_path).token_to_id("<s>")
    assert "'<s>' has the id 3, as the piece 'b' of ordinary text has: they look the same" in tokenizer.notes


@pytest.mark.parametrize(
    "decoder",
    [{"x": {"content": "y"}}, {"7": {}}, {"7": "y"}, {"-7": {"content": "y"}}, {"9" * 10: {"content": "y"}}, [1]],
)
def test_odd_added_tokens_are_refused_by_file(tmp_path, decoder):
    folder = tf.write(tmp_path, tf.words(), tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(UserError, match="tokenizer_config.json: added_tokens_decoder must have the form"):
        load_tokenizer(folder)


def test_an_id_that_no_vocabulary_has_is_refused(tmp_path):
    """Arrays over all ids would fill the memory."""
    with pytest.raises(UserError, match="the files give a token the id 4000000000"):
        load_tokenizer(tf.write(tmp_path, tf.words(vocab={"<unk>": 0, "a": 4_000_000_000})))


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_an_id_beside_a_sentencepiece_model_that_no_vocabulary_has_is_refused(tmp_path, name):
    """Tables over all ids took gigabytes before the refusal, or the machine's memory."""
    train_prefixing(["The small fox said nothing, one two three."] * 20, tmp_path / "tokenizer.model",
                    hard_vocab_limit=False)  # fmt: skip
    described = {"added_tokens_decoder": {"999999999": {"content": "<x>"}}}
    content = {"<x>": 2**70} if name == "added_tokens.json" else described
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the files give a token the id ({2**70}|999999999)"):
        load_tokenizer(tmp_path)
