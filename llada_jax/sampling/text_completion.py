"""Prompts as text in, completions as text out, in batches, on top of `sampling.generate`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from llada_jax.config import SamplerConfig, UserError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.sampler import generate
from llada_jax.text.tokenizer import Tokenizer

DEFAULTS = SamplerConfig()
LENGTH_MULTIPLE = 64  # several batches are padded to multiples of this: few lengths, few compilations


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for; what is None depends on the prompt."""

    steps: int | None = None  # None = one token per step
    gen_length: int | None = None  # None = 64, or 0 if the prompt has MASK tokens of its own
    block_length: int = DEFAULTS.block_length
    temperature: float = 0.0
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def sampler(self, masks: int, gen_length: int) -> SamplerConfig:
        """The sampler's settings for prompts with up to `masks` MASK tokens of their own."""
        # Not just as many steps as tokens: the last block may be short, and shares the steps evenly with the others.
        blocks = -(-(masks + gen_length) // max(self.block_length, 1))
        steps = max(1, blocks * self.block_length) if self.steps is None else self.steps
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(Options)}
        return SamplerConfig(**(same | {"steps": steps, "gen_length": gen_length}))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt in tokens."""

    ids_T: np.ndarray  # int32
    masks: int  # MASK tokens in it
    gen_length: int  # MASK tokens to append


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are completed together, left-padded."""

    rows: list[int]  # their places in the list of prompts; a place may be repeated to fill up the batch
    prompt_BT: np.ndarray  # int32
    real_BT: np.ndarray  # bool, False = padding
    config: SamplerConfig


def encode_prompt(text: str, model: Transformer, tokenizer: Tokenizer, options: Options) -> Prompt:
    """A prompt in tokens, "[MASK]" and other control tokens written as their literals being one each."""
    return make_prompt(tokenizer.encode(text, special=True), model, tokenizer, options)


def make_prompt(ids: Sequence[int], model: Transformer, tokenizer: Tokenizer, options: Options) -> Prompt:
    """A prompt from the tokenizer's ids. UserError if the model does not say which token is MASK."""
    mask_id = model.config.mask_id
    if mask_id is None:
        raise UserError("the model does not say which token is MASK")
    ids = [mask_id if i == tokenizer.mask_id else i for i in map(int, ids)]
    masks = ids.count(mask_id)
    gen_length = options.gen_length
    if gen_length is None:
        gen_length = 0 if masks else DEFAULTS.gen_length
    return Prompt(np.asarray(ids, np.int32), masks, gen_length)


def make_batches(model: Transformer, prompts: Sequence[Prompt], options: Options, batch_size: int) -> Iterator[Batch]:
    """All prompts in batches of like length and equal gen_length; if they take several, all of batch_size rows.

    Where the model knows an EOS, blocks after it are not computed: the text is cut there.
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
        config = options.sampler(masks, gen_length)
        yield Batch(rows, prompt_BT, real_BT, dataclasses.replace(config, stop_at_end=model.config.eos_id is not None))


def row_keys(key: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """The keys (B,) of prompts with these numbers: a completion does not depend on how prompts are batched."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.device_put(np.asarray(numbers, np.uint32)))


def finished_text(tokens_T: np.ndarray, prompt: Prompt, model: Transformer, tokenizer: Tokenizer) -> str:
    """The continuation up to EOS or end of turn; with the prompt in front if that was filled in.

    Args:
      tokens_T: the canvas, without the padding.
    """
    start = len(prompt.ids_T)
    continuation = tokens_T[start : start + text_length(tokens_T[start:], model, tokenizer)].tolist()
    if prompt.masks:
        return tokenizer.decode([*tokens_T[:start].tolist(), *continuation], skip_special=True)
    return tokenizer.decode(continuation, skip_special=True, continuation=start > 0)


def text_length(tokens_T: np.ndarray, model: Transformer, tokenizer: Tokenizer) -> int:
    """The number of tokens before the first EOS or end of turn, by the model's ids or the tokenizer's own."""
    ends = {model.config.eos_id, model.config.eot_id, tokenizer.eos_id, tokenizer.eot_id}
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
    """Completes or fills in prompts, in which "[MASK]" and other control tokens may be written as their literals.

    Arguments, result and errors are those of `complete_ids`.
    """
    prompts = [tokenizer.encode(text, special=True) for text in texts]
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
    """Completes or fills in prompts given in tokens.

    Args:
      model, tokenizer: from `llada_jax.load`.
      prompts: the tokenizer's ids; a prompt with MASK in it is filled in.
      options: how.
      key: of the noise; prompt i uses fold_in(key, numbers[i]).
      batch_size: prompts at once.
      report: told after each batch how many prompts are done.
      numbers: one for each prompt, from 0 to 2**32 - 1; None = their places. Numbers that come from the
        prompts themselves make a completion independent of what else is completed.

    Returns:
      For each prompt its continuation, cut at EOS, or the whole text if it was filled in.

    Raises:
      UserError: impossible settings, a prompt with tokens that the model does not know.
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
