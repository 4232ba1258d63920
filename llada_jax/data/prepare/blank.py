"""Recognises texts of nothing: blanks, line ends, and characters that have no width and no meaning of their own."""

import unicodedata

# Control and format characters (byte order marks, zero-width spaces, soft hyphens, NUL) and all kinds of separators.
_CATEGORIES = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
# Characters of other categories that are shown as a blank or as nothing.
_FILLERS = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0")


def is_blank(text: str) -> bool:
    """Returns whether a text has no character that says anything. Such a text is no document."""
    return all(c in _FILLERS or unicodedata.category(c) in _CATEGORIES for c in text.strip())
