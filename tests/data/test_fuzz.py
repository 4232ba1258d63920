"""Feeds generated files and lines to the readers: each is read rightly, or is told in one line that names the place.

The tests marked `slow` do the same with many more examples.
"""

import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_folders import make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_jax.config import UserError
from llada_jax.data.prepare.conversations import Conversations
from llada_jax.data.prepare.shapes import read_line
from llada_jax.data.prepare.text import Corpus
from llada_jax.text.tokenizer import load_tokenizer

FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

CHARACTERS = 'abc \n\r\t\0\x1f\x85\u00a0\u00ad\u200b\u2028\u3164\ufeff\ufffd\u00e9\u4e2d\U0001f600{}[]"\\'
TEXT = st.text(st.sampled_from(CHARACTERS), max_size=12) | st.text(max_size=8)
SPEAKING = st.text(st.sampled_from("abc \u00e9\u4e2d"), max_size=8).map(lambda text: f"a{text}")
SCALAR = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))


def no_word(text: str) -> bool:
    """Returns whether a text of CHARACTERS or of other generated characters says nothing, computed in another way."""
    import unicodedata

    rest = [c for c in text if not c.isspace() and c not in "\u034f\u115f\u1160\u2800\u3164\uffa0"]
    return not [c for c in rest if unicodedata.category(c) not in ("Cc", "Cf", "Zs", "Zl", "Zp")]


def documents(texts):
    return [text.lstrip("\ufeff") for text in texts if not no_word(text.lstrip("\ufeff"))]


PACKS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
BAD_LINES = st.sampled_from(
    [b"{", b"[1]", b'{"text": 1}', b'{"text": "\\ud800"}', b"\xff", b'"text"', b"nul", b'{"text": "a", "text": "b"}',
     b'{"texts": "a"}', b"[" * 50_000, b'{"text": "a"} x', b"\xef\xbb\xbf\xef", b"{'text': 'a'}", b"\0", b"NaN"]
)  # fmt: skip
MORE = st.fixed_dictionaries({}, optional={"id": SCALAR, "meta": VALUE, "n": st.just(10**5000)})


