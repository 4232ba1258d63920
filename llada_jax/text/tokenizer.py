"""One small interface over SentencePiece and Hugging Face tokenizers.

Six tokens have a role here: BOS, EOS, MASK and the three tokens of the chat template. Those that a tokenizer lacks are
appended, in this order, after its own ids, which never change. By default a text is encoded character by character as
it stands: if a corpus contains the characters "<|eot_id|>", it yields their tokens, never the control token.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.text import added_tokens, around, chat_template
from llada_jax.text.backends import MASK_LITERAL, NOT_A_TOKEN, Backend, HuggingFace, SentencePiece
from llada_jax.text.chat_encoding import ChatEncoding
from llada_jax.text.json_files import check_unicode
from llada_jax.text.named_ids import ends_of_files, model_ids, others, ranges
from llada_jax.text.roles import as_the_model_says, of_model, roles_of, specials

VOCAB_MULTIPLE = 128  # vocab_size is a multiple of this, so that it can be split over tensor-parallel devices


class Tokenizer(ChatEncoding):
    """Converts text to ids and back. `load_tokenizer`, `find_tokenizer` and `train_tokenizer` return one.

    Attributes:
      kind: "sentencepiece" or "huggingface".
      size: The number of ids, including the appended ones.
      own_size: The number of ids that the tokenizer's files define, without the appended ones.
      vocab_size: `size` rounded up to a multiple of 128: the number of rows of a model's embedding.
      bos_id, eos_id, mask_id, start_header_id, end_header_id, eot_id: The ids of the six roles.
      prefix: The ids that the folder's own library puts in front of every text, such as BOS. Usually there are none.
      notes: Lines about what the files say and what is not done, and where a model's ids (see `of_model`) differ.
      roles: Role ("bos", "eos", "mask", ...) -> (id, the tokenizer's own literal for this token).
      control_pattern: A regular expression that finds literals of control tokens; its only group is the literal.
      chat_template: The Jinja source of the folder's own chat template, or None if the folder has none.
      default_chat_template: The Jinja source of LLaDA's chat template with this tokenizer's literals, used instead.
      sha256: A hash of the tokenizer's content and of the six roles, equal on any machine. It covers neither the chat
        template nor the ids that a model states (see `of_model`).
    """

    def __init__(
        self,
        backend: Backend,
        chat_files: Mapping[str, bytes] | None = None,
        model_ids: Mapping[str, int] | None = None,
        model_ends: Iterable[int] = (),
    ):
        self._backend = backend
        self._chat_files = dict(chat_files or {})
        self.chat_template = chat_template.find_source(self._chat_files)
        self._tool_template = chat_template.find_source(self._chat_files, "tool_use")
        self._variables = chat_template.special_tokens(self._chat_files, backend.named)
        self.kind = backend.kind
        self.own_size = backend.size
        roles = files_roles = roles_of(backend)
        digest = hashlib.sha256(self.kind.encode())
        digest.update(hashlib.sha256(backend.files[_MODEL_FILES[self.kind]]).digest())
        digest.update(json.dumps([roles, sorted(specials(backend, roles).items())]).encode())
        roles = of_model(roles, backend, model_ids or {})
        self.prefix, changes, notes = around.of_backend(backend, files_roles, roles)
        if changes:
            digest.update(json.dumps(changes).encode())
        self.sha256 = digest.hexdigest()
        self.size = max(backend.size, *(i + 1 for i, _ in roles.values()))
        self.vocab_size = -(-self.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.bos_id, self.eos_id, self.mask_id, self.start_header_id, self.end_header_id, self.eot_id = (
            i for i, _ in roles.values()
        )
        self._special = specials(backend, roles)
        self._files_roles = files_roles
        self._encoder, self._model_ids, self.notes = as_the_model_says(
            backend, files_roles, model_ids or {}, {*model_ends}
        )
        self.notes = [*notes, *self.notes]
        by_id = [(i, literal) for special in (backend.special, self._special) for literal, i in special.items()]
        self._literals = dict([*roles.values(), *by_id]) | {self.mask_id: MASK_LITERAL}
        self.control_pattern = added_tokens.pattern(self._special)
        # How each token is found in a text. "[MASK]" is found as the tokenizer's own literal for MASK would be.
        self._found = dict(backend.found)
        self._found.setdefault(MASK_LITERAL, self._found.get(roles["mask"][1], added_tokens.PLAIN))
        self._added = {**backend.added, **self._special}
        searched = {literal for literal in backend.searched if backend.added[literal] == self._added[literal]}
        self._pattern = added_tokens.pattern(self._added.keys() - searched)
        self.roles = roles
        bos, start_header, end_header, eot = (roles[name][1] for name in ("bos", "start_header", "end_header", "eot"))
        self._header = f"{start_header}assistant{end_header}\n\n"
        self.default_chat_template = chat_template.default_source(bos, start_header, end_header, eot)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that the files also name as ends of a text, beside eos_id and eot_id."""
        backend = self._backend
        ends = [i for i, _ in (self._files_roles["eos"], self._files_roles["eot"]) if i < backend.size]
        ends += [*backend.ends, *ends_of_files(backend.files, backend.id_of)]
        return others(ends, (self.eos_id, self.eot_id, self.mask_id))

    def of_model(
        self, mask_id: int | None, bos_id: int | None, eos_id: int | None, end_ids: Iterable[int] = ()
    ) -> "Tokenizer":
        """Returns this tokenizer with the ids that a model states for three of the roles (None: it states none).

        The result encodes "[MASK]" as the model's MASK token, whatever the files say, and decodes that token as
        "[MASK]". Files and sha256 stay the same. If a token of another role was appended under one of these ids, it
        moves to an id after all others. If `eos_id` is the end-of-turn token of the files, as in fine-tuned models, the
        tokenizer keeps its own EOS: both tokens end a text. `end_ids` are further ids that the model names as ends: if
        the EOS of the files is among them, model and files do not disagree.
        """
        ids = {"mask": mask_id, "bos": bos_id, "eos": eos_id}
        if eos_id == self.eot_id < self.own_size:
            del ids["eos"]
        known = {role: i for role, i in ids.items() if i is not None}
        return Tokenizer(self._backend, self._chat_files, known, end_ids)

    def encode(self, text: str, special: bool = False, continuation: bool = False) -> list[int]:
        """Returns the ids of `text`, without BOS or EOS. `encode_text` puts BOS in front where the files say so.

        Args:
          text: Any valid Unicode.
          special: Whether each literal of a control token ("[MASK]", "<|eot_id|>", "<s>", ...) becomes that token, as
            in a prompt. If False, literals are encoded as ordinary text.
          continuation: Whether the text continues earlier text. If True, a tokenizer that usually puts a space in front
            of a text does not put one here.

        Raises:
          UserError: If `special` is true and the text contains a lone surrogate.
        """
        return self._encode_special(text, continuation) if special else self._encoder.encode(text, continuation)

    def encode_text(self, text: str, special: bool = False) -> list[int]:
        """Returns the ids of a whole text as a model gets them, with `prefix` in front.

        The arguments are those of `encode`. If a text itself begins with the prefix, as the literal of a control token,
        the prefix is not repeated.

        Raises:
          UserError: If the text contains a lone surrogate.
        """
        check_unicode(text, "the text")
        ids, prefix = self.encode(text, special), list(self.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def encode_found(
        self,
        text: str,
        found: Sequence[tuple[int, str]],
        continuation: bool = False,
        special: bool = False,
    ) -> list[int]:
        """Returns the ids of a text in which the control tokens are known; other literals are ordinary text.

        Args:
          text: Any valid Unicode.
          found: The places of the control tokens in the text, in order, and their literals.
          continuation: Whether the text continues earlier text, as in `encode`.
          special: Whether the tokenizer's own control tokens are also looked for in the text between these.

        Raises:
          UserError: If the text contains a lone surrogate.
        """
        check_unicode(text, "the text")
        ids: list[int] = []
        control = False
        for part, literal in added_tokens.cut(text, found, self._found):
            if part:
                ids += self._encoder.encode(part, continuation, control, special)
                continuation, control = True, False
            if literal is not None:
                ids.append(self._added[literal])
                continuation, control = ids[-1] not in (self.bos_id, self.eos_id), True
        return ids

    def _encode_special(self, text: str, continuation: bool, true: Callable[[str], str] | None = None) -> list[int]:
        """Returns ids in which literals of control tokens are single tokens.

        Args:
          text: The text of a user, or a text as `marked_chat` returns it.
          continuation: Whether the text continues earlier text.
          true: The function that turns the marks back into characters. None means that the text is that of a user.
        """
        pattern = self._pattern if true is None else self.control_pattern
        found = [(match.start(), match[0]) for match in pattern.finditer(text)]
        return self.encode_found(true(text) if true else text, found, continuation, special=true is None)

    def decode(self, ids: Iterable[int], skip_special: bool = False, continuation: bool = False) -> str:
        """Returns the text of `ids`. It never raises an error because of an id.

        Args:
          ids: The ids. An id that is no token (one of the rows that fill up a model's vocabulary, or a negative number)
            becomes U+FFFD, and so do bytes that are not UTF-8.
          skip_special: Whether control tokens, and ids that are no tokens, are left out. If False, control tokens
            become their literals, and MASK becomes "[MASK]".
          continuation: Whether the ids continue earlier ids, as in `encode`.
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
        """Returns int32 [size]: the number of UTF-8 bytes that each id stands for, 0 for control tokens."""
        counts = np.zeros(self.size, np.int32)
        counts[: self._backend.size] = self._backend.token_bytes()
        counts[list(self._literals)] = 0
        return counts

    def is_text(self, i: int) -> bool:
        """Returns whether the files have a token with this id that ordinary text may contain."""
        return i in self._backend.ids() and i not in self._backend.special.values()

    def holes(self, limit: int, known: Set[int] = frozenset()) -> tuple[tuple[int, int], ...]:
        """Returns the ids below `limit` that are no tokens, as ranges (first, last + 1). `known` ids are tokens."""
        tokens = self._backend.ids() | self._literals.keys() | {*self.end_ids} | known
        return ranges(i for i in range(limit) if i not in tokens)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer(directory)` reads, and creates the folder if needed.

        If a model states other ids than the files, they are written as the config.json of a model would state them.
        """
        path = epath.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        stated = {f"{role}_token_id": i for role, i in self._model_ids.items()}
        config = {"config.json": (json.dumps(stated, indent=2) + "\n").encode()} if stated else {}
        for name, content in {**self._chat_files, **self._backend.files, **config}.items():
            (path / name).write_bytes(content)


_BACKENDS = {"huggingface": HuggingFace, "sentencepiece": SentencePiece}
_MODEL_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def find_tokenizer(directory: str | os.PathLike) -> Tokenizer | None:
    """Returns the tokenizer in a folder, or None if there is none. Raises UserError if it is damaged."""
    path = epath.Path(directory)
    for kind, name in _MODEL_FILES.items():
        if (path / name).exists():
            return _load(kind, path / name, path)
    return None


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a SentencePiece .model, a tokenizer.json, or a folder with either, such as a model's or a training workdir.

    If the file is named tokenizer.json or tokenizer.model, as in a folder, these files beside it are read as well:
    tokenizer_config.json and special_tokens_map.json (for SentencePiece also added_tokens.json), and the chat template
    (in chat_template.jinja, tokenizer_config.json or chat_template.json). If a folder also has the config.json of a
    model, the tokenizer uses the ids that it states for MASK, BOS and EOS, as `Tokenizer.of_model` says.
    Raises UserError if there is no tokenizer at `path`, or if it is damaged.
    """
    file = epath.Path(path)
    if file.is_dir():
        inner = file / "tokenizer"  # as in a workdir or a prepared set
        tokenizer = find_tokenizer(file) or find_tokenizer(inner)
        if tokenizer is None:
            raise UserError(f"{path} has no tokenizer: it contains neither tokenizer.json nor tokenizer.model")
        return _fitted(tokenizer, model_ids(file) or model_ids(inner))
    if not file.exists():
        raise UserError(f"there is no tokenizer at {path}: pass a SentencePiece .model, a tokenizer.json or a folder")
    kind = "huggingface" if file.name.endswith(".json") else "sentencepiece"
    if file.name != _MODEL_FILES[kind]:
        return _load(kind, file, None)
    return _fitted(_load(kind, file, file.parent), model_ids(file.parent))


def _fitted(tokenizer: Tokenizer, ids: Mapping[str, list[int]]) -> Tokenizer:
    if not any(ids.values()):
        return tokenizer
    mask_id, bos_id, eos_id, end_id = (next(iter(ids[role]), None) for role in ("mask", "bos", "eos", "ends"))
    if eos_id is None and tokenizer.eos_id >= tokenizer.own_size:  # no file of the tokenizer has an EOS
        eos_id = end_id
    return tokenizer.of_model(mask_id, bos_id, eos_id, (*ids["eos"], *ids["ends"]))


def _load(kind: str, file: epath.Path, folder: epath.Path | None) -> Tokenizer:
    files = {_MODEL_FILES[kind]: file.read_bytes()}
    if folder is not None:
        files |= _existing(folder, _CONFIG_FILES)
    chat_files = {} if folder is None else _existing(folder, chat_template.FILES)
    try:
        return Tokenizer(_BACKENDS[kind](files), chat_files)
    except UserError as error:
        raise UserError(f"{file.parent}: {error}") from error
    except Exception as error:  # each library has its own exceptions, and tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read as a {kind} tokenizer: {reason}") from error


def _existing(folder: epath.Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
