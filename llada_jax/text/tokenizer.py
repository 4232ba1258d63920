"""One small interface over SentencePiece and Hugging Face tokenizers.

Six tokens have a role here: BOS, EOS, MASK and the three of the chat template. A role is filled by
what the tokenizer already has; what it lacks is appended, in that order, after the existing ids,
which never change. Text is encoded purely by default: a corpus that contains the characters
"<|eot_id|>" yields the tokens of those characters, never the control token.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.text import chat_template
from llada_jax.text.backends import MASK_LITERAL, NOT_A_TOKEN, ROLES, Backend, HuggingFace, SentencePiece

VOCAB_MULTIPLE = 128  # the model's vocabulary is rounded up to this: it divides over tensor-parallel devices
SAMPLE_BYTES = 32 << 20  # of text at most that a new tokenizer is trained on
_LEAST_PIECES = 3 + 256  # unknown, BOS, EOS and the bytes


class Tokenizer:
    """Text to ids and back. Get one from `load_tokenizer`, `find_tokenizer` or `train_tokenizer`.

    Attributes:
      kind: "sentencepiece" or "huggingface".
      size: number of ids, the appended ones included.
      own_size: number of ids that the files have, without the appended ones.
      vocab_size: `size` rounded up to a multiple of 128, the rows of a model's embedding.
      bos_id, eos_id, mask_id, start_header_id, end_header_id, eot_id: the six roles.
      roles: role ("bos", "eos", "mask", ...) -> (id, the tokenizer's own literal for it).
      control_pattern: finds the literals of control tokens in a text; its one group is the literal.
      chat_template: the Jinja source of the folder's own chat template; None = it has none, the default is used.
      default_chat_template: the Jinja source of LLaDA's, with this tokenizer's literals.
      sha256: hash of the content and of the six roles; equal on any machine. The chat template is not in it, nor
        what a model says of the ids (see `of_model`).
    """

    def __init__(
        self,
        backend: Backend,
        chat_files: Mapping[str, bytes] | None = None,
        model_ids: Mapping[str, int] | None = None,
    ):
        self._backend = backend
        self._chat_files = dict(chat_files or {})
        self.chat_template = chat_template.find_source(self._chat_files)
        self._variables = chat_template.special_tokens(self._chat_files, backend.named)
        self.kind = backend.kind
        self.own_size = backend.size
        roles = _roles(backend)
        digest = hashlib.sha256(self.kind.encode())
        digest.update(hashlib.sha256(backend.files[_MODEL_FILES[self.kind]]).digest())
        digest.update(json.dumps([roles, sorted(_specials(backend, roles).items())]).encode())
        self.sha256 = digest.hexdigest()
        roles = _of_model(roles, backend, model_ids or {})
        self.size = max(backend.size, *(i + 1 for i, _ in roles.values()))
        self.vocab_size = -(-self.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.bos_id, self.eos_id, self.mask_id, self.start_header_id, self.end_header_id, self.eot_id = (
            i for i, _ in roles.values()
        )
        self._special = _specials(backend, roles)
        by_id = [(i, literal) for special in (backend.special, self._special) for literal, i in special.items()]
        self._literals = dict(by_id) | {self.mask_id: MASK_LITERAL}
        longest_first = sorted(self._special, key=len, reverse=True)
        self.control_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.roles = roles
        bos, start_header, end_header, eot = (roles[name][1] for name in ("bos", "start_header", "end_header", "eot"))
        self._header = f"{start_header}assistant{end_header}\n\n"
        self.default_chat_template = chat_template.default_source(bos, start_header, end_header, eot)

    def of_model(self, mask_id: int | None, bos_id: int | None, eos_id: int | None) -> "Tokenizer":
        """This tokenizer with the ids that a model states for three of the roles (None = it does not).

        Then "[MASK]" in a text is the model's MASK, whatever the files say, and decodes as that. Files and sha256 are
        the same. What was appended under such an id for another role gets one after all others. An EOS that is the
        tokenizer's end of turn, as in fine-tunes, leaves the tokenizer its own EOS: both end a text.
        """
        ids = {"mask": mask_id, "bos": bos_id, "eos": eos_id}
        if eos_id == self.eot_id < self.own_size:
            del ids["eos"]
        known = {role: i for role, i in ids.items() if i is not None}
        return Tokenizer(self._backend, self._chat_files, known)

    def encode(self, text: str, special: bool = False, continuation: bool = False) -> list[int]:
        """The ids of `text`, without BOS or EOS.

        Args:
          text: any valid Unicode.
          special: whether the literals of control tokens ("[MASK]", "<|eot_id|>", "<s>", ...) become one
            token each, as in a prompt. False takes them for the characters they are.
          continuation: the text goes on where other text ended: a tokenizer that puts a space in front
            of a text does not.
        """
        return self._encode_special(text, continuation) if special else self._backend.encode(text, continuation)

    def _encode_special(self, text: str, continuation: bool, true: Callable[[str], str] = str) -> list[int]:
        """Literals of control tokens as one token each; the text between them as `true` gives it."""
        ids: list[int] = []
        for part in self.control_pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
                continuation = ids[-1] not in (self.bos_id, self.eos_id)
            elif part:
                ids += self._backend.encode(true(part), continuation)
                continuation = True
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, by the folder's chat template or LLaDA's own.

        LLaDA's: BOS, then for each message <|start_header_id|>ROLE<|end_header_id|>, two newlines, its trimmed content
        and <|eot_id|>; then the header of the assistant's answer.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text} each; what else is in them is the
            template's to use.
          add_generation_prompt: whether the header of an answer follows. A template that always writes that header
            (the published one) has it taken off again; one that always writes another kind keeps it.

        Raises UserError: a message without role or content, a template that fails or refuses them.
        """
        if add_generation_prompt:
            chat_template.check_messages(messages)
            return self._chat_text(messages, True)
        text, back = self.marked_chat(messages, False)
        return text.translate(back)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a chat, as `render_chat`; only what the template writes becomes control tokens.

        A literal such as "<|eot_id|>" in a message is encoded as the characters that it is. All other ids are those
        that the tokenizer gives the rendered text with control tokens recognised.
        """
        text, back = self.marked_chat(messages, add_generation_prompt)
        return self._encode_special(text, False, lambda part: part.translate(back))

    def encode_answer(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """The ids of a chat in two parts: what asks for its last message, and that message.

        The first is `encode_chat(messages[:-1])`, what a model is given to answer. The second is what the template
        writes of the answer, with what ends it (LLaDA's: <|eot_id|>). UserError as `render_chat`, and for a template
        that does not go on with the answer where it asks for one.
        """
        before = self._chat_text(messages[:-1], True)
        text, back = self.marked_chat(messages, False)
        if not text.translate(back).startswith(before):
            raise UserError("the chat template writes an answer otherwise than it asks for one: it cannot be learned")
        # Marks stand for one character each: the prompt is as long in both.
        answer = text[len(before) :]
        if answer.rstrip().endswith(tuple(self._special)):  # a line end there belongs to the next message
            answer = answer.rstrip()
        ids = self._encode_special(answer, True, lambda part: part.translate(back))
        return self.encode_chat(messages[:-1]), ids

    def marked_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[str, dict[int, str]]:
        """A chat as text in which all that stands there as a control token was written by the template.

        Returns the text, and what `str.translate` takes to make the messages in it what they were. Arguments and
        errors beside that are those of `render_chat`.
        """
        chat_template.check_messages(messages)
        text, back = chat_template.render_marked(
            self.chat_template or self.default_chat_template,
            lambda m: self._chat_text(m, add_generation_prompt),
            messages,
            [*self._special],
        )
        # Characters of the messages are replaced in it: this is the template's own header.
        if not add_generation_prompt and text.endswith(self._header):
            if text.translate(back) == self._chat_text(messages, True):
                text = text.removesuffix(self._header)
        return text, back

    def _chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        if self.chat_template is None:
            return chat_template.render(self.default_chat_template, {}, messages, add_generation_prompt)
        return chat_template.render(self.chat_template, self._variables, messages, add_generation_prompt)

    def decode(self, ids: Iterable[int], skip_special: bool = False, continuation: bool = False) -> str:
        """The text of `ids`: control tokens as their literals (the mask as "[MASK]") or left out.

        Never raises for an id: one that is no token (the rows that fill up a model's vocabulary, a
        negative one) becomes U+FFFD, as do bytes that are not UTF-8. `continuation` as in `encode`.
        """
        text: list[str] = []
        run: list[int] = []
        for i in [*map(int, ids), None]:
            if i is not None and 0 <= i < self._backend.size and i not in self._literals:
                run.append(i)
                continue
            if run:
                text.append(self._backend.decode(run, continuation))
                continuation, run = True, []
            if i is not None:
                text.append("" if skip_special else self._literals.get(i, NOT_A_TOKEN))
                continuation = i not in (self.bos_id, self.eos_id)
        return "".join(text)

    def token_bytes(self) -> np.ndarray:
        """int32 [size]: bytes of UTF-8 that each id stands for; 0 for control tokens."""
        counts = np.zeros(self.size, np.int32)
        counts[: self._backend.size] = self._backend.token_bytes()
        counts[list(self._literals)] = 0
        return counts

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer(directory)` reads back; makes the folder."""
        path = epath.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in {**self._chat_files, **self._backend.files}.items():
            (path / name).write_bytes(content)


def _roles(backend: Backend) -> dict[str, tuple[int, str]]:
    """Role -> (id, literal); what the tokenizer lacks is appended."""
    roles, size = {}, backend.size
    for role, names in ROLES.items():
        literal = backend.named.get(role) or next((n for n in names if n in backend.special), None)
        if literal is None:
            roles[role] = size, names[0]
            size += 1
        else:
            roles[role] = backend.special[literal], literal
    return roles


def _of_model(
    roles: Mapping[str, tuple[int, str]], backend: Backend, ids: Mapping[str, int]
) -> dict[str, tuple[int, str]]:
    """The roles with a model's ids for some of them."""
    literals = {i: literal for literal, i in backend.special.items()}
    result = {**roles, **{role: (i, literals.get(i, roles[role][1])) for role, i in ids.items()}}
    for role, (i, literal) in roles.items():
        if role not in ids and i >= backend.size and i in ids.values():
            result[role] = 1 + max(backend.size - 1, *(taken for taken, _ in result.values())), literal
    return result


def _specials(backend: Backend, roles: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    """Literal -> id of every control token; the mask has two."""
    named = {literal: i for i, literal in roles.values()}
    return {**backend.special, **named, MASK_LITERAL: roles["mask"][0]}


_BACKENDS = {"huggingface": HuggingFace, "sentencepiece": SentencePiece}
_MODEL_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def find_tokenizer(directory: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer in a folder, None if there is none; raises UserError if it is damaged."""
    path = epath.Path(directory)
    for kind, name in _MODEL_FILES.items():
        if (path / name).exists():
            return _load(kind, path / name, path)
    return None


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a SentencePiece .model, a tokenizer.json, or a folder with either, such as a model's or a training workdir.

    Beside a file named tokenizer.json or tokenizer.model, as in a folder, tokenizer_config.json and
    special_tokens_map.json (and added_tokens.json of SentencePiece) are read, and the chat template
    (chat_template.jinja, or in tokenizer_config.json or chat_template.json).
    Raises UserError if there is no tokenizer at `path`.
    """
    file = epath.Path(path)
    if file.is_dir():
        tokenizer = find_tokenizer(file) or find_tokenizer(file / "tokenizer")  # a workdir's, or a prepared set's
        if tokenizer is None:
            raise UserError(f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model is in it")
        return tokenizer
    if not file.exists():
        raise UserError(f"there is no tokenizer at {path}: give a SentencePiece .model, a tokenizer.json or a folder")
    kind = "huggingface" if file.name.endswith(".json") else "sentencepiece"
    return _load(kind, file, file.parent if file.name == _MODEL_FILES[kind] else None)


def _load(kind: str, file: epath.Path, folder: epath.Path | None) -> Tokenizer:
    files = {_MODEL_FILES[kind]: file.read_bytes()}
    if folder is not None:
        files |= _existing(folder, _CONFIG_FILES)
    chat_files = {} if folder is None else _existing(folder, chat_template.FILES)
    try:
        return Tokenizer(_BACKENDS[kind](files), chat_files)
    except UserError as error:
        raise UserError(f"{file.parent}: {error}") from error
    except Exception as error:  # each library has its own, and tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is not a {kind} tokenizer that can be read: {reason}") from error


def _existing(folder: epath.Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def train_tokenizer(documents: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Tokenizer:
    """Trains a SentencePiece BPE with byte fallback and writes it into `directory`.

    Any valid Unicode text comes back exactly from its ids. The same documents give the same tokenizer.
    It is trained on at most 32 MiB of the text (pieces chosen by their hash from all documents), so
    memory does not grow with the text.

    Args:
      documents: texts, read once.
      vocab_size: the `size` of the result, its control tokens included.
      directory: a folder, made if needed, that `load_tokenizer` reads.

    Raises UserError if `vocab_size` does not suit the text.
    """
    import sentencepiece

    appended = len(ROLES) - 2  # SentencePiece has BOS and EOS of its own
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(documents),
            model_writer=model,
            model_type="bpe",
            # Below this, which is too small in any case, it would not say what it needs.
            vocab_size=max(vocab_size - appended, _LEAST_PIECES),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation is one token
            max_sentence_length=1 << 20,
            bos_piece=ROLES["bos"][0],
            eos_piece=ROLES["eos"][0],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(_training_error(str(error), vocab_size, appended)) from error
    tokenizer = Tokenizer(SentencePiece({"tokenizer.model": model.getvalue()}))
    tokenizer.save(directory)
    return tokenizer


def _training_error(message: str, vocab_size: int, appended: int) -> str:
    too_large = re.search(r"too high.*<= (\d+)", message)
    too_small = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if too_large:
        most = int(too_large[1]) + appended
        return f"train_tokenizer={vocab_size} is too large for this text: {most} at most, or give more text"
    if too_small:
        return f"train_tokenizer={vocab_size} is too small for this text: {int(too_small[1]) + appended} at least"
    if "sentences_.empty()" in message:
        return "train_tokenizer: the input has no text to train a tokenizer on"
    return f"train_tokenizer={vocab_size}: {' '.join(message.split())}"


def _training_sentences(documents: Iterable[str]) -> Iterator[str]:
    # SentencePiece skips a whole sentence for one of these characters; their bytes stand for them.
    for text in _sample(documents):
        yield from filter(None, re.split("[\0\t\u2581\u2585]", text))


def _sample(documents: Iterable[str]) -> list[str]:
    """Pieces of at most 4,096 characters whose hash is below a bound that falls as they become too many."""
    bound, total = 1 << 64, 0
    kept: list[tuple[int, str]] = []
    for document in documents:
        for start in range(0, len(document), 4096):
            text = document[start : start + 4096]
            content = text.encode()
            key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            if key >= bound:
                continue
            kept.append((key, text))
            total += len(content)
            while total > SAMPLE_BYTES:
                bound //= 2
                kept = [(k, t) for k, t in kept if k < bound]
                total = sum(len(t.encode()) for _, t in kept)
    return [text for _, text in kept]
