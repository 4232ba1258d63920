"""The interface that SentencePiece and Hugging Face tokenizers share, and its two implementations."""

import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np

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

    def ids(self) -> Set[int]:
        """Returns the ids of all tokens. An id below `size` that is missing here is a hole."""

    def id_of(self, literal: str) -> int | None:
        """Returns the id of a token by its literal, or None if there is no such token."""

    def encode(self, text: str, continuation: bool) -> list[int]:
        """Returns the ids of `text`, in which literals of control tokens are ordinary text."""

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
        config, special_map, added_map = (json.loads(self.files.get(name, b"{}")) for name in known[1:])
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.files["tokenizer.model"])
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._strips_space = proto.normalizer_spec.add_dummy_prefix
        self._trims = proto.normalizer_spec.remove_extra_whitespaces
        proto.normalizer_spec.add_dummy_prefix = False
        self._later = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

        model = self._first
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        # SentencePiece finds user-defined pieces in plain text, so they are not control tokens, whatever their name is.
        self.special = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}
        ids = {"bos": model.bos_id(), "eos": model.eos_id()}
        self.named = {role: pieces[i] for role, i in ids.items() if i >= 0 and pieces[i] in self.special}
        self.ends = [ids["eos"]] if "eos" in self.named else []
        # Keep only ids after the pieces: about its own pieces, the model is right and the files may be wrong.
        decoder = config.get("added_tokens_decoder") or {}
        added = {i: (literal, False) for literal, i in added_map.items()}
        added |= {int(i): (token["content"], token.get("special", False)) for i, token in decoder.items()}
        added = {i: token for i, token in added.items() if i >= len(pieces)}
        reserved = _named_specials(config, special_map).union(*ROLES.values())
        self.special |= {literal: i for i, (literal, special) in added.items() if special or literal in reserved}
        self.named |= _named_roles(config, special_map, self.special)
        self.size = max([len(pieces) - 1, *added]) + 1
        self._plain = {literal: i for i, (literal, _) in added.items() if literal not in self.special}
        longest_first = sorted(self._plain, key=len, reverse=True)
        self._plain_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self._plain else None
        self._bytes = [
            bytes([int(piece[1:-1], 16)])
            if model.is_byte(i)
            else NOT_A_TOKEN.encode()
            if model.is_unknown(i)
            else piece.replace(_SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        self._counts = [0 if model.is_unknown(i) or model.is_control(i) else len(b) for i, b in enumerate(self._bytes)]
        for i in range(len(pieces), self.size):
            literal = added[i][0] if i in added else NOT_A_TOKEN
            self._bytes.append(literal.encode())
            self._counts.append(len(literal.encode()) if literal in self._plain else 0)
        space_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = space_bytes if all(model.is_byte(i) for i in space_bytes) else []
        self._by_literal = {literal: i for i, (literal, _) in added.items()} | {p: i for i, p in enumerate(pieces)}
        self._ids = frozenset((*range(len(pieces)), *added))

    def ids(self) -> Set[int]:
        return self._ids

    def id_of(self, literal: str) -> int | None:
        return self._by_literal.get(literal)

    def encode(self, text: str, continuation: bool) -> list[int]:
        if self._plain_pattern is None:
            return self._encode_pieces(text, continuation)
        ids: list[int] = []
        for part in filter(None, self._plain_pattern.split(text)):
            ids += [self._plain[part]] if part in self._plain else self._encode_pieces(part, continuation)
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


def _content(token: Any) -> Any:
    """Returns the literal of a token, which files give as a string or as an object with the field "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _named_roles(config: Mapping, special_map: Mapping, ids: Mapping[str, int]) -> dict[str, str]:
    """Returns role -> literal for each role that the files give to a token which the tokenizer has."""
    named: dict[str, str] = {}
    for role in ROLES:
        for source in (config, special_map):
            name = _content(source.get(f"{role}_token"))
            if isinstance(name, str) and name in ids:
                named.setdefault(role, name)
    return named


def _named_specials(config: Mapping, special_map: Mapping) -> set[str]:
    """Returns the literals that these files call special in any role."""
    found = set()
    for source in (config, special_map):
        found |= {_content(token) for name, token in source.items() if name.endswith("_token")}
        found |= {_content(token) for token in source.get("additional_special_tokens") or ()}
    return {literal for literal in found if isinstance(literal, str)}


class HuggingFace:
    """A tokenizer.json file, with what the files beside it say about its tokens."""

    kind = "huggingface"
    ends = ()  # tokenizer.json has no field for EOS

    def __init__(self, files: Mapping[str, bytes]):
        import tokenizers

        known = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        self.files = {name: files[name] for name in known if name in files}
        content, config, special_map = (json.loads(self.files.get(name, b"{}")) for name in known)
        decoder = config.get("added_tokens_decoder") or {}
        added = [(t["content"], t["id"], t["special"]) for t in content.get("added_tokens") or []]
        added += [(t["content"], int(i), t.get("special", False)) for i, t in decoder.items()]
        ids = {literal: i for literal, i, _ in added}

        self.named = _named_roles(config, special_map, ids)
        reserved = set(self.named.values()).union(*ROLES.values())
        self.special = {literal: i for literal, i, special in added if special or literal in reserved}

        content["truncation"] = content["padding"] = content["post_processor"] = None
        for token in content.get("added_tokens") or []:
            token["special"] = token["content"] in self.special
        self._first = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._later = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(content)))
        for tokenizer in (self._first, self._later):
            tokenizer.encode_special_tokens = True  # as ordinary text: no text ever yields a control token
        self._vocab = self._first.get_vocab(with_added_tokens=True)
        self.size = 1 + max([*self._vocab.values(), *ids.values()])
        self.byte_level = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
        self._added = set(ids)
        self._by_literal = ids | self._vocab
        self._ids = frozenset((*self._vocab.values(), *(i for _, i, _ in added)))

    def ids(self) -> Set[int]:
        return self._ids

    def id_of(self, literal: str) -> int | None:
        return self._by_literal.get(literal)

    def encode(self, text: str, continuation: bool) -> list[int]:
        tokenizer = self._later if continuation else self._first
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int], continuation: bool) -> str:
        return (self._later if continuation else self._first).decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.size, np.int32)
        for piece, i in self._vocab.items():
            if piece in self._added:
                counts[i] = 0 if piece in self.special else len(piece.encode())
            elif self.byte_level:  # each character of a piece stands for one byte
                counts[i] = len(piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                counts[i] = 1
            else:
                counts[i] = len(piece.removeprefix("##").replace(_SPACE, " ").encode())
        return counts


def _without_prefix(part: Any) -> Any:
    """Returns a part of tokenizer.json without the settings that add a space in front of a text or strip it.

    None means that the whole part has to be removed. The result is used for text that continues earlier text.
    """
    if isinstance(part, list):
        kept = [_without_prefix(p) for p in part]
        return [p for p in kept if p is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend" or (kind == "Strip" and part.get("content") == " " and part.get("start")):
        return None
    result = {}
    for key, value in part.items():
        if key in ("vocab", "merges", "added_tokens"):
            result[key] = value
        elif key == "prepend_scheme":
            result[key] = "never"
        elif key == "add_prefix_space":
            result[key] = False
        else:
            result[key] = _without_prefix(value)
    return result
