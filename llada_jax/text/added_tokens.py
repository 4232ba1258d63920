"""What the files of a tokenizer say of its added tokens, and where such tokens stand in a text.

An added token is found in a text as it stands, before the text is encoded. Its properties are those of the tokenizers
library: which white space beside it belongs to it, and whether it is found inside words.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
# Unicode's white space. Python's own str.strip() also removes the separators U+001C to U+001F.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """How a token is found in a text.

    Attributes:
      lstrip, rstrip: Whether the white space directly in front of the token, or behind it, belongs to the token.
      single_word: Whether the token is found only where no letter, digit or underscore is next to it.
      normalized: Whether the token is looked for in the normalised text.
    """

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


PLAIN = AddedToken()


def properties(record: Any) -> AddedToken:
    """Returns the properties in an object that describes an added token. A token given as a string has none."""
    return AddedToken(**{flag: bool(record.get(flag)) for flag in _FLAGS}) if isinstance(record, dict) else PLAIN


def content(token: Any) -> Any:
    """Returns the literal of a token, which files give as a string or as an object with the field "content"."""
    return token.get("content") if isinstance(token, dict) else token


def special_tokens(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns literal -> string or object of every token that these files call special in any role."""
    found: list[Any] = []
    for source in sources:
        found += [token for name, token in source.items() if name.endswith("_token")]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = source.get(name)
            if isinstance(more, str) or (isinstance(more, dict) and "content" in more):
                more = [more]
            found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    return {content(token): token for token in found if isinstance(content(token), str) and content(token)}


def pattern(literals: Iterable[str]) -> re.Pattern:
    """Returns the pattern that finds the longest literal at each place; its only group is the literal."""
    longest_first = sorted(filter(None, literals), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def cut(
    text: str, found: Sequence[tuple[int, str]], tokens: Mapping[str, AddedToken]
) -> Iterator[tuple[str, str | None]]:
    """Cuts a text at the added tokens in it, as the tokenizers library does.

    Args:
      text: The text.
      found: The places and the literals of tokens in the text, in order and without overlaps.
      tokens: Literal -> properties, for tokens that have any.

    Yields:
      The text in front of each token, which may be empty, and the literal of the token; at last the text behind all
      tokens, and None.
    """
    start = 0
    for first, literal in found:
        token, end = tokens.get(literal, PLAIN), first + len(literal)
        if token.single_word and (_is_word(text[first - 1 : first]) or _is_word(text[end : end + 1])):
            continue
        if token.lstrip:
            first = start + len(text[start:first].rstrip(_SPACES))
        if token.rstrip:
            end = len(text) - len(text[end:].lstrip(_SPACES))
        yield text[start:first], literal
        start = end
    yield text[start:], None


def _is_word(character: str) -> bool:
    """Returns whether a character belongs to words by Unicode's definition. The empty string does not."""
    if not character:
        return False
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