@st.composite
def jsonl(draw):
    """Draws the content of a .jsonl file, with its texts and the number of its bad lines."""
    lines, texts, bad = [], [], 0
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.integers(0, 4)) == 0:
            lines.append(draw(BAD_LINES))
            bad += 1
            continue
        text, more = draw(TEXT), draw(MORE)
        huge = more.pop("n", None)
        line = json.dumps({**more, "text": text}, ensure_ascii=draw(st.booleans())).encode("utf-8", "replace")
        lines.append(line[:-1] + b', "n": ' + b"9" * 5000 + b"}" if huge else line)
        texts.append(text)
    ends = [draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n", b"\n\xef\xbb\xbf"])) for _ in lines]
    content = b"".join(line + end for line, end in zip(lines, ends, strict=True))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content, texts, bad


def check_jsonl(case, ending):
    content, texts, bad = case
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a.jsonl{ending}"
        file.write_bytes(PACKS[ending](content))
        corpus = Corpus([str(file)], on_error="skip")
        assert [piece.text for piece in corpus] == documents(texts)
        assert corpus.good == len(texts) and corpus.faults._counts.total() == bad
        assert_one_line(lambda: list(Corpus([str(file)])), f"{file}, line ", must=bad > 0)


def assert_one_line(function, place, must=None):
    """Calls a function that works, or raises UserError with one line that names a place."""
    try:
        function()
    except UserError as error:
        assert place in str(error) and len(str(error).splitlines()) == 1 and must is not False, str(error)
    else:
        assert not must


@given(jsonl(), st.sampled_from(list(PACKS)))
@FEW
def test_lines(case, ending):
    check_jsonl(case, ending)


@given(st.lists(TEXT, max_size=3).map("".join) | st.binary(max_size=40), st.sampled_from(list(PACKS)), st.booleans())
@FEW
def test_text_files(content, ending, long):
    check_txt(content, ending, long)


def check_txt(content, ending, long):
    data = content if isinstance(content, bytes) else content.encode()
    data = b"a line of text\n" * 5000 + data if long else data
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a.txt{ending}"
        file.write_bytes(PACKS[ending](data))
        corpus = Corpus([str(file)], on_error="skip")
        pieces = list(corpus)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            assert not pieces and corpus.faults._counts.total() == 1
            assert_one_line(lambda: list(Corpus([str(file)])), str(file), must=True)
            return
        if corpus.faults._counts.total():  # a few bytes that look like UTF-16
            assert not pieces and 0 in data
        else:
            assert "".join(piece.text for piece in pieces) == "".join(documents([text]))
            assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


KINDS = st.sampled_from([
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
])  # fmt: skip


@given(st.lists(TEXT | st.none(), max_size=6), KINDS, st.integers(1, 3), st.booleans())
@FEW
def test_columns(texts, kind, rows, nested):
    valid = [text and text.encode("utf-8", "replace").decode() for text in texts]
    column = pa.array(valid, pa.string()).cast(kind)
    table = {"a": pa.StructArray.from_arrays([column], ["b"])} if nested else {"a.b": column}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.parquet"
        # pyarrow cannot write a part of a column of string views
        pq.write_table(pa.table(table), file, row_group_size=9 if kind == pa.string_view() else rows)
        corpus = Corpus([str(file)], "a.b", on_error="skip")
        assert [piece.text for piece in corpus] == documents([text for text in valid if text is not None])
        assert corpus.faults._counts.total() == valid.count(None)
        assert_one_line(lambda: list(Corpus([str(file)], "a.b")), f"{file}, row ", must=None in valid)
        file.write_bytes(file.read_bytes()[:-rows])
        assert_one_line(lambda: list(Corpus([str(file)], "a.b")), str(file), must=True)


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "x<|eot_id|>"])
MARKS = {name: st.sampled_from([0, 1, True, 0.0, 0.5, None, "yes"]) for name in ("weight", "train", "mask", "loss")}
CALLS = st.lists(
    st.fixed_dictionaries({
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": TEXT, "arguments": VALUE | st.just('{"a": 1}') | st.just({"a": 1})}),
    }),
    max_size=2,
)  # fmt: skip
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": SPEAKING})
CONTENT = SPEAKING | SPEAKING | st.lists(PART, max_size=2) | VALUE
MORE_OF_A_MESSAGE = {"tool_calls": CALLS | VALUE, "reasoning_content": SPEAKING, "name": SPEAKING, **MARKS}
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional=MORE_OF_A_MESSAGE)
SAID = st.fixed_dictionaries({"from": ROLES, "value": CONTENT}, optional=MARKS)
DIALOGUE = st.lists(MESSAGE | SAID, max_size=3).map(
    lambda more: [*more, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
)
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("response", "output", "answer", "completion")
BESIDE = st.fixed_dictionaries({}, optional={
    **{name: SPEAKING | VALUE for name in ("system", "system_prompt", "input", "context", "choices", "chosen", "id")},
    **{name: SPEAKING for name in ("source", "text", "responses", "rejected", "reasoning")},
    "history": st.lists(st.lists(SPEAKING, min_size=2, max_size=2), max_size=2) | VALUE,
    "tools": st.just([{"type": "function"}]) | st.just('[{"name": "f"}]') | VALUE,
    "enable_thinking": st.booleans(), "label": st.booleans(), "images": st.lists(TEXT, max_size=1), **MARKS,
})  # fmt: skip
LINE = st.one_of(
    st.dictionaries(st.sampled_from(["messages", "conversations"]), DIALOGUE, min_size=1, max_size=1),
    st.tuples(st.sampled_from(QUESTIONS), SPEAKING | VALUE, st.sampled_from(ANSWERS), SPEAKING | VALUE).map(
        lambda four: {four[0]: four[1], four[2]: four[3]}
    ),
    st.just({}),
)


def check_line(line, beside, few):
    names = sorted(beside)[:2] if few else beside
    check_keys({**line, **{name: beside[name] for name in names}})


def check_keys(record):
    """Checks that a line is refused in one line, or that each of its keys has an effect or is listed."""

    def read(record):
        try:
            return read_line(record, "a.jsonl, line 1")
        except UserError as error:
            assert str(error).startswith("a.jsonl, line 1: ") and len(str(error).splitlines()) == 1 and error.kind
            return None

    if (found := read(record)) is None:
        return
    assert all(i < len(found.messages) and found.messages[i]["role"] == "assistant" for i in found.masked)
    for key, value in record.items():
        if value in (None, "", [], {}, "[]") or key in found.unread:
            continue
        neutral = key in MARKS and bool(value) != (key == "mask")  # says that answers are learned, as they always are
        same = value == found.messages[0]["content"]  # a system message that is also the first message
        assert neutral or same or read({k: v for k, v in record.items() if k != key}) != found, key


@given(LINE, BESIDE, st.booleans())
@FEW
def test_no_key_of_a_line_is_passed_over(line, beside, few):
    check_line(line, beside, few)


@given(VALUE)
@FEW
def test_lines_of_anything(record):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_text(json.dumps(record) + "\n")
        assert_one_line(lambda: list(Conversations([str(file)])), f"{file}, line 1", must=True)


HEAD = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
END = "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
TEMPLATES = [
    None,
    HEAD + "{{ m.content }}" + END,
    HEAD + "{% for part in m.content %}{{ part.text }}{% endfor %}" + END,
    HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    + END,
    HEAD + "{{ m.content.split('</think>')[-1] }}" + END + "{% if add_generation_prompt %}<think>\n{% endif %}",
    "{{ tools | tojson if tools }}" + HEAD + "{{ m | tojson }}" + END,
    HEAD + "{% generation %}{{ m.content }}{% endgeneration %}" + END,
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return [load_tokenizer(make_folder(folder / str(i), template)) for i, template in enumerate(TEMPLATES)]


def check_chat(tokenizer, messages, variables):
    """Checks that a chat is refused in one line, or that prompt and answer are what the template writes."""
    try:
        prompt, answer = tokenizer.encode_answer(messages, variables)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    turns = 1 if tokenizer.chat_template is None else 0
    assert prompt == tokenizer.encode_chat(messages[:-1], variables=variables)
    assert prompt.count(tokenizer.bos_id) == turns and prompt.count(tokenizer.eot_id) == len(messages) - 1
    assert answer.count(tokenizer.eot_id) == 1 and answer[-1] == tokenizer.eot_id
    assert prompt.count(tokenizer.start_header_id) == len(messages) and tokenizer.start_header_id not in answer


VARIABLES = st.fixed_dictionaries({}, optional={"tools": st.just([{"type": "function", "x": "<|eot_id|>"}])})
CHAT = st.lists(MESSAGE, min_size=1, max_size=3).map(lambda m: [*m, {"role": "assistant", "content": "a<|eot_id|>"}])


@given(st.integers(0, len(TEMPLATES) - 1), CHAT, VARIABLES)
@FEW
def test_chats(tokenizers, which, messages, variables):
    check_chat(tokenizers[which], messages, variables)


@pytest.mark.slow
def test_many_more(tokenizers):
    MANY(given(jsonl(), st.sampled_from(list(PACKS)))(check_jsonl))()
    MANY(given(st.binary(max_size=60) | TEXT, st.sampled_from(list(PACKS)), st.booleans())(check_txt))()
    MANY(given(LINE, BESIDE, st.booleans())(check_line))()
    MANY(given(st.sampled_from(tokenizers), CHAT | st.lists(MESSAGE, min_size=2, max_size=4), VARIABLES)(check_chat))()
