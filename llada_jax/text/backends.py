"""The interface that SentencePiece and Hugging Face tokenizers share, and its two implementations."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np

from llada_jax.config import UserError
from llada_jax.text import around, huggingface_files
from llada_jax.text.added_tokens import PLAIN, AddedToken, content, cut, pattern, properties, special_tokens
from llada_jax.text.json_files import read_object
from llada_jax.text.named_ids import size_of

MASK_LITERAL = "[MASK]"  # how users write the mask token, whatever name the tokenizer has for it
NOT_A_TOKEN = "\ufffd"  # the text of an id that stands for no token

# Role -> the names that tokenizers use for it. A token that has to be appended gets the first of them.
ROLES = {
    "bos": ("<|startoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"),
    "mask": ("<|mdm_mask|>", MASK_LITERAL, "<mask>", "<|mask|>"),
    "start_header": ("<|start_header_id|>",),
    "end_header": ("<|end_header_id|>",),
    "eot": ("<|eot_id|>",),
}
_SPACE = "\u2581"  # the character that stands for a space in SentencePiece's pieces


class Backend(Protocol):
    """The interface of both kinds of tokenizers. It knows nothing of the tokens that `Tokenizer` appends.

    `continuation` says that a text continues earlier text, so that no space is put in front of it or stripped from it.
    """

    kind: str  # "sentencepiece" or "huggingface"
    size: int  # number of ids
    special: Mapping[str, int]  # literal -> id of every control token
    named: Mapping[str, str]  # role -> literal, for the roles whose token the tokenizer itself names
    ends: Sequence[int]  # ids that the tokenizer's main file names as EOS, also if the files beside it name another
    files: Mapping[str, bytes]  # name -> content; a folder with these files loads as this tokenizer
    absent: Mapping[str, str]  # role -> literal, for the roles whose token the files name, but which has no id yet
    added: Mapping[str, int]  # literal -> id of every token that is found in a text as it stands, control token or not
    found: Mapping[str, AddedToken]  # literal -> how it is found, for the tokens of `added` that have a property
    searched: Collection[str]  # the literals in `added` that `encode` itself finds if its argument `special` is true
    settings: Sequence[Any]  # what the files beside the tokenizer change about encoding, as JSON values
    notes: Sequence[str]  # lines about what the files say and what is not done

    def around(self, ids: Mapping[str, int]) -> tuple[around.Ids, around.Ids]:
        """Returns the ids that the folder's own library puts in front of a text and behind it.

        Args:
          ids: Role -> id, for the roles in `named` and `absent`.
        """

    def ids(self) -> Set[int]:
        """Returns the ids of all tokens. An id below `size` that is missing here is a hole."""

    def id_of(self, literal: str) -> int | None:
        """Returns the id of a token by its literal, or None if there is no such token."""

    def encode(self, text: str, continuation: bool, control: bool = False, special: bool = False) -> list[int]:
        """Returns the ids of `text`, in which literals of control tokens are ordinary text.

        Args:
          text: The text.
          continuation: Whether it continues earlier text, as above.
          control: Whether it stands directly behind a control token.
          special: Whether to find the control tokens in `searched`.
        """

    def decode(self, ids: Sequence[int], continuation: bool) -> str:
        """Returns the text of `ids`, none of which may be a control token."""

    def token_bytes(self) -> np.ndarray:
        """Returns int32 [size]: the number of UTF-8 bytes that each id stands for, 0 for control tokens."""


class SentencePiece:
    """A tokenizer.model file, with the tokens that the files beside it add after its pieces."""

    kind = "sentencepiece"

    def __init__(self, files: Mapping[str, bytes]):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        known = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        self.files = {name: files[name] for name in known if name in files}
        config, special_map, added_map = (read_object(self.files.get(name, b"{}"), name) for name in known[1:])
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.files["tokenizer.model"])
        if proto.trainer_spec.treat_whitespace_as_suffix:
            raise UserError("tokenizer.model: treat_whitespace_as_suffix, a space behind every text, is not supported")
        pieces = [piece.piece for piece in proto.pieces]
        reserved = special_tokens(config, special_map)
        roles = _hide(proto, reserved)
        prefix, own = config.get("add_prefix_space"), proto.normalizer_spec.add_dummy_prefix
        self.settings = [["add_prefix_space", prefix]] if prefix is not None and prefix != own else []
        proto.normalizer_spec.add_dummy_prefix = own if prefix is None else bool(prefix)
        # In Llama's newer files, a text has no space in front of it directly behind a control token.
        self._only_first = config.get("legacy") is False and proto.normalizer_spec.add_dummy_prefix
        self.settings += [["legacy", False]] if self._only_first else []
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._strips_space = proto.normalizer_spec.add_dummy_prefix
        self._trims = proto.normalizer_spec.remove_extra_whitespaces
        proto.normalizer_spec.add_dummy_prefix = False
        self._later = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

        model = self._first
        # SentencePiece finds user-defined pieces in plain text, so they are not control tokens unless they have a role.
        self.special = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)} | roles
        ids = {"bos": model.bos_id(), "eos": model.eos_id()}
        self.named = {role: pieces[i] for role, i in ids.items() if i >= 0 and pieces[i] in self.special}
        self.ends = [ids["eos"]] if "eos" in self.named else []
        # Keep only ids after the pieces: about its own pieces, the model is right and the files may be wrong.
        records = {literal: {"id": i} for literal, i in added_map.items()}
        records |= huggingface_files.described_tokens(config)
        records = {literal: record for literal, record in records.items() if record["id"] >= len(pieces)}
        names = {*reserved}.union(*ROLES.values())
        self.special |= {
            literal: record["id"]
            for literal, record in records.items()
            if record.get("special", False) or literal in names
        }
        self.named |= _named_roles(config, special_map, self.special)
        self.absent, self.notes = _absent(config, special_map, {*pieces, *records}, self.named)
        self.notes += huggingface_files.notes({}, config)
        self.size = size_of((len(pieces) - 1, *(record["id"] for record in records.values())))
        control = {*self.special.values()}
        self._plain = {literal: record["id"] for literal, record in records.items() if record["id"] not in control}
        if aliases := [literal for literal in records if literal not in {**self._plain, **self.special}]:
            shown = ", ".join(map(repr, aliases[:5]))
            self.notes.append(f"the files give {shown} the id of a control token: such text is read as text")
        self.added = self._plain | self.special
        marked = {literal: properties(reserved.get(literal)) for literal in self.special}
        marked |= {literal: properties(record) for literal, record in records.items()}
        marked = {literal: dataclasses.replace(token, normalized=False) for literal, token in marked.items()}
        self.found = {literal: token for literal, token in marked.items() if token != PLAIN}
        self.settings += sorted([literal, dataclasses.astuple(token)] for literal, token in self.found.items())
        self._plain_pattern = pattern(self._plain)
        self.searched = ()
        self._config = config
        self._bytes = [
            bytes([int(piece[1:-1], 16)])
            if model.is_byte(i)
            else NOT_A_TOKEN.encode()
            if model.is_unknown(i)
            else piece.replace(_SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        self._counts = [
            0 if model.is_unknown(i) or pieces[i] in self.special else len(b) for i, b in enumerate(self._bytes)
        ]
        literals = {record["id"]: literal for literal, record in records.items()}
        for i in range(len(pieces), self.size):
            literal = literals.get(i, NOT_A_TOKEN)
            self._bytes.append(literal.encode())
            self._counts.append(len(literal.encode()) if literal in self._plain else 0)
        space_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = space_bytes if all(model.is_byte(i) for i in space_bytes) else []
        self._by_literal = {literal: record["id"] for literal, record in records.items()}
        self._by_literal |= {piece: i for i, piece in enumerate(pieces)}
        self._ids = frozenset((*range(len(pieces)), *literals))

    def ids(self) -> Set[int]:
        return self._ids

    def id_of(self, literal: str) -> int | None:
        return self._by_literal.get(literal)

    def around(self, ids: Mapping[str, int]) -> tuple[around.Ids, around.Ids]:
        return around.of_flags(self._config, ids)

    def encode(self, text: str, continuation: bool, control: bool = False, special: bool = False) -> list[int]:
        continuation |= control and self._only_first
        if not self._plain:
            return self._encode_pieces(text, continuation)
        ids: list[int] = []
        found = [(match.start(), match[0]) for match in self._plain_pattern.finditer(text)]
        for part, literal in cut(text, found, self.found):
            ids += self._encode_pieces(part, continuation) if part else []
            ids += [self._plain[literal]] if literal else []
            continuation = True
        return ids

    def _encode_pieces(self, text: str, continuation: bool) -> list[int]:
        if not self._space_ids or _SPACE not in text:
            return self._processor(text, continuation).encode(text)
        # SentencePiece cannot tell this character from a space, so the character is encoded as its UTF-8 bytes.
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += self._space_ids if i else []
            ids += self._processor(part, continuation or i > 0).encode(part)
        return ids

    def _processor(self, text: str, continuation: bool) -> Any:
        # A model that trims spaces would lose the space at the start of a continuation. `_first` trims it as well, but
        # then puts its own space in front.
        return self._later if continuation and not (self._trims and text.startswith(" ")) else self._first

    def decode(self, ids: Sequence[int], continuation: bool) -> str:
        text = b"".join(self._bytes[i] for i in ids)
        if self._strips_space and not continuation:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        return np.asarray(self._counts, np.int32)


def _named_roles(config: Mapping, special_map: Mapping, ids: Mapping[str, int]) -> dict[str, str]:
    """Returns role -> literal for each role that the files give to a token which the tokenizer has."""
    named: dict[str, str] = {}
    for role in ROLES:
        for source in (config, special_map):
            name = content(source.get(f"{role}_token"))
            if isinstance(name, str) and name in ids:
                named.setdefault(role, name)
    return named


def _absent(
    config: Mapping, special_map: Mapping, known: Collection[str], named: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Finds the tokens that the files name, but that the tokenizer lacks.

    Args:
      config: The content of tokenizer_config.json.
      special_map: The content of special_tokens_map.json.
      known: The literals of all tokens.
      named: The roles whose token the tokenizer has.

    Returns:
      Role -> literal for the roles among these tokens, and lines about the others.
    """
    roles: dict[str, str] = {}
    for role in ROLES.keys() - named:
        names = [content(source.get(f"{role}_token")) for source in (config, special_map)]
        names = [name for name in names if isinstance(name, str) and name]
        if names and not any(name in known for name in names):
            roles[role] = names[0]
    rest = [literal for literal in special_tokens(config, special_map) if literal not in {*known, *roles.values()}]
    shown = ", ".join(map(repr, rest[:5]))
    notes = [f"tokenizer_config.json names tokens that the tokenizer lacks: {shown} are read as text"]
    return roles, notes if rest else []


