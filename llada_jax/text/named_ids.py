"""Finds the special ids that the files of a model's folder name: MASK, BOS, EOS, and whatever else ends a text."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from llada_jax.config import UserError
from llada_jax.text.added_tokens import content
from llada_jax.text.json_files import read_object

# What a token that ends a text is called in the files: EOS, and the end of a turn, of a message and of a document.
_ENDS = ("eos", "eot", "eom", "eod")
END_IDS = tuple(f"{name}_token_id" for name in _ENDS)
_END_TOKENS = tuple(f"{name}_token" for name in _ENDS)
_MODEL_IDS = {"mask": "mask_token_id", "bos": "bos_token_id", "eos": "eos_token_id"}
_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_MOST_IDS = 1 << 24  # far more ids than any vocabulary has


def is_id(value: Any) -> bool:
    """Returns whether a value from JSON is an integer of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def listed(value: Any) -> list[Any]:
    """Returns the ids that a field names: it holds one id, a list of ids, or null."""
    return value if isinstance(value, list) else [] if value is None else [value]


def others(ids: Iterable[int | None], known: Collection[int | None]) -> tuple[int, ...]:
    """Returns the distinct ids that are not among the known ones, in their order, without None."""
    return tuple(i for i in dict.fromkeys(ids) if i is not None and i not in known)


def ends_of_files(files: Mapping[str, bytes], id_of: Callable[[str], int | None]) -> list[int]:
    """Returns the ids that the files beside a tokenizer name as ends of a text, by literal or by id.

    Args:
      files: The tokenizer's files, name -> content.
      id_of: Returns the id of a literal, or None if the tokenizer has no such token.
    """
    found = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads(files.get(name, b"{}"))
        for key in _END_TOKENS:
            for token in listed(fields.get(key)):
                literal = content(token)
                found.append(id_of(literal) if isinstance(literal, str) else None)
        found += [i for key in END_IDS for i in listed(fields.get(key)) if is_id(i)]
    return [*others(found, ())]


def model_ids(folder: epath.Path) -> dict[str, list[int]]:
    """Returns role -> ids for "mask", "bos" and "eos", and further "ends", as far as the files of a folder state them.

    The folder is a published folder (config.json states the roles, and generation_config.json further ends), a workdir,
    or the folder of a prepared set's tokenizer. An id that has no row in the model's embedding is left out: such a
    model cannot be loaded.

    Raises:
      UserError: If a file is damaged.
    """
    path = folder / _CONFIG
    if not path.exists():
        return {}
    try:
        fields = read_object(path.read_bytes(), str(path))
        if "config" in fields:  # a workdir
            model = fields["config"]["model"]
            named, rows = {role: listed(model.get(f"{role}_id")) for role in _MODEL_IDS}, model.get("vocab_size")
            named["ends"] = listed(model.get("end_ids"))
        else:
            named = {role: listed(fields.get(name)) for role, name in _MODEL_IDS.items()}
            path = folder / GENERATION_CONFIG
            further = read_object(path.read_bytes(), str(path)) if path.exists() else {}
            named["ends"] = [i for key in END_IDS for source in (fields, further) for i in listed(source.get(key))]
            rows = fields.get("embedding_size") or fields.get("vocab_size")
    except (OSError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    limit = min(rows, _MOST_IDS) if is_id(rows) and rows else _MOST_IDS
    return {role: [i for i in ids if is_id(i) and i < limit] for role, ids in named.items()}


def size_of(ids: Iterable[int]) -> int:
    """Returns the largest id + 1.

    Raises:
      UserError: If no vocabulary is so large: tables over all ids would fill the memory.
    """
    size = 1 + max(ids)
    if size > _MOST_IDS:
        raise UserError(f"the files give a token the id {size - 1}, which no vocabulary has")
    return size


def ranges(numbers: Iterator[int]) -> tuple[tuple[int, int], ...]:
    """Returns ascending numbers as ranges (first, last + 1)."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return tuple((first, end) for first, end in found)
