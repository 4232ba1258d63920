"""The facts and couplets that benchmarks/reversal.py teaches and asks for, and the texts that they are taught by.

A fact "NAME is DESCRIPTION" can be written in two orders:

    forward   Bolu Kerami is the quiet baker of Tasune .
    reverse   the quiet baker of Tasune is Bolu Kerami .

Some facts are seen in one order only, some in both. A question gives the first part of one of these texts. First names,
surnames and places are invented, and all words of a fact are drawn at random, so that no answer can be guessed.

A couplet has two lines of a poem. Their reading order is the order forward; the reverse order is a text that tells the
line before another one. Characters are separated by spaces, so that a word is a token in all texts.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

FORWARD, REVERSE, BOTH = "forward", "reverse", "both"
END = "."  # behind each text, and repeated up to the length of a row

ADJECTIVES = (
    "quiet proud tall gentle clumsy famous lonely clever stubborn cheerful honest sleepy brave jealous thrifty "
    "curious modest restless polite fearless"
).split()
TRADES = (
    "baker painter miller sailor tailor weaver potter hunter glazier gardener fiddler teacher surgeon printer "
    "shepherd carpenter locksmith beekeeper clockmaker stonemason"
).split()


@dataclasses.dataclass(frozen=True)
class Item:
    """Two parts that belong together, each a text of words, and the orders in which the models see them."""

    first: str
    second: str
    seen: str  # FORWARD | REVERSE | BOTH

    def orders(self) -> tuple[str, ...]:
        """Returns the orders in which the item is seen."""
        return (FORWARD, REVERSE) if self.seen == BOTH else (self.seen,)


@dataclasses.dataclass(frozen=True)
class Task:
    """Items of one kind, and how their texts are written."""

    name: str
    items: tuple[Item, ...]
    joint: dict[str, str]  # order -> the words between the two parts
    row: int  # the number of tokens of each row, EOS included

    def parts(self, item: Item, order: str) -> tuple[str, str]:
        """Returns the text of an item in an order, cut into the part that is given and the part that is asked for."""
        given, asked = (item.first, item.second) if order == FORWARD else (item.second, item.first)
        return f"{given} {self.joint[order]}", asked

    def text(self, item: Item, order: str) -> str:
        """Returns the text of an item in an order: one row, but for its EOS."""
        words = " ".join(self.parts(item, order)).split()
        return " ".join(words + [END] * (self.row - 1 - len(words)))

    def texts(self) -> list[str]:
        """Returns all texts that the models see."""
        return [self.text(item, order) for item in self.items for order in item.orders()]


def facts(seed: int, count: int) -> Task:
    """Draws `count` facts that are seen forward only, as many that are seen in reverse only, and twice as many in both.

    Args:
      seed: The same seed gives the same facts.
      count: At least 1. There are four times as many facts in all, and no name and no description occurs twice.
    """
    rng = random.Random(seed)
    pool = 2 * count  # so that each name or place is in two facts in the mean
    words = _invented(rng, 3 * pool)
    names = rng.sample([f"{a} {b}" for a in words[:pool] for b in words[pool : 2 * pool]], 4 * count)
    descriptions = [f"the {a} {b} of {c}" for a in ADJECTIVES for b in TRADES for c in words[2 * pool :]]
    seen = [FORWARD] * count + [REVERSE] * count + [BOTH] * 2 * count
    items = map(Item, names, rng.sample(descriptions, 4 * count), seen)
    return _task("facts", tuple(items), {FORWARD: "is", REVERSE: "is"})


def couplets(seed: int, lines: Sequence[tuple[str, str]], longest: int = 7) -> Task:
    """Makes a task of couplets: two thirds are seen in reading order only, one third in both orders.

    Args:
      seed: Decides which third.
      lines: The first and the second line of each couplet. A couplet with a line that occurs twice is left out, because
        a question about it has two answers.
      longest: Couplets with longer lines are left out, because all rows are as long as the longest.
    """
    times = Counter(line for pair in lines for line in pair)
    kept = [pair for pair in lines if all(times[line] == 1 and len(line) <= longest for line in pair)]
    random.Random(seed).shuffle(kept)
    items = [
        Item(" ".join(first), " ".join(second), BOTH if i < len(kept) // 3 else FORWARD)
        for i, (first, second) in enumerate(kept)
    ]
    return _task("couplets", tuple(items), {FORWARD: "，", REVERSE: "的上一句是"})


def _task(name: str, items: tuple[Item, ...], joint: dict[str, str]) -> Task:
    longest = max(len(f"{item.first} {item.second}".split()) for item in items)
    return Task(name, items, joint, longest + 3)  # the joint, the end of the text and EOS


def _invented(rng: random.Random, count: int) -> list[str]:
    """Returns different words of three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        words[word.capitalize()] = None
    return list(words)
