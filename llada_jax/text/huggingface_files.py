"""Reads a tokenizer.json and what the files beside it say of its tokens."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from llada_jax.config import UserError
from llada_jax.text.added_tokens import PLAIN, AddedToken, properties, special_tokens
from llada_jax.text.around import of_post_processor


@dataclasses.dataclass(frozen=True)
class Described:
    """A tokenizer.json, read together with the files beside it.

    Attributes:
      vocabulary: Piece -> id, as the model of the tokenizer has it.
      added: Literal -> id of every token that is found in a text as it stands.
      special: Literal -> id of every control token; a part of `added`.
      searched: The literals of the tokens of `added` that the library itself finds in a text.
      found: Literal -> how the token is found, for the tokens of `added` that have a property.
      settings: What the files beside tokenizer.json change about encoding, as JSON values.
      notes: Lines about what the files say and what is not done.
      post_processor: The field of this name.
      byte_level: Whether each character of a piece stands for one byte.
      library: The tokenizer of the tokenizers library for whole texts.
    """

    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    special: Mapping[str, int]
    searched: frozenset[str]
    found: Mapping[str, AddedToken]
    settings: list[Any]
    notes: list[str]
    post_processor: Any
    byte_level: bool
    library: Any
    _without_control: Mapping[str, Any]
    _whole: Mapping[str, Any]

    def tokenizer(self, place: str, special: bool = False) -> Any:
        """Returns the tokenizer of the tokenizers library for texts at a place.

        Args:
          place: "first": a tokenizer may put a space in front of the text; "later": the text continues earlier text;
            "behind": the text stands behind a control token.
          special: Whether control tokens are looked for in the text. If False, no text yields one.
        """
        fields = self._whole if special else self._without_control
        changed = fields if place == "first" else _without_prefix(fields, all_kinds=place == "later")
        if not special and changed == fields:
            return self.library
        library = _library(changed)
        library.encode_special_tokens = not special
        return library


def read(content: bytes, config: Mapping[str, Any], special_map: Mapping[str, Any], roles: Mapping) -> Described:
    """Reads a tokenizer.json.

    Args:
      content: The content of tokenizer.json.
      config: The content of tokenizer_config.json.
      special_map: The content of special_tokens_map.json.
      roles: Role -> the names that tokenizers use for its token.
    """
    fields = json.loads(content)
    vocab = fields["model"]["vocab"]
    vocabulary: Mapping[str, int] = (
        vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    )
    named = special_tokens(config, special_map)
    around_text = {i for side in of_post_processor(fields.get("post_processor")) for i in side}
    named |= {piece: None for piece, i in vocabulary.items() if i in around_text} if around_text else {}
    named |= {token["content"]: None for token in fields.get("added_tokens") or [] if token["id"] in around_text}
    reserved = {*named}.union(*roles.values())
    described, said = described_tokens(config), notes(fields, config)

    records, settings = {}, []
    for token in fields.get("added_tokens") or []:
        # The files may describe a token differently: those beside tokenizer.json are right, except about its id.
        literal, other = token["content"], described.pop(token["content"], {})
        control = bool(token.get("special") or other.get("special")) or literal in reserved
        records[literal] = _record(literal, token["id"], {**token, **other}, control)
        if properties({**token, **other}) != properties(token):
            settings.append([literal, dataclasses.astuple(properties(records[literal]))])
    # A token with a role may stand in the vocabulary alone. A name that no file mentions may also be a piece of text.
    for literal in sorted((reserved | described.keys()) & vocabulary.keys() - records.keys()):
        if literal in named or literal in described or not _is_merged(fields["model"], literal):
            source = described.pop(literal, None) or named.get(literal)
            source = source if isinstance(source, dict) else {}
            control = literal in reserved or bool(source.get("special"))
            records[literal] = _record(literal, vocabulary[literal], source, control)
    more = {
        literal: _record(literal, source["id"], source, bool(source.get("special")) or literal in reserved)
        for literal, source in sorted(described.items(), key=lambda item: item[1]["id"])
    }
    plain = [literal for literal, record in more.items() if not record["special"]]

    model = fields["model"] | ({"dropout": None} if fields["model"].get("dropout") else {})
    cleared = {"truncation": None, "padding": None, "post_processor": None, "model": model}
    special = {literal for literal, record in (records | more).items() if record["special"]}
    for tokens in (records | more, records):
        whole = fields | cleared | {"added_tokens": [*tokens.values()]}
        encoding = _hide(whole, special & vocabulary.keys())
        library = _library(encoding)
        ids = {literal: library.token_to_id(hidden(literal)) for literal in special & vocabulary.keys()}
        ids = {literal: ids.get(literal, library.token_to_id(literal)) for literal in tokens}
        if all(ids[literal] == record["id"] for literal, record in more.items() if literal in tokens):
            break
    if more and more.keys() <= ids.keys():
        settings += [["added", plain]] if plain else []
    elif plain:
        shown = ", ".join(map(repr, plain[:5]))
        said.append(f"tokenizer_config.json adds tokens whose ids leave a gap: {shown} are read as text")
        vocabulary = vocabulary | {literal: more.pop(literal)["id"] for literal in plain}
    ids |= {literal: record["id"] for literal, record in more.items()}
    ids = {literal: i for literal, i in ids.items() if i is not None}  # the library leaves out an empty literal
    for literal, i in ids.items():
        if (stated := (records | more)[literal]["id"]) != i:
            said.append(f"tokenizer.json gives {literal!r} the id {stated}, but the tokenizers library {i}: {i} holds")
    by_id = {i: literal for literal, i in ids.items()}
    for piece, i in vocabulary.items():  # in a vocabulary with holes, the library counts and meets ids that are taken
        if i in by_id and piece not in ids:
            said.append(f"{by_id[i]!r} has the id {i}, as the piece {piece!r} of ordinary text has: they look the same")
    found = {literal: properties(record) for literal, record in (records | more).items() if literal in ids}
    kinds = json.dumps([fields.get("decoder"), fields.get("pre_tokenizer")])
    return Described(
        vocabulary=vocabulary,
        added=ids,
        searched=frozenset(tokens.keys() & ids.keys()),
        special={literal: i for literal, i in ids.items() if literal in special},
        found={literal: token for literal, token in found.items() if token != PLAIN},
        settings=settings,
        notes=said,
        post_processor=fields.get("post_processor"),
        byte_level='"ByteLevel"' in kinds,
        library=library,
        _without_control=encoding,
        _whole=whole,
    )


def _record(literal: str, i: int, source: Mapping[str, Any], special: bool) -> dict[str, Any]:
    """Returns an entry of added_tokens in tokenizer.json.

    Args:
      literal: The literal of the token.
      i: Its id.
      source: What a file says of the token.
      special: Whether it is a control token.
    """
    flags = dataclasses.asdict(properties(source))
    # By default the library looks for tokens that are no control tokens in the normalised text.
    flags["normalized"] = bool(source.get("normalized", not special))
    return {"id": i, "content": literal, **flags, "special": special}


def _library(fields: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of the tokenizers library that a tokenizer.json describes."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(fields))
    library.encode_special_tokens = True  # as ordinary text: no text ever yields a control token
    return library


def described_tokens(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns literal -> object of the tokens in added_tokens_decoder, each with its id under "id".

    Raises:
      UserError: If this field of tokenizer_config.json does not have the form {"5": {"content": "..."}}.
    """
    decoder, found = config.get("added_tokens_decoder") or {}, {}
    for i, record in decoder.items() if isinstance(decoder, dict) else ((None, None),):
        literal = record.get("content") if isinstance(record, dict) else None
        if not isinstance(literal, str) or re.fullmatch("[0-9]{1,9}", i) is None:
            form = '{"5": {"content": "..."}}'
            raise UserError(
                f"tokenizer_config.json: added_tokens_decoder must have the form {form}, not {i!r:.30}: ..."
            )
        found[literal] = {**record, "id": int(i)}
    return found


