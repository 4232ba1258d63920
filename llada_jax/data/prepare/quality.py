"""Judges the quality of a text by the published rules of Gopher and of C4.

  gopher             Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1, "Quality Filtering"
  gopher_repetition  the same appendix, "Repetition Removal", with the thresholds of its table A1
  c4                 Raffel et al. 2020 (arXiv 1910.10683), section 2.2, in the order in which the published code of C4
                     applies its rules. The list of bad words is left out, and so is what another stage does here
                     (languages, duplicates).

Words are what is between blanks. Where a paper leaves something open, the choice is that of the library datatrove, with
which tests/data/test_quality.py compares: what occurs a second time is a duplicate, but not its first occurrence. One
difference remains: C4 finds sentences with NLTK, which needs files of its own; here, a sentence ends with a mark such
as a full stop in front of a blank, so that "Mr. Smith" counts as the end of one.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
_REPEATED_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))

_END_MARKS = (".", "?", "!", '"', "'", "\u201d")
_ELLIPSES = ("...", "\u2026")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.?!][\"')\]\u2019\u201d]*(?:\s|$)")

WORDS, LENGTH = "gopher: not 50 to 100,000 words", "gopher: mean length of words not 3 to 10"
SYMBOLS, BULLETS = "gopher: more than 0.1 # or ... per word", "gopher: over 90 % of lines with bullets"
TRAILING, LETTERS = "gopher: over 30 % of lines end in ...", "gopher: under 80 % of words with a letter"
STOP_WORDS = "gopher: fewer than 2 stop words of English"
PARAGRAPHS, LINES = "gopher_repetition: repeated paragraphs", "gopher_repetition: repeated lines"
TOP, REPEATED = "gopher_repetition: one frequent n-gram", "gopher_repetition: repeated n-grams"
LOREM, BRACKET, SENTENCES = "c4: lorem ipsum", "c4: curly bracket", "c4: fewer than 5 sentences"
REASONS = (
    WORDS, LENGTH, SYMBOLS, BULLETS, TRAILING, LETTERS, STOP_WORDS, PARAGRAPHS, LINES, TOP, REPEATED, LOREM, BRACKET,
    SENTENCES,
)  # fmt: skip


def gopher(text: str) -> str:
    """Returns the first of Gopher's quality rules that the text breaks, a name in `REASONS`, or ""."""
    words, lines = text.split(), text.splitlines()
    spoken = [word for word in words if any(map(str.isalnum, word))]  # dashes and the like are no words
    if not 50 <= len(spoken) <= 100_000:
        return WORDS
    if not 3 <= sum(map(len, spoken)) / len(spoken) <= 10:
        return LENGTH
    if max(text.count("#"), sum(map(text.count, _ELLIPSES))) / len(words) > 0.1:
        return SYMBOLS
    if sum(line.lstrip().startswith(("-", "\u2022")) for line in lines) / len(lines) > 0.9:
        return BULLETS
    if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines) > 0.3:
        return TRAILING
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < 0.8:
        return LETTERS
    return STOP_WORDS if len(_STOP_WORDS.intersection(words)) < 2 else ""


def gopher_repetition(text: str) -> str:
    """Returns the first of Gopher's repetition rules that the text breaks, a name in `REASONS`, or ""."""
    parts = ((PARAGRAPHS, re.split(r"\n{2,}", text.strip())), (LINES, re.split(r"\n+", text)))
    for reason, pieces in parts:
        count, characters = _repeated(pieces)
        if count / len(pieces) > 0.30 or characters / len(text) > 0.20:
            return reason
    words = text.split()
    for n, share in _TOP_GRAMS:
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if len(gram) * count / len(text) > share:
                return TOP
    if any(_in_repeated_grams(words, n) / len(text) > share for n, share in _REPEATED_GRAMS):
        return REPEATED
    return ""


def _repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """Returns the number of pieces that occur earlier in the sequence, and the number of their characters."""
    seen: set[str] = set()
    again = [piece for piece in pieces if piece in seen or seen.add(piece)]
    return len(again), sum(map(len, again))


def _in_repeated_grams(words: Sequence[str], n: int) -> int:
    """Returns the number of characters of the n-grams that occur earlier; none of them overlap each other."""
    seen: set[tuple[str, ...]] = set()
    characters = i = 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


def c4(text: str) -> tuple[str, str, int]:
    """Returns (the rule of C4 that the text breaks, or ""; the text without bad lines; the number of bad lines)."""
    kept: list[str] = []
    sentences = bad = 0
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        line = _CITATION.sub("", line)
        bad += bool(line)
        too_long = any(len(word) > 1000 for word in words)
        if too_long or not line.endswith(_END_MARKS) or line.endswith(_ELLIPSES[0]) or len(words) < 3:
            continue
        small = line.lower()
        if "lorem ipsum" in small:
            return LOREM, text, 0
        if "javascript" in small:
            continue
        if "{" in line:
            return BRACKET, text, 0
        if any(policy in small for policy in _POLICIES):
            continue
        bad -= 1
        sentences += max(1, len(_SENTENCE_END.findall(line)))
        kept.append(line)
    return (SENTENCES, text, 0) if sentences < 5 else ("", "\n".join(kept), bad)


RULES: dict[str, Callable[[str], str]] = {"gopher": gopher, "gopher_repetition": gopher_repetition}
NAMES = (*RULES, "c4")
