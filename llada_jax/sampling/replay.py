"""Makes the page that replays how texts appeared: one file of HTML that refers to no other file."""

from collections.abc import Sequence
from typing import Any

from llada_jax.cli import pages
from llada_jax.sampling.recording import ALTERNATIVES, Change, Record, Token

MOST = 200  # records that one page may hold
_SURE = 10_000  # probabilities are whole numbers of this part


def page(records: Sequence[Record], settings: dict[str, Any]) -> str:
    """Returns the page.

    Args:
      records: The records, one for each prompt, at most MOST.
      settings: What to name beside the settings of the sampler, such as the model.
    """
    return pages.page(__package__, "replay", encoded(records, settings))


def encoded(records: Sequence[Record], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the records as a JSON object, in columns of whole numbers, which take little space.

    "tokens" has each token once: its id, its text, and whether it is a control token. Elsewhere a token is an index
    into these. A sample has the canvas before the first step as "start" (-1 = masked), and the number of changes of
    each step as "counts". All changes, in order, have these columns:

      at        the position, less that of the change before it in the same step
      token     the token; -1 if the position was masked again; -2 - token if only the text of the token changed
      sure      10,000 times the probability; -1 if no token was predicted
      likely, likely_sure    ALTERNATIVES tokens and 10,000 times their probabilities, only where `sure` is not -1
    """
    index: dict[Token, int] = {}

    def number(token: Token | None) -> int:
        return -1 if token is None else index.setdefault(token, len(index))

    def sample(record: Record) -> dict[str, Any]:
        columns: dict[str, list[int]] = {name: [] for name in ("at", "token", "sure", "likely", "likely_sure")}
        for step in record.steps:
            before = 0
            for change in step:
                _add(columns, change, before, number)
                before = change.position
        return {
            "prompt": record.prompt,
            "completion": record.completion,
            "settings": {name: str(value) for name, value in record.settings.items()},
            "end": record.end,
            "start": [number(token) for token in record.start],
            "counts": [len(step) for step in record.steps],
            **columns,
        }

    samples = [sample(record) for record in records]
    return {
        "settings": {name: str(value) for name, value in settings.items()},
        "alternatives": ALTERNATIVES,
        "samples": samples,
        "tokens": {
            "id": [token.id for token in index],
            "text": [token.text for token in index],
            "control": [int(token.control) for token in index],
        },
    }


def _add(columns: dict[str, list[int]], change: Change, before: int, number) -> None:
    columns["at"].append(change.position - before)
    columns["token"].append(-2 - number(change.token) if change.same else number(change.token))
    if change.probability is None:
        columns["sure"].append(-1)
        return
    columns["sure"].append(round(_SURE * change.probability))
    columns["likely"] += [number(token) for token, _ in change.likely]
    columns["likely_sure"] += [round(_SURE * probability) for _, probability in change.likely]