def notes(fields: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns lines about what a tokenizer.json and a tokenizer_config.json say and what is not done."""
    found = []
    if dropout := (fields.get("model") or {}).get("dropout"):
        found.append(f"tokenizer.json: dropout={dropout} is not used: a text always has the same encoding")
    left = [name for name in ("truncation", "padding") if fields.get(name) is not None]
    if left:
        found.append(f"tokenizer.json: {' and '.join(left)} are not applied: a text is encoded whole, and nothing else")
    if (config.get("sp_model_kwargs") or {}).get("enable_sampling"):
        found.append("tokenizer_config.json: sp_model_kwargs is not used: a text always has the same encoding")
    if config.get("clean_up_tokenization_spaces"):
        found.append("tokenizer_config.json: clean_up_tokenization_spaces is not applied: text is what its tokens say")
    if config.get("split_special_tokens"):
        found.append("tokenizer_config.json: split_special_tokens is not used: prompts may hold control tokens")
    return found


def hidden(piece: str) -> str:
    """Returns a name for a piece that no text yields: it begins with a noncharacter of Unicode."""
    return f"\ufdd2{piece}\ufdd3"


def _hide(fields: dict[str, Any], literals: Collection[str]) -> dict[str, Any]:
    """Returns a tokenizer.json whose model makes none of these pieces of any text. All ids stay the same."""
    if not literals:
        return fields
    model, names = dict(fields["model"]), {literal: hidden(literal) for literal in literals}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & {*_merged(model, merge)}]
    added = [record | {"content": names.get(record["content"], record["content"])} for record in fields["added_tokens"]]
    return fields | {"model": model, "added_tokens": added}


def _is_merged(model: Mapping[str, Any], piece: str) -> bool:
    """Returns whether the merges of a BPE make this piece of ordinary text."""
    return any(_merged(model, merge)[-1] == piece for merge in model.get("merges") or ())


def _merged(model: Mapping[str, Any], merge: Any) -> tuple[str, str, str]:
    """Returns the two pieces that a merge of BPE puts together, and the piece that it makes."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _without_prefix(part: Any, all_kinds: bool) -> Any:
    """Returns a part of tokenizer.json without the settings that add a space in front of a text or strip it.

    None means that the whole part has to be removed.

    Args:
      part: The part.
      all_kinds: Whether to remove all these settings, for text that continues earlier text. If False, those are removed
        that concern only the beginning of a whole text; behind a control token, the others still hold.
    """
    if isinstance(part, list):
        kept = [_without_prefix(p, all_kinds) for p in part]
        return [p for p in kept if p is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if all_kinds and (kind == "Prepend" or (kind == "Strip" and part.get("content") == " " and part.get("start"))):
        return None
    result = {}
    for key, value in part.items():
        if key in ("vocab", "merges", "added_tokens"):
            result[key] = value
        elif key == "prepend_scheme" and (all_kinds or value == "first"):
            result[key] = "never"
        elif key == "add_prefix_space" and all_kinds:
            result[key] = False
        else:
            result[key] = _without_prefix(value, all_kinds)
    return result
