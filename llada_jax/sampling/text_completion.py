"""Completes prompts given as text, in batches, and returns the completions as text; built on `sampling.sampler`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from llada_jax.config import SamplerConfig, UserError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths
from llada_jax.sampling.sampler import generate
from llada_jax.text.tokenizer import Tokenizer

DEFAULTS = SamplerConfig()
# Where there are several batches, prompts are padded to a multiple of this length, so that few programs are compiled.
LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings that a user chooses. Where a setting is None, its value depends on the prompt."""

    steps: int | None = None  # None = as many steps as it takes to unmask one token per step
    # None = 64, or 0 if the prompt itself contains MASK tokens; or the largest length, if the length is not fixed.
    # "auto" becomes the largest length.
    gen_length: int | str | None = None
    length: str | None = None  # None becomes "fixed", or "append" with gen_length="auto"
    block_length: int = DEFAULTS.block_length
    temperature: float = 0.0
    top_k: int = DEFAULTS.top_k
    top_p: float = DEFAULTS.top_p
    remasking: str = DEFAULTS.remasking
    commit: str = DEFAULTS.commit
    commit_bound: float | None = None
    cache: str = DEFAULTS.cache
    cache_refresh: int = DEFAULTS.cache_refresh
    suffix_window: int = DEFAULTS.suffix_window
    revoke: str = DEFAULTS.revoke
    revoke_bound: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self):
        """Settles what gen_length="auto" means. Raises UserError if it contradicts `length`, or is another word."""
        if isinstance(self.gen_length, str) and self.gen_length != lengths.AUTO:
            raise UserError(f"gen_length={self.gen_length!r}: give a number of tokens, or auto")
        given = {"gen_length": self.gen_length} | ({} if self.length is None else {"length": self.length})
        settled = {"length": DEFAULTS.length} | lengths.automatic(given, lengths.LONGEST)
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def sampler(self, masks: int, gen_length: int, causal: bool = False) -> SamplerConfig:
        """Returns the sampler's settings for prompts that contain up to `masks` MASK tokens.

        A causal model takes no number of steps; the sampler's default stands for it.

        Raises:
          UserError: If the number of steps is given but follows from the rule of `commit`, or from the model.
        """
        if self.steps is not None and self.commit != DEFAULTS.commit:
            raise UserError(f"steps={self.steps} has no effect with commit={self.commit}: the number of steps follows")
        # One step per token would be too few: all blocks get equal shares of the steps, but the last may be short.
        blocks = -(-(masks + gen_length) // max(self.block_length, 1))
        steps = max(1, blocks * self.block_length) if self.steps is None else self.steps
        if causal:
            if self.steps is not None:
                raise UserError(f"steps={self.steps}: this model is causal and takes a step per token: leave steps out")
            steps = DEFAULTS.steps
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(Options)}
        return SamplerConfig(**(same | {"steps": steps, "gen_length": gen_length}))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as tokens."""

    ids_T: np.ndarray  # int32
    masks: int  # number of MASK tokens in ids_T
    gen_length: int  # number of MASK tokens to append


@dataclasses.dataclass(frozen=True)
class Batch:
    """Left-padded prompts that are completed together."""

    rows: list[int]  # indices into the list of prompts; an index may be repeated to fill up the batch
    prompt_BT: np.ndarray  # int32
    real_BT: np.ndarray  # bool, False = padding
    config: SamplerConfig


def encode_prompt(text: str, model: Transformer, tokenizer: Tokenizer, options: Options) -> Prompt:
    """Encodes a prompt. The literals of control tokens in the text, such as "[MASK]", become one token each."""
    return make_prompt(tokenizer.encode_text(text, special=True), model, tokenizer, options)


def make_prompt(ids: Sequence[int], model: Transformer, tokenizer: Tokenizer, options: Options) -> Prompt:
    """Makes a prompt from the tokenizer's ids.

    Raises:
      UserError: If the model does not say which token is MASK, if its vocabulary lacks a token of the prompt, or if the
        rule for the length does not fill in prompts.
    """
    mask_id, ids = model.config.mask_id, [*map(int, ids)]
    if model.config.causal:
        if tokenizer.mask_id in ids:
            raise UserError(
                "a prompt contains [MASK], but this model is causal: it continues texts and fills in nothing"
            )
    elif mask_id is None:
        raise UserError("the model does not say which token is MASK: set mask_id in its ModelConfig")
    else:
        ids = [mask_id if i == tokenizer.mask_id else i for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise UserError(
            f"a prompt has ids from {min(ids)} to {max(ids)}, but the model's vocabulary is {model.config.vocab_size}"
        )
    masks = 0 if model.config.causal else ids.count(mask_id)
    if masks and options.length == lengths.DAEDAL:
        raise UserError(lengths.NO_GAPS)
    gen_length = options.gen_length
    if gen_length is None and options.length != lengths.FIXED:
        gen_length = lengths.LONGEST
    elif gen_length is None:
        gen_length = 0 if masks else DEFAULTS.gen_length
    return Prompt(np.asarray(ids, np.int32), masks, gen_length)


def make_batches(model: Transformer, prompts: Sequence[Prompt], options: Options, batch_size: int) -> Iterator[Batch]:
    """Yields all prompts in batches of similar prompt length and equal gen_length.

    If there are more than batch_size prompts, all batches have exactly batch_size rows. If the model has an EOS token,
    blocks after an end of the text are not computed, because the text is cut there.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].gen_length, len(prompts[i].ids_T)))
    several = len(prompts) > batch_size
    while order:
        gen_length = prompts[order[0]].gen_length
        rows = [i for i in order[:batch_size] if prompts[i].gen_length == gen_length]
        order = order[len(rows) :]
        length = max(len(prompts[i].ids_T) for i in rows)
        if several:
            length += -length % LENGTH_MULTIPLE
            rows += rows[-1:] * (batch_size - len(rows))
        prompt_BT = np.zeros((len(rows), length), np.int32)
        real_BT = np.zeros(prompt_BT.shape, bool)
        for row, i in enumerate(rows):
            start = length - len(prompts[i].ids_T)
            prompt_BT[row, start:], real_BT[row, start:] = prompts[i].ids_T, True
        masks = max(prompts[i].masks for i in rows)
        config = options.sampler(masks, gen_length, model.config.causal)
        yield Batch(rows, prompt_BT, real_BT, dataclasses.replace(config, stop_at_end=model.config.eos_id is not None))