def _hide(proto: Any, reserved: Collection[str]) -> dict[str, int]:
    """Finds pieces that text could yield although they have a role, and renames them so that no text yields them.

    Args:
      proto: The model, which is changed in place.
      reserved: The literals that the files beside the model give a role to.

    Returns:
      Literal -> id of these pieces.
    """
    names, found = {*reserved}.union(*ROLES.values()), {}
    for i, piece in enumerate(proto.pieces):
        if piece.piece in names and (
            piece.type == piece.USER_DEFINED or (piece.type == piece.NORMAL and piece.piece in reserved)
        ):
            found[piece.piece] = i
            piece.piece = huggingface_files.hidden(piece.piece)
    return found


class HuggingFace:
    """A tokenizer.json file, with what the files beside it say about its tokens."""

    kind = "huggingface"
    ends = ()  # tokenizer.json has no field for EOS

    def __init__(self, files: Mapping[str, bytes]):
        known = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        self.files = {name: files[name] for name in known if name in files}
        config, special_map = (read_object(self.files.get(name, b"{}"), name) for name in known[1:])
        described = huggingface_files.read(self.files["tokenizer.json"], config, special_map, ROLES)
        self.special, self.added, self.found = described.special, described.added, described.found
        self.searched = described.searched
        self.settings = described.settings
        self.named = _named_roles(config, special_map, self.special)
        self.absent, lacking = _absent(config, special_map, {*described.vocabulary, *self.added}, self.named)
        self.notes = [*described.notes, *lacking]
        self._config, self._post_processor = config, described.post_processor

        self._described, self._places = described, {}
        self._first, self._later = self._at("first"), self._at("later")
        self._vocab = described.vocabulary | self.added
        self.size = size_of(self._vocab.values())
        self._ids = frozenset(self._vocab.values())
        self.byte_level = described.byte_level

    def _at(self, place: str, special: bool = False) -> Any:
        """Returns the library's tokenizer for texts at a place, see `huggingface_files.Described.tokenizer`."""
        if (place, special) not in self._places:
            self._places[place, special] = self._described.tokenizer(place, special)
        return self._places[place, special]

    def ids(self) -> Set[int]:
        return self._ids

    def id_of(self, literal: str) -> int | None:
        return self._vocab.get(literal)

    def around(self, ids: Mapping[str, int]) -> tuple[around.Ids, around.Ids]:
        # As in today's transformers, the post_processor holds. Older files have only the flags.
        written = around.of_post_processor(self._post_processor)
        return tuple(one or other for one, other in zip(written, around.of_flags(self._config, ids), strict=True))

    def encode(self, text: str, continuation: bool, control: bool = False, special: bool = False) -> list[int]:
        place = "behind" if control else "later" if continuation else "first"
        tokenizer = self._at(place, special)
        try:
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:
            if type(error) is not Exception:  # the library's own errors have no other class
                raise
            raise UserError(f"the tokenizer cannot encode {text!r:.60}: {error}") from error

    def decode(self, ids: Sequence[int], continuation: bool) -> str:
        return (self._later if continuation else self._first).decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.size, np.int32)
        for piece, i in self._vocab.items():
            if piece in self.added:
                counts[i] = 0 if piece in self.special else len(piece.encode())
            elif self.byte_level:  # each character of a piece stands for one byte
                counts[i] = len(piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                counts[i] = 1
            else:
                counts[i] = len(piece.removeprefix("##").replace(_SPACE, " ").encode())
        return counts
