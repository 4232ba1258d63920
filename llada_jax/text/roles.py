"""Finds the ids and literals of the six roles, as a tokenizer's files and a model's config name them."""

from collections.abc import Mapping, Set

from llada_jax.text.backends import MASK_LITERAL, ROLES, Backend
from llada_jax.text.without import without


def roles_of(backend: Backend) -> dict[str, tuple[int, str]]:
    """Returns role -> (id, literal) of all six roles; tokens that the tokenizer lacks get new ids after its own."""
    roles, size = {}, backend.size
    for role, names in ROLES.items():
        literal = backend.named.get(role) or next((n for n in names if n in backend.special), None)
        if literal is None:
            roles[role] = size, backend.absent.get(role, names[0])
            size += 1
        else:
            roles[role] = backend.special[literal], literal
    return roles


def of_model(
    roles: Mapping[str, tuple[int, str]], backend: Backend, ids: Mapping[str, int]
) -> dict[str, tuple[int, str]]:
    """Returns the roles with a model's ids for some of them. Appended tokens that have such an id get a new one."""
    literals = {i: literal for literal, i in backend.special.items()}
    result = {**roles, **{role: (i, literals.get(i, roles[role][1])) for role, i in ids.items()}}
    for role, (i, literal) in roles.items():
        if role not in ids and i >= backend.size and i in ids.values():
            result[role] = 1 + max(backend.size - 1, *(taken for taken, _ in result.values())), literal
    return result


def as_the_model_says(
    backend: Backend, roles: Mapping[str, tuple[int, str]], ids: Mapping[str, int], ends: Set[int]
) -> tuple[Backend, dict[str, int], list[str]]:
    """Returns what a model's ids change: the backend that encodes text, the ids that differ, and lines that say so.

    Text must not yield the model's MASK: the model could not tell that the token is known. If MASK is one of the ids of
    ordinary text, the text of this token is therefore encoded as several smaller tokens.

    Args:
      backend: The tokenizer as its files describe it.
      roles: The roles as the files describe them: role -> (id, literal).
      ids: The ids that the model states: role -> id.
      ends: The further ids that the model names as ends of a text.
    """
    notes = []
    different = {role: i for role, i in ids.items() if roles[role][0] != i}
    for role, i in different.items():
        own, literal = roles[role]
        # A role that was appended is in no file, so no file disagrees.
        if own < backend.size and not (role == "eos" and own in ends):
            notes.append(
                f"{role.upper()} is {i} in the model's config.json, but {own} ({literal}) in the tokenizer's files: "
                f"{i} is used; set {role}_token_id in config.json, or {role}_token in tokenizer_config.json, if that "
                "is wrong"
            )
    mask_id = ids.get("mask", roles["mask"][0])
    if mask_id >= backend.size or mask_id in backend.special.values() or mask_id not in backend.ids():
        return backend, different, notes
    encoder, text = without(backend, mask_id), backend.decode([mask_id], True)
    how = "is encoded as other tokens" if encoder else "is read as MASK, because no other tokens make it up"
    notes.append(f"MASK is {mask_id}, which is also the token of ordinary text {text!r}: such text {how}")
    return encoder or backend, different, notes


def specials(backend: Backend, roles: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    """Returns literal -> id of every control token. MASK has two literals: its own and "[MASK]"."""
    named = {literal: i for i, literal in roles.values()}
    return {**backend.special, **named, MASK_LITERAL: roles["mask"][0]}
