"""Samples from fixed prompts that a run writes on the way, and the file that keeps them."""

import re
from pathlib import Path

import jax
from flax import nnx

from llada_jax.config import Config, SamplingConfig, UserError
from llada_jax.model.transformer import merge
from llada_jax.sampling.text_completion import Options, complete_ids
from llada_jax.text.tokenizer import MASK_LITERAL, Tokenizer
from llada_jax.training.summary import cut


def sample_texts(
    graphdef: nnx.GraphDef, params: dict, tokenizer: Tokenizer, config: SamplingConfig, seed: int, chat: bool = False
) -> list[tuple[str, str]]:
    """Generates a sample for each of config.prompts. A prompt that contains [MASK] is filled in, not continued.

    Args:
      graphdef: The static part of the model.
      params: Its parameters.
      tokenizer: Encodes the prompts and decodes the samples.
      config: The prompts and the settings of the sampler.
      seed: The seed of the noise.
      chat: Whether the prompts are messages of a user, which the model answers.

    Returns:
      A pair for each prompt: the prompt and the whole text, or, if `chat`, the message and the answer.
    """
    texts = []
    for prompt in config.prompts:
        fills = MASK_LITERAL in prompt and not chat
        causal = merge(graphdef, params).config.causal
        options = Options(
            steps=None if causal else config.steps,
            block_length=config.block_length,
            temperature=config.temperature,
            gen_length=0 if fills else config.gen_length,
        )
        ids = _encoded(prompt, tokenizer, chat)
        (text,) = complete_ids(merge(graphdef, params), tokenizer, [ids], options, jax.random.key(seed))
        texts.append((prompt, text if fills or chat else prompt + text))
    return texts


def check_prompts(tokenizer: Tokenizer, config: Config, chat: bool = False) -> None:
    """Raises UserError if the first sample, hours after the start of the run, would fail.

    Args:
      tokenizer: Encodes the prompts.
      config: The configuration of the run, with the vocabulary of the model filled in.
      chat: Whether the prompts are messages of a user.
    """
    for prompt in config.sampling.prompts:
        named = f"config.sampling.prompts: {cut(prompt, 40)!r}"
        try:
            ids = _encoded(prompt, tokenizer, chat)
        except (UserError, ValueError, TypeError) as error:  # the last two: half of a surrogate pair
            raise UserError(f"{named} cannot be encoded: {error}") from None
        if max(ids, default=0) >= config.model.vocab_size:
            raise UserError(
                f"{named} has the token {max(ids)}, but config.model.vocab_size is {config.model.vocab_size}"
            )


def _encoded(prompt: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt, special=True)


def show_samples(samples: list[tuple[str, str]], chat: bool = False) -> str:
    """Returns the samples of `sample_texts` as lines for the console, each sample under its prompt."""
    blocks = []
    for prompt, text in samples:
        kind = "answer" if chat else "infilling" if MASK_LITERAL in prompt else "completion"
        shown = prompt.replace(MASK_LITERAL, "_")
        body = "\n".join("  | " + line for line in text.split("\n"))
        blocks.append(f"{kind} {'to' if chat else 'of'} {cut(shown, 120)!r}:\n{body}")
    return "\n".join(blocks)


def append_samples(path: Path, step: int, text: str) -> None:
    """Appends the samples of a step, as `show_samples` returns them, to a samples.txt."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{text}\n")


def drop_samples(path: Path, step: int) -> None:
    """Removes the samples of all steps beyond `step` from a samples.txt, because the run is resumed at that step."""
    if not path.exists():
        return
    blocks = re.split(r"^(?=--- step \d+$)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = [block for block in blocks if (found := re.match(r"--- step (\d+)\n", block)) and int(found[1]) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