def row_keys(key: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """Returns one key per prompt number, (B,), so that a completion does not depend on how prompts are batched."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.device_put(np.asarray(numbers, np.uint32)))


def finished_text(tokens_T: np.ndarray, prompt: Prompt, model: Transformer, tokenizer: Tokenizer) -> str:
    """Returns the continuation up to its end, preceded by the prompt if MASK tokens in it were filled in.

    Args:
      tokens_T: The finished canvas, without padding.
      prompt: The prompt that the canvas begins with.
      model: The model, which may name the ids that end a text.
      tokenizer: The tokenizer that decodes the text.
    """
    start = len(prompt.ids_T)
    continuation = tokens_T[start : start + text_length(tokens_T[start:], model, tokenizer)].tolist()
    if prompt.masks:
        return tokenizer.decode([*tokens_T[:start].tolist(), *continuation], skip_special=True)
    continues = start > 0 and tokens_T[start - 1] not in (tokenizer.bos_id, tokenizer.eos_id)
    return tokenizer.decode(continuation, skip_special=True, continuation=continues)


def text_length(tokens_T: np.ndarray, model: Transformer, tokenizer: Tokenizer) -> int:
    """Returns the number of tokens before the first id that the model or the tokenizer names as an end of a text."""
    ends = {i for known in (model.config, tokenizer) for i in (known.eos_id, known.eot_id, *known.end_ids)}
    return next((at for at, i in enumerate(tokens_T.tolist()) if i in ends), len(tokens_T))


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    options: Options,
    key: jax.Array,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Completes or fills in prompts given as text, in which control tokens are written as literals such as "[MASK]".

    The other arguments, the result and the errors are those of `complete_ids`.
    """
    prompts = [tokenizer.encode_text(text, special=True) for text in texts]
    return complete_ids(model, tokenizer, prompts, options, key, batch_size, report)


def complete_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: Options,
    key: jax.Array,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Completes or fills in prompts given as token ids.

    Args:
      model: The model, as returned by `llada_jax.load`.
      tokenizer: The tokenizer, as returned by `llada_jax.load`.
      prompts: The tokenizer's ids of each prompt. A prompt that contains MASK is filled in.
      options: The settings of the completion.
      key: The key of the noise. Prompt i uses fold_in(key, numbers[i]).
      batch_size: The number of prompts that are completed at once.
      report: A function that is called after each batch with the number of prompts done so far.
      numbers: One number from 0 to 2**32 - 1 for each prompt. None means the indices of the prompts. If the numbers
        are derived from the prompts themselves, a completion does not depend on which other prompts are completed.

    Returns:
      For each prompt its continuation, cut at the first id that ends a text, or the whole text if the prompt was
      filled in.

    Raises:
      UserError: If a setting is impossible or a prompt has tokens that the model does not know.
    """
    made = [make_prompt(ids, model, tokenizer, options) for ids in prompts]
    numbers = range(len(made)) if numbers is None else numbers
    done: dict[int, str] = {}
    for batch in make_batches(model, made, options, batch_size):
        keys_B = row_keys(key, [numbers[i] for i in batch.rows])
        tokens_BT = np.asarray(generate(model, batch.prompt_BT, batch.config, keys_B, batch.real_BT))
        for i, row_T, real_T in zip(batch.rows, tokens_BT, batch.real_BT, strict=True):
            done[i] = finished_text(row_T[np.sum(~real_T) :], made[i], model, tokenizer)
        report(len(done))
    return [done[i] for i in range(len(made))]
