"""Records how texts appear: what each reverse step kept or took back, and how sure the model was of it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths
from llada_jax.sampling.sampler import denoise_steps
from llada_jax.sampling.settings import OF_CAUSAL
from llada_jax.sampling.text_completion import (
    DEFAULTS,
    Batch,
    Options,
    Prompt,
    encode_prompt,
    finished_text,
    make_batches,
    row_keys,
    text_length,
)
from llada_jax.sampling.watching import Step, open_id
from llada_jax.text.tokenizer import Tokenizer

ALTERNATIVES = 4  # the most probable tokens that are recorded at each position
# Settings that are always named. The others are where they are not the default.
MAIN = ("steps", "gen_length", "block_length", "temperature", "remasking")


@dataclasses.dataclass(frozen=True)
class Token:
    """A token on the canvas, as it is shown."""

    id: int
    text: str  # "" for a token that is a part of a character which a later token completes
    control: bool = False  # whether it is a control token; its text is then its literal


@dataclasses.dataclass(frozen=True)
class Change:
    """What a reverse step did at one position."""

    position: int
    token: Token | None  # None: the token was taken back, and the position is masked again
    probability: float | None = None  # of the token; None if none was predicted: the text had ended, or was moved
    likely: tuple[tuple[Token, float], ...] = ()  # the most probable tokens with their probabilities
    same: bool = False  # whether only the text of the token changed, because a neighbour completed its character


@dataclasses.dataclass
class Record:
    """How the text of one prompt appeared. Positions count from the first real token."""

    prompt: str
    settings: dict[str, Any]
    start: list[Token | None]  # the canvas before the first step; None = masked
    steps: list[list[Change]] = dataclasses.field(default_factory=list)
    completion: str = ""
    end: int = 0  # the number of positions before the end of the text


class Recorder:
    """Records the denoising of the prompts of one call.

    Attributes:
      records: The finished records, by the index of the prompt.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, texts: list[str], options: Options):
        self.records: dict[int, Record] = {}
        self._model, self._tokenizer, self._texts, self._options = model, tokenizer, texts, options
        self._tokens: dict[tuple[int, bool], Token] = {}

    def complete(self, key: jax.Array, batch_size: int, report: Callable[[int], None] = lambda done: None) -> list[str]:
        """Returns what `text_completion.complete` returns for the texts, and records every step."""
        prompts = [encode_prompt(text, self._model, self._tokenizer, self._options) for text in self._texts]
        for batch in make_batches(self._model, prompts, self._options, batch_size):
            arguments = (batch.prompt_BT, batch.config, row_keys(key, batch.rows), batch.real_BT)
            steps = denoise_steps(self._model, *arguments, alternatives=ALTERNATIVES)
            for _ in self.follow(steps, batch, prompts):
                pass
            report(len(self.records))
        return [self.records[i].completion for i in range(len(prompts))]

    def follow(self, steps: Iterable[Step], batch: Batch, prompts: list[Prompt]) -> Iterator[Step]:
        """Yields the steps of a batch as they are, and records them.

        Args:
          steps: What `sampler.denoise_steps` yields for the batch, with ALTERNATIVES alternatives.
          batch: The batch.
          prompts: All prompts, in the order of the texts.
        """
        rows = {i: row for row, i in reversed([*enumerate(batch.rows)])}  # prompts that fill up a batch come once
        canvases: dict[int, Canvas] = {}
        reach: dict[int, int] = {}  # how far the shown part of the canvas ever went
        step = None
        for step in steps:
            for i, row in rows.items():
                start = int(np.sum(~batch.real_BT[row]))
                tokens_T = step.tokens_BT[row, start:]
                if np.any(tokens_T == self.mask_id):
                    end = lengths.shown(tokens_T, prompts[i].ids_T, batch.config, self._model.config)
                    reach[i] = max(reach.get(i, 0), end)
                if i not in canvases:
                    canvases[i] = Canvas(tokens_T, self)
                    named = _settings(batch, self._options, self._model.config.causal)
                    self.records[i] = Record(self._texts[i], named, list(canvases[i].shown))
                else:
                    fields = (None if field is None else field[row, start:] for field in step)
                    self.records[i].steps.append(canvases[i].advance(Step(*fields)))
            yield step
        for i, row in rows.items():
            tokens_T = step.tokens_BT[row, int(np.sum(~batch.real_BT[row])) :]
            self._finish(self.records[i], tokens_T, prompts[i], reach.get(i, len(tokens_T)))

    def _finish(self, record: Record, tokens_T: np.ndarray, prompt: Prompt, reach: int) -> None:
        record.start = record.start[:reach]
        record.steps = [[change for change in step if change.position < reach] for step in record.steps]
        while record.steps and not record.steps[-1]:  # other rows of the batch took longer
            record.steps.pop()
        record.completion = finished_text(tokens_T, prompt, self._model, self._tokenizer)
        given = len(prompt.ids_T)
        record.end = given + text_length(tokens_T[given:], self._model, self._tokenizer)

    @property
    def mask_id(self) -> int:
        return open_id(self._model.config.mask_id)

    def token(self, i: int, first: bool) -> Token:
        """Returns a token as it is shown alone.

        Args:
          i: The id.
          first: Whether a text begins with the token.
        """
        if (known := self._tokens.get((i, first))) is None:
            literal = self._tokenizer.decode([i], continuation=not first)
            control = bool(literal) and not self._tokenizer.decode([i], skip_special=True, continuation=not first)
            known = self._tokens[i, first] = Token(i, literal, control)
        return known

    def begins(self, before: int) -> bool:
        """Returns whether a text begins behind this token."""
        return before in (self._tokenizer.bos_id, self._tokenizer.eos_id)

    def characters(self, tokens: list[Token], first: bool) -> list[Token]:
        """Returns adjacent tokens that are parts of characters, each with the characters that it completes."""
        result, done = [], ""
        for count, token in enumerate(tokens, 1):
            text = self._tokenizer.decode([one.id for one in tokens[:count]], continuation=not first)
            whole = text if count == len(tokens) else text.rstrip("\ufffd")
            result.append(dataclasses.replace(token, text=whole[len(done) :]))
            done = whole if len(whole) > len(done) else done
        return result


