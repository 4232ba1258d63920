"""Tokenizers: exact round trips, control tokens, published folders, and training."""

import json
import random

import numpy as np
import pytest
import tokenizers
from prefixing import train_prefixing

from llada_jax.config import UserError
from llada_jax.text import tokenizer as tokenizer_module
from llada_jax.text import train_tokenizer as training
from llada_jax.text.tokenizer import find_tokenizer, load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

LINES = [
    f"{'  ' * (i % 4)}The {a} {b} walked {i} miles; it was {c}, and nobody said a word.\n"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("small", "quiet", "green", "tired")
        for b in ("fox", "engine", "child", "river")
        for c in ("late", "cold", "fine", "odd")
    )
]
ODD_TEXTS = (
    "",
    " ",
    "   two  spaces ",
    "\ttab\r\nwindows\rmac\n\n",
    "nul \0 in it",
    "\u2581 and \u2581\u2581 are no spaces \u2585",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 and e\u0301 \u00e9",
    "\ufeffbom \ufffd \ue000 \U0010ffff",
    "<0x0A> <s> </s> <unk> [MASK] <|mdm_mask|> <|eot_id|>",
)
PUBLISHED = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "mask": "<|mdm_mask|>"}
CHAT = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def random_text(rng: random.Random) -> str:
    odd = "ab  \n\t\r\0\u2581\u2585\u2047\ufeff\u200d\u0301\u00e9\U0001f600\x7f\x85\u2028<>0xA[MASK]|_"
    ranges = ((0, 0xD800), (0xE000, 0x110000))
    return "".join(
        rng.choice(odd) if rng.random() < 0.7 else chr(rng.randrange(*rng.choice(ranges)))
        for _ in range(rng.randrange(30))
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(LINES, 400, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def prefixing(tmp_path_factory):
    """Returns a tokenizer of SentencePiece's usual kind, which puts a space in front of every text."""
    path = train_prefixing((line.strip() for line in LINES), tmp_path_factory.mktemp("prefixing") / "some.model")
    return load_tokenizer(path)


def byte_level(folder, special=(), config=None):
    """Writes a Hugging Face folder with a byte-level BPE tokenizer and these special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        LINES, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    model.add_special_tokens(list(special))
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return load_tokenizer(byte_level(tmp_path_factory.mktemp("hf")))


@pytest.fixture(params=["trained", "prefixing", "hugging_face"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def test_text_comes_back_exactly(any_tokenizer):
    rng = random.Random(0)
    for text in [*ODD_TEXTS, *(random_text(rng) for _ in range(1500))]:
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_text_in_parts_comes_back_exactly(any_tokenizer):
    first, second = "The small fox \n", " walked, \u2581 and"
    ids = any_tokenizer.encode(first) + any_tokenizer.encode(second, continuation=True)
    assert any_tokenizer.decode(ids) == first + second
    tail = any_tokenizer.encode(second, continuation=True)
    assert any_tokenizer.decode(tail, continuation=True) == second


def test_parts_after_a_metaspace_prefix(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    model.train_from_iterator(LINES, tokenizers.trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("The small") + tokenizer.encode("er fox", continuation=True)
    assert tokenizer.decode(ids) == "The smaller fox"


def test_training_meets_the_size_and_repeats_itself(trained, tmp_path):
    assert trained.size == 400
    assert trained.vocab_size == 512
    again = train_tokenizer(iter(LINES), 400, tmp_path)
    assert again.sha256 == trained.sha256
    assert load_tokenizer(tmp_path).encode(LINES[3]) == trained.encode(LINES[3])
    assert len(trained.encode(LINES[3])) < len(LINES[3]) / 2  # training did learn pieces


@pytest.mark.parametrize("size", [10, 260, 10**6])
def test_training_size_that_does_not_suit_the_text(size, tmp_path, capfd):
    with pytest.raises(UserError, match=rf"train_tokenizer={size} is too (small|large) .*: \d+ is the") as error:
        train_tokenizer(LINES, size, tmp_path / "new")
    limit = int(str(error.value).split(": ")[1].split()[0])
    assert train_tokenizer(LINES, limit, tmp_path / "new").size == limit  # the size that the message suggests works
    assert capfd.readouterr().err == ""


def test_training_without_text(tmp_path):
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 400, tmp_path)


def test_training_sample_is_bounded_and_spread(monkeypatch):
    monkeypatch.setattr(training, "SAMPLE_BYTES", 40_000)
    documents = [f"{i:08d}" * 100 for i in range(1000)]
    sample = training._sample(iter(documents))
    assert 10_000 < sum(map(len, sample)) <= 40_000
    places = [int(text[:8]) for text in sample]
    assert places == sorted(places)
    assert sum(place >= 500 for place in places) > len(places) / 4
    assert sum(place < 500 for place in places) > len(places) / 4


def test_control_tokens_only_on_request(any_tokenizer):
    t = any_tokenizer
    control = {t.bos_id, t.eos_id, t.mask_id, t.start_header_id, t.end_header_id, t.eot_id}
    assert len(control) == 6
    for i in control:
        literal = t.decode([i])
        assert t.encode(literal, special=True) == [i]
        pure = t.encode(f"x {literal} y")
        assert control.isdisjoint(pure)
        assert t.decode(pure) == f"x {literal} y"
        assert t.token_bytes()[i] == 0
        assert t.decode([i], skip_special=True) == ""
    assert t.decode([t.mask_id]) == "[MASK]"
    prompt = "The [MASK] fox[MASK]<|eot_id|>"
    assert t.encode(prompt, special=True).count(t.mask_id) == 2
    assert t.decode(t.encode(prompt, special=True)) == prompt
    assert t.decode(t.encode(prompt, special=True), skip_special=True) == "The  fox"
    assert t.encode("<|mdm_mask|>", special=True) == [t.mask_id]


def test_lacking_tokens_are_appended_in_order(prefixing, hugging_face):
    sp = prefixing
    assert (sp.bos_id, sp.eos_id) == (1, 2)
    assert (sp.mask_id, sp.start_header_id, sp.end_header_id, sp.eot_id, sp.size) == (400, 401, 402, 403, 404)
    hf = hugging_face
    assert (hf.bos_id, hf.eos_id, hf.mask_id) == (400, 401, 402)
    assert (hf.start_header_id, hf.end_header_id, hf.eot_id, hf.size) == (403, 404, 405, 406)
    assert sp.vocab_size == hf.vocab_size == 512


def test_decode_takes_any_ids(any_tokenizer):
    t = any_tokenizer
    assert t.decode([t.size, 10**9, -1]) == "\ufffd" * 3
    assert t.decode([t.size, -1], skip_special=True) == ""
    assert t.decode(np.array(t.encode("fox"), np.int32)) == "fox"
    for i in range(t.size):
        assert isinstance(t.decode([i]), str)
    ids = t.encode("\U0001f600")
    assert len(ids) > 1  # the character is encoded as bytes
    assert t.decode(ids) == "\U0001f600"
    assert "\ufffd" in t.decode(ids[:-1])
    # Decoding does not fail if a control token stands between the bytes of a character.
    assert "[MASK]" in t.decode([*ids[:2], t.mask_id, *ids[2:]])


def test_token_bytes(trained, hugging_face):
    rng = random.Random(1)
    for t in (trained, hugging_face):
        counts = t.token_bytes()
        assert counts.dtype == np.int32
        assert counts.shape == (t.size,)
        for text in [*ODD_TEXTS, *(random_text(rng) for _ in range(200))]:
            assert counts[t.encode(text)].sum() == len(text.encode())


def test_save_and_load(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "copy")
    copy = find_tokenizer(tmp_path / "copy")
    assert copy.sha256 == any_tokenizer.sha256
    assert copy.encode("The [MASK]", special=True) == any_tokenizer.encode("The [MASK]", special=True)


def test_published_folder(tmp_path):
    special = [*PUBLISHED.values(), "[CLS]", *CHAT]
    config = {"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|endoftext|>"}
    t = load_tokenizer(byte_level(tmp_path, special, config))
    assert [t.bos_id, t.eos_id, t.mask_id] == [400, 401, 402]
    assert [t.start_header_id, t.end_header_id, t.eot_id] == [404, 405, 406]
    assert t.size == 407  # no token is appended
    assert t.encode("[CLS]<|eot_id|>", special=True) == [403, 406]
    assert 403 not in t.encode("[CLS]")
    assert load_tokenizer(tmp_path / "tokenizer.json").sha256 == t.sha256


def test_names_of_the_config_win(tmp_path):
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    t = load_tokenizer(byte_level(tmp_path / "a", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], config))
    assert (t.bos_id, t.eos_id, t.mask_id) == (400, 401, 403)
    bare = load_tokenizer(byte_level(tmp_path / "b", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]))
    assert (bare.bos_id, bare.eos_id) == (403, 402)
    assert bare.sha256 != t.sha256  # the same tokenizer.json with other roles


def test_tokens_that_only_the_config_knows(tmp_path):
    decoder = {"402": {"content": "<|mdm_mask|>", "special": True}}
    t = load_tokenizer(byte_level(tmp_path, ["<|endoftext|>"], {"added_tokens_decoder": decoder}))
    assert (t.mask_id, t.bos_id, t.size) == (402, 403, 407)
    assert t.decode([402]) == "[MASK]"


def test_tokens_that_files_add_to_sentencepiece(trained, tmp_path):
    """The model has 396 pieces. Tokens that the files add keep the ids given there; appended tokens come after them."""
    trained.save(tmp_path)
    decoder = {"0": {"content": "<unk>", "special": True}, "396": {"content": "<pad>", "special": True}}
    decoder |= {"397": {"content": "<mask>", "special": True}, "399": {"content": "<tool>"}}
    config = {"added_tokens_decoder": decoder, "mask_token": {"content": "<mask>"}, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<end>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": 397, "<end>": 401}))
    t = load_tokenizer(tmp_path)
    assert (t.own_size, t.bos_id, t.eos_id, t.mask_id) == (402, trained.bos_id, 401, 397)
    assert (t.start_header_id, t.end_header_id, t.eot_id, t.size) == (402, 403, 404, 405)
    assert t.encode("The [MASK]<pad><end>", special=True)[-3:] == [397, 396, 401]
    assert t.decode([397, 396, 400, 401]) == "[MASK]<pad>\ufffd<end>"
    plain = "The <pad> <mask><tool> small<tool>"  # <tool> is not special, so it is found in any text
    assert t.encode(plain).count(399) == 2 and not {396, 397, 401} & set(t.encode(plain))
    assert t.decode(t.encode(plain)) == plain
    assert t.token_bytes()[[396, 399, 400]].tolist() == [0, 6, 0]
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == t.sha256
    t.save(tmp_path / "copy")
    assert find_tokenizer(tmp_path / "copy").sha256 == t.sha256 != trained.sha256


def test_what_files_say_of_the_pieces_changes_no_tokenizer(trained, tmp_path):
    """Most published folders describe the pieces too. A run must recognise the tokenizer that it was trained with."""
    trained.save(tmp_path)
    pieces = ("<unk>", PUBLISHED["bos"], PUBLISHED["eos"])
    decoder = {str(i): {"content": name, "special": True} for i, name in enumerate(pieces)}
    config = {"added_tokens_decoder": decoder, "bos_token": PUBLISHED["bos"], "eos_token": PUBLISHED["eos"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    t = load_tokenizer(tmp_path)
    assert t.sha256 == trained.sha256 and t.roles == trained.roles and t.size == trained.size


def test_sha256_stays_what_it_was():
    """A resumed run is compared with its earlier start by this hash."""

    class Backend:
        kind, size, special, named = "huggingface", 7, {"</s>": 2, "<x>": 5}, {"eos": "</s>"}
        files = {"tokenizer.json": b"{}"}  # noqa: RUF012
        absent = added = found = {}  # noqa: RUF012
        searched = settings = notes = ()

        def around(self, ids):
            return (), ()

    wanted = "9a62458929b1773e1ea534f3fd2a74f0994d748e4caa65ef4606f0c3e5cf60ed"
    assert tokenizer_module.Tokenizer(Backend()).sha256 == wanted


def test_the_models_own_ids(any_tokenizer):
    t = any_tokenizer
    m = t.of_model(mask_id=510, bos_id=None, eos_id=500)
    assert (m.mask_id, m.eos_id, m.bos_id, m.size) == (510, 500, t.bos_id, 511) and m.sha256 == t.sha256
    assert m.encode("The [MASK]<|mdm_mask|>", special=True)[-2:] == [510, 510]
    assert m.decode([510, 500], skip_special=True) == "" and m.decode([510]) == "[MASK]"
    assert m.encode(m.decode([500]), special=True) == [500]
    assert (m.start_header_id, m.end_header_id, m.eot_id) == (t.start_header_id, t.end_header_id, t.eot_id)
    assert m.token_bytes().shape == (511,) and m.encode("The fox [MASK]") == t.encode("The fox [MASK]")
    same = t.of_model(t.mask_id, t.bos_id, t.eos_id)
    assert same.roles == t.roles and same.size == t.size
    nothing = t.of_model(None, None, None)
    assert nothing.roles == t.roles
    moved = t.of_model(t.eot_id, None, None)  # the appended token of another role moves to a new id
    assert moved.mask_id == t.eot_id and moved.eot_id == t.size and len({i for i, _ in moved.roles.values()}) == 6


def test_a_models_ids_that_the_tokenizer_has(tmp_path):
    special = [*PUBLISHED.values(), "[CLS]", *CHAT]
    t = load_tokenizer(byte_level(tmp_path, special))
    tuned = t.of_model(mask_id=403, bos_id=None, eos_id=t.eot_id)
    assert tuned.roles["mask"] == (403, "[CLS]") and tuned.encode("[MASK][CLS]", special=True) == [403, 403]
    assert tuned.decode([402]) == "<|mdm_mask|>"
    assert tuned.eos_id == t.eos_id, "the model's EOS is its end of turn: both end a text"


def test_no_tokenizer(tmp_path):
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_tokenizer(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00{not a tokenizer")
    with pytest.raises(UserError, match="cannot be read as a") as error:
        find_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
