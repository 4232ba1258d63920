"""Plays records of denoisings, and the pages made of them, so that tests can compare them with what happened."""

import json
import re
from typing import Any

from llada_jax.sampling.recording import Record, Token


def tokens(record: Record) -> list[list[Token | None]]:
    """Returns the tokens before the first step and after each step; None = masked."""
    states = [list(record.start)]
    for changes in record.steps:
        states.append(list(states[-1]))
        for change in changes:
            states[-1][change.position] = change.token
    return states


def canvases(record: Record, mask_id: int) -> list[list[int]]:
    """Returns the ids before the first step and after each step."""
    return [[mask_id if token is None else token.id for token in state] for state in tokens(record)]


def texts(record: Record) -> list[list[str | None]]:
    """Returns what is shown before the first step and after each step; None = masked."""
    return [[None if token is None else token.text for token in state] for state in tokens(record)]


def data(page: str) -> dict[str, Any]:
    """Returns the data in a page."""
    return json.loads(re.search(r"^const data = (.*);$", page, re.M)[1])


def played(page: dict[str, Any], sample: dict[str, Any]) -> list[list[tuple[int, str] | None]]:
    """Returns the (id, text) of the tokens of a sample before the first step and after each step; None = masked."""
    known = page["tokens"]
    changes = iter(zip(sample["at"], sample["token"], strict=True))
    states = [list(sample["start"])]
    for count in sample["counts"]:
        states.append(list(states[-1]))
        at = 0
        for _ in range(count):
            move, token = next(changes)
            at += move
            states[-1][at] = token if token >= -1 else -2 - token
    assert next(changes, None) is None
    return [[None if i < 0 else (known["id"][i], known["text"][i]) for i in state] for state in states]
