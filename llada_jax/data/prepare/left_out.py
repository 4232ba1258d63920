"""Decides what is done with a bad document or conversation: the preparation ends, or leaves it out and counts it."""

from collections import Counter

from llada_jax.config import UserError
from llada_jax.data.manifest import LeftOut

ON_ERROR = ("stop", "skip")
LARGEST_SHARE = 0.1  # if a larger share of the input is bad, the preparation fails even with on_error="skip"
_SKIP_HELPS = "python -m llada_jax.prepare --on_error=skip leaves it out"
_EXAMPLES = 3  # number of examples that are kept of each kind


def printable(text: str) -> str:
    """Returns a text of a file for a message: what cannot be printed on one line is written as in a Python string."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class BadItem(UserError):
    """A document or conversation that cannot be used. The message names its file and line.

    Attributes:
      kind: What is wrong, in words that are the same for all items of this kind.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(printable(message))
        self.kind = kind


class Faults:
    """Collects the bad items of a preparation.

    The items may be added in any order. The result depends only on the items and on their positions in the input.
    """

    def __init__(self, on_error: str):
        """Begins without any items.

        Args:
          on_error: "stop" or "skip".

        Raises:
          UserError: If `on_error` is something else.
        """
        if on_error not in ON_ERROR:
            raise UserError(f"on_error={on_error!r}: choose one of {', '.join(ON_ERROR)}")
        self._skip = on_error == "skip"
        self.clear()

    def clear(self) -> None:
        """Forgets all items, before the input is read once more."""
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, str]]] = {}

    @property
    def skip(self) -> bool:
        """Whether bad items are left out."""
        return self._skip

    def add(self, error: BadItem, position: int) -> None:
        """Counts a bad item.

        Args:
          error: What is wrong with the item.
          position: The position of the item in the whole input.

        Raises:
          UserError: If bad items are not left out.
        """
        if not self._skip:
            raise UserError(f"{error}; {_SKIP_HELPS}") from None
        self._counts[error.kind] += 1
        examples = self._examples.setdefault(error.kind, [])
        examples.append((position, str(error)))
        examples.sort()
        del examples[_EXAMPLES:]

    @property
    def found(self) -> dict[str, tuple[int, list[tuple[int, str]]]]:
        """The bad items by their kind: how many there are, and the first of them with their positions."""
        return {kind: (count, list(self._examples[kind])) for kind, count in self._counts.items()}

    def merge(self, found: dict[str, tuple[int, list[tuple[int, str]]]], before: int) -> None:
        """Adds what another `Faults` has found in a part of the input that has `before` items in front of it.

        Raises:
          UserError: If bad items are not left out.
        """
        for kind, (count, examples) in found.items():
            if not self._skip:
                raise UserError(f"{examples[0][1]}; {_SKIP_HELPS}")
            self._counts[kind] += count
            moved = [(position + before, text) for position, text in examples]
            self._examples[kind] = sorted(self._examples.get(kind, []) + moved)[:_EXAMPLES]

    def checked(self, kept: int, what: str) -> tuple[LeftOut, ...]:
        """Returns all kinds of bad items, the largest first.

        Args:
          kept: The number of items that are not bad.
          what: What the items are, for the error message.

        Raises:
          UserError: If more than `LARGEST_SHARE` of all items are bad.
        """
        bad = self._counts.total()
        kinds = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        if bad > LARGEST_SHARE * (bad + kept):
            kind, count = kinds[0]
            raise UserError(
                f"{bad:,} of {bad + kept:,} {what} are bad, which is more than the {LARGEST_SHARE:.0%} that "
                f"on_error=skip leaves out; most often ({count:,}): {kind}, for example {self._examples[kind][0][1]}"
            )
        return tuple(LeftOut(kind, count, tuple(text for _, text in self._examples[kind])) for kind, count in kinds)
