"""Finds documents that occur earlier in the input, exactly or nearly.

Exactly: the hash of the text (blake2b, 16 bytes) is the same.

Nearly: MinHash with locality-sensitive hashing, with the settings of FineWeb (arXiv 2406.17557): 112 hashes of the
document's runs of 5 words (small letters, without punctuation), in 14 bands of 8. Two documents are near duplicates if
they have the same 8 hashes in a band. If they share a part s of their runs (Jaccard), that happens with the probability
1 - (1 - s^8)^14: 5 % for s = 0.5, 56 % for 0.7, 77 % for 0.75, 92 % for 0.8. Candidates are not compared any further.

A document is a duplicate if any earlier document has one of its keys, even if that one is itself a duplicate. Unlike a
comparison with the documents that are kept, this does not depend on what is decided before, so that a fleet can do it.
"""

import functools
import hashlib

import numpy as np

from llada_jax.data.prepare.overlap import words_of

BANDS, ROWS, RUN = 14, 8, 5
EXACT_KEYS = 2  # uint64 numbers that the hash of a text takes

_SCHEME = "affine32"
_RUNS_AT_ONCE = 4096


def exact_keys(text: str) -> np.ndarray:
    """Returns the hash of a text, uint64 [2]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * EXACT_KEYS).digest(), "<u8")


def near_keys(text: str) -> np.ndarray:
    """Returns one key per band, uint64 [14]."""
    hashes = signature(text).hashvalues.astype("<u8").reshape(BANDS, ROWS)
    digests = [hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in hashes]
    return np.frombuffer(b"".join(digests), "<u8")


def signature(text: str):
    """Returns the datasketch.MinHash of a text."""
    from datasketch import MinHash

    words = words_of(text)
    # A text without words, such as a row of signs, is compared as a whole.
    runs = [*{" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}] if words else [text]
    found = MinHash(BANDS * ROWS, permutations=_permutations(), scheme=_SCHEME)
    for start in range(0, len(runs), _RUNS_AT_ONCE):  # a long text would need much memory at once
        found.update_batch([run.encode() for run in runs[start : start + _RUNS_AT_ONCE]])
    return found


@functools.cache
def _permutations():
    from datasketch import MinHash

    return MinHash(BANDS * ROWS, seed=1, scheme=_SCHEME).permutations


def repeated(keys: np.ndarray) -> np.ndarray:
    """Returns for each key whether the same key is earlier in the array.

    Args:
      keys: uint64 [N], or [N, 2] for keys of two numbers.

    Returns:
      bool [N].
    """
    rows = keys if keys.ndim == 2 else keys[:, None]
    order = np.lexsort(rows.T)  # a stable sort, so equal keys stay in the order of the input
    same = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    found = np.zeros(len(keys), bool)
    found[order[1:][same]] = True
    return found
