"""The boundary of context and answer: which tokens are scored, given which."""

import json
from types import SimpleNamespace

import pytest
import tokenizer_folders as tf
from lm_eval.api.model import TemplateLM

from llada_jax.config import UserError
from llada_jax.evaluation.pairs import CONTROL, END, Encoder
from llada_jax.text.tokenizer import load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

TEXT = "The little lion looked, and the lantern lit the long lane to London."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT + "\n"] * 30, 351, tmp_path_factory.mktemp("t"))


def by_count(tokenizer, context, answer):
    """Returns the pair as lm_eval itself encodes it: it cuts the whole text by the number of the context's tokens."""
    model = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    return TemplateLM._encode_pair(model, context, answer)


def test_every_cut_of_a_text(tokenizer):
    """Prompt and answer together are the text, and no answer is empty; cut by count, some answers are."""
    encoder, empty, other, same = Encoder(tokenizer), 0, 0, 0
    for at in range(1, len(TEXT)):
        context, answer = TEXT[:at], TEXT[at : at + 1]
        prompt, ids = encoder.pair(context, answer)
        space = len(context) - len(context.rstrip())
        assert tokenizer.decode(ids, continuation=True) == context[at - space :] + answer
        assert tokenizer.decode(prompt) == context.rstrip() and prompt == tokenizer.encode(context.rstrip())
        old = by_count(tokenizer, context, answer)
        empty += not old[1]
        other += bool(old[1]) and tokenizer.decode(old[1], continuation=True) != context[at - space :] + answer
        if [*old[0], *old[1]] == [*prompt, *ids]:  # no token reaches over the boundary: nothing changes
            assert (prompt, ids) == old
            same += 1
    assert empty > 5 and other > 0 and same > 10


def test_ordinary_pairs_stay_what_they_were(tokenizer):
    encoder = Encoder(tokenizer)
    for context, answer in (("The little", " lion"), ("The little lion ", "looked"), ("and\n\n", "the"), ("a", "")):
        assert encoder.pair(context, answer) == by_count(tokenizer, context, answer)
    assert encoder.pair("", " lion") == ([], tokenizer.encode(" lion"))
    assert encoder.pair(" \n", "lion") == ([], tokenizer.encode(" \nlion"))
    prompt, ids = encoder.pair("The l", "i")  # "li" is one token of the whole text
    assert (prompt, ids) == (tokenizer.encode("The l"), tokenizer.encode("i", continuation=True))
    assert ids and by_count(tokenizer, "The l", "i")[1] == []


def test_the_answer_after_a_chat_template_begins_with_its_own_first_token(tokenizer):
    encoder, start, eot = Encoder(tokenizer), "<|start_header_id|>", "<|eot_id|>"
    messages = [{"role": "user", "content": "The lion"}]
    chat = tokenizer.render_chat(messages)
    assert chat.endswith("\n\n")
    marked = "".join(CONTROL + part if part in tokenizer._special else part
                     for part in tokenizer.control_pattern.split(chat))  # fmt: skip
    prompt, ids = encoder.pair(marked + END, "lit")
    assert prompt == tokenizer.encode_chat(messages) and ids == tokenizer.encode("lit", continuation=True)
    answered = tokenizer.encode_answer([*messages, {"role": "assistant", "content": "lit"}])
    assert answered == (prompt, [*ids, tokenizer.eot_id]), "as in training"
    assert encoder.text(marked + END) == prompt
    # What was begun of the answer is plain text: its last white space belongs to what follows.
    prompt, ids = encoder.pair(marked + END + f"the {eot}{start} ", "lane")
    assert prompt == [*answered[0], *tokenizer.encode(f"the {eot}{start}", continuation=True)]
    assert tokenizer.decode(ids, continuation=True) == " lane"


def test_a_tokenizer_that_puts_bos_in_front(tmp_path):
    names = [tf.added("<s>", 16, "special"), tf.added("<x>", 17, "special")]
    content = tf.unigram() | {"added_tokens": names, "post_processor": tf.front_and_behind([("<s>", 16)])}
    t = load_tokenizer(tf.write(tmp_path, content))
    encoder = Encoder(t)
    assert encoder.text("a b") == tf.library(tmp_path).encode("a b").ids == [16, 5, 1, 3]
    assert encoder.text("a b", prefix=False) == [5, 1, 3] and encoder.text("") == [16]
    assert encoder.pair("a", " b") == ([16, 5], [1, 3]) and encoder.pair("", "ab") == ([16], [6])
    # A chat has what its template writes, and its answer is the continuation of the chat, as in training.
    assert encoder.pair(f"a{CONTROL}<x>{END}", "ab") == ([5, 17], t.encode("ab", continuation=True)) == ([5, 17], [4])


def test_an_answer_without_any_token_is_refused(tmp_path):
    content = tf.words() | {"normalizer": {"type": "Replace", "pattern": {"String": "b"}, "content": ""}}
    encoder = Encoder(load_tokenizer(tf.write(tmp_path, content)))
    assert encoder.pair("a", "") == ([1], [])
    with pytest.raises(UserError, match="no token of the answer 'b'"):
        encoder.pair("a", "b")
    assert json.dumps(encoder.pair("a ", "a")) == "[[1], [1]]"
    for call in (lambda text: encoder.pair("a", text), lambda text: encoder.pair(text, "a"), encoder.text):
        with pytest.raises(UserError, match="a text of the task is not UTF-8 text"):
            call("a\ud800")
