"""Finds the tokens that a folder's own library puts in front of every text, such as BOS, and behind it."""

from collections.abc import Mapping
from typing import Any

from llada_jax.config import UserError

Ids = tuple[int, ...]


def of_backend(
    backend: Any, of_files: Mapping[str, tuple[int, str]], roles: Mapping[str, tuple[int, str]]
) -> tuple[Ids, list[Any], list[str]]:
    """Returns what the folder's own library does with every text.

    Args:
      backend: The tokenizer, see `backends.Backend`.
      of_files: The roles as the files have them, role -> (id, literal).
      roles: The roles with a model's ids, which may move tokens that the files lack.

    Returns:
      The ids in front of a text; what changes encoding beside the tokenizer's own file, as JSON values; and lines about
      what the files say and what is not done.

    Raises:
      UserError: If an id in front of a text is none of the tokenizer's control tokens.
    """
    named = {role: of_files[role][0] for role in {*backend.named, *backend.absent}}
    written, behind = backend.around(named)
    moved = {i: roles[role][0] for role, i in named.items() if i >= backend.size}
    front = tuple(moved.get(i, i) for i in written)
    if not {i for i, _ in roles.values()}.union(backend.special.values()).issuperset(front):
        raise UserError(f"the files put the ids {list(front)} in front of a text, but not all are control tokens")
    notes = list(backend.notes)
    for role, literal in backend.absent.items():
        if (used := of_files[role][1]) != literal:
            notes.append(f"the files name {literal!r} as {role}_token, which the tokenizer lacks: {used!r} is used")
    if behind:
        notes.append(f"the files put the ids {list(behind)} behind a text: only documents end, and they end with EOS")
    return front, [*backend.settings, *([["front", list(written)]] if front else [])], notes


def of_flags(config: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[Ids, Ids]:
    """Returns the ids in front and behind that add_bos_token and add_eos_token ask for.

    Args:
      config: The content of tokenizer_config.json.
      ids: The ids of the roles "bos" and "eos", as far as the files name them.
    """
    sides = (("add_bos_token", "bos"), ("add_eos_token", "eos"))
    front, behind = ((ids[role],) if config.get(flag) and role in ids else () for flag, role in sides)
    return front, behind


def of_post_processor(processor: Any) -> tuple[Ids, Ids]:
    """Returns the ids that the post_processor of a tokenizer.json puts in front of a text and behind it.

    Raises:
      UserError: If the post_processor does anything else to a text, or has an unknown form.
    """
    try:
        return _of_processor(processor)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"tokenizer.json: its post_processor has an unknown form: {error!r:.100}") from error


def _of_processor(processor: Any) -> tuple[Ids, Ids]:
    kind = None if processor is None else processor["type"]
    if kind in (None, "ByteLevel"):  # ByteLevel only changes the offsets of tokens
        return (), ()
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (_checked(processor["cls"][1]),), (_checked(processor["sep"][1]),)
    if kind == "Sequence":
        adding = [sides for sides in map(_of_processor, processor["processors"]) if any(sides)]
        if len(adding) > 1:  # the library does not support this either
            raise UserError("tokenizer.json: only one part of its post_processor may add tokens")
        return adding[0] if adding else ((), ())
    if kind != "TemplateProcessing":
        raise UserError(f"tokenizer.json: its post_processor {kind!r:.100} is not supported")
    sides: list[list[int]] = [[]]
    for piece in processor["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            sides[-1] += map(_checked, processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if len(sides) != 2 or any(piece.get("Sequence", {"id": "A"})["id"] != "A" for piece in processor["single"]):
        raise UserError("tokenizer.json: its post_processor must write each text exactly once")
    return tuple(sides[0]), tuple(sides[1])


def _checked(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"the id {value!r:.50}")
    return value