class Canvas:
    """The tokens of one prompt, as they are shown."""

    def __init__(self, tokens_T: np.ndarray, recorder: Recorder):
        self._tokens_T, self._recorder = tokens_T, recorder
        self.shown: list[Token | None] = [None] * len(tokens_T)
        self._show(range(len(tokens_T)))

    def advance(self, step: Step) -> list[Change]:
        """Returns the changes that one step of this row makes, by ascending position."""
        before, changed = list(self.shown), np.flatnonzero(step.tokens_BT != self._tokens_T).tolist()
        self._tokens_T = step.tokens_BT
        self._show({p for at in changed for p in (at - 1, at, at + 1) if 0 <= p < len(before)})
        moved, changes = set(changed), []
        for at, (old, new) in enumerate(zip(before, self.shown, strict=True)):
            if at not in moved:
                if old != new:
                    changes.append(Change(at, new, same=True))
            elif new is None or np.isnan(step.probability_BT[at]):
                changes.append(Change(at, new))
            else:
                first = self._is_first(at)
                ids, probabilities = step.likely_BTN[at].tolist(), step.likely_probability_BTN[at].tolist()
                likely = zip((self._recorder.token(i, first) for i in ids), probabilities, strict=True)
                changes.append(Change(at, new, float(step.probability_BT[at]), tuple(likely)))
        return changes

    def _is_first(self, at: int) -> bool:
        return at == 0 or self._recorder.begins(int(self._tokens_T[at - 1]))

    def _show(self, positions: Iterable[int]) -> None:
        alone = {at: self._alone(at) for at in positions}
        for at, token in alone.items():
            if not _partial(token):
                self.shown[at] = token
                continue
            first = last = at
            while first and _partial(self._alone(first - 1)):
                first -= 1
            while last + 1 < len(self.shown) and _partial(self._alone(last + 1)):
                last += 1
            run = [self._alone(p) for p in range(first, last + 1)]
            self.shown[first : last + 1] = self._recorder.characters(run, self._is_first(first))

    def _alone(self, at: int) -> Token | None:
        i = int(self._tokens_T[at])
        return None if i == self._recorder.mask_id else self._recorder.token(i, self._is_first(at))


def _partial(token: Token | None) -> bool:
    """Returns whether a token may be a part of a character that its neighbours complete."""
    return token is not None and not token.control and "\ufffd" in token.text


def _settings(batch: Batch, options: Options, causal: bool) -> dict[str, Any]:
    """Returns the settings to name: the main ones, and those that are not the default."""
    names = [field.name for field in dataclasses.fields(options) if not causal or field.name in OF_CAUSAL]
    values = {name: getattr(batch.config, name) for name in names}
    if options.steps is None:
        values.pop("steps", None)  # the number of steps follows from the other settings
    return {name: value for name, value in values.items() if name in MAIN or value != getattr(DEFAULTS, name)}
