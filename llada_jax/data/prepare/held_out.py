"""Decides which text is held out for validation: text whose hash is below a bound, so the choice is repeatable."""

import hashlib
from collections.abc import Iterable, Sequence

from llada_jax.config import UserError

HASH_RULE = "blake2b, 8 bytes, little-endian, of the text in UTF-8"
_HASH_BITS = 64


def text_hash(text: str) -> int:
    """Returns the hash of a text, computed as HASH_RULE says."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BITS // 8).digest(), "little")


def held_out_below(texts: Iterable[str], fraction: float, inputs: Sequence[str]) -> int:
    """Returns the bound for hashes: a text is held out if its hash is below the bound.

    The bound is `fraction` times the range of the hash. If no text has a hash below that number, the bound is chosen
    such that exactly the text with the smallest hash is held out. The texts are read only up to the first one that is
    held out. If `fraction` is 0, nothing is held out.

    Args:
      texts: The texts. For conversations, these are the names of their groups.
      fraction: The share of the texts to hold out.
      inputs: The inputs that the texts come from; an error message names them.

    Raises:
      UserError: If there is no text, or if all texts are the same, so that none can be held out.
    """
    below = int(fraction * 2**_HASH_BITS)
    smallest = largest = None
    for text in texts:
        key = text_hash(text)
        if not below or key < below:
            return below
        smallest = key if smallest is None else min(key, smallest)
        largest = key if largest is None else max(key, largest)
    if smallest is None:
        raise UserError(f"there is no text in the input: {', '.join(inputs)}")
    if smallest == largest:
        raise UserError(
            f"validation_fraction={fraction} needs at least two different documents (or groups), but the input has "
            "only one: give more text, or set validation_fraction=0"
        )
    return smallest + 1
