"""Reads the marks in chat data that say which answers are learned."""

from collections.abc import Collection, Mapping
from typing import Any

from llada_jax.data.prepare.json_lines import shown
from llada_jax.data.prepare.left_out import BadItem

# Marks that are true, or 1, for what is learned, and marks that are true for what is not.
LEARNED = (
    "weight", "train", "training", "loss", "loss_weight", "loss_scale", "loss_mask", "trainable", "train_on_turn",
)  # fmt: skip
MASKED = ("mask", "masked", "ignore_loss")
MARKS = (*LEARNED, *MASKED)
IN_A_LIST = ("weights", "loss_weights", "loss_masks", "masks")  # such lists have one mark for each message
_ONLY_IF_BOOLEAN = ("loss", "training")  # on a line, another value is a measurement, or the name of a part of the data


def of_a_line(line: Mapping[str, Any], askers: Collection[str]) -> tuple[bool | None, set[str]]:
    """Returns whether the answers of a line are learned, or None if it has no marks, and the keys that are its marks.

    Args:
      line: The line.
      askers: The names, in small letters, of speakers who are never learned. A "mask" may name one of them.

    Raises:
      BadItem: If a mark cannot be honoured, or if the marks contradict each other.
    """
    for key in IN_A_LIST:
        if isinstance(line.get(key), list) and line[key]:
            raise BadItem(f'the line has "{key}", a list of marks: mark each message itself', "odd mark")
    marks = {key: line.get(key) for key in MARKS}
    marks = {key: value for key, value in marks.items() if key not in _ONLY_IF_BOOLEAN or isinstance(value, bool)}
    read = set(marks)
    if isinstance(marks.get("mask"), str) and marks["mask"].lower() in askers:
        del marks["mask"]
    return _learned(marks, "the line"), read


def of_a_message(message: dict[str, Any], what: str) -> bool | None:
    """Removes the marks from a message, and returns whether it is learned, or None if it has no marks.

    Args:
      message: The message.
      what: What it is called in an error message.

    Raises:
      BadItem: If a mark cannot be honoured, or if the marks contradict each other.
    """
    return _learned({key: message.pop(key, None) for key in MARKS}, what)


def _learned(marks: Mapping[str, Any], what: str) -> bool | None:
    found: dict[str, bool] = {}
    for key, value in marks.items():
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise BadItem(
                f'{what} has "{key}": {shown(value)}, but only true and false (1 and 0) can be honoured', "odd mark"
            )
        found[key] = bool(value) != (key in MASKED)
    if len(set(found.values())) > 1:
        raise BadItem(f"{what} has marks that contradict each other: {', '.join(found)}", "odd mark")
    return next(iter(found.values()), None)
