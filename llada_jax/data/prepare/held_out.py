"""Which text is held out for validation: that whose hash lies below a bound; the same text always is."""

import hashlib
from collections.abc import Iterable, Sequence

from llada_jax.config import UserError

HASH_RULE = "blake2b, 8 bytes, little-endian, of the text in UTF-8"
_HASH_BITS = 64


def text_hash(text: str) -> int:
    """As HASH_RULE says."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BITS // 8).digest(), "little")


def held_out_below(texts: Iterable[str], fraction: float, inputs: Sequence[str]) -> int:
    """The bound below which a text's hash holds it out: a fraction of the range of the hash.

    If none is below that, the text with the smallest hash is. Reads only until the first such text, if there is one.
    UserError if there is no text, or all of it is the same; `inputs` says where it came from.
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
            f"validation_fraction={fraction} needs at least two documents (or groups) and the input is one: "
            "give more, or validation_fraction=0"
        )
    return smallest + 1
