"""What a person reads of a run: the first batch decoded, samples, and the yardsticks at the end."""

import dataclasses
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config, SamplingConfig
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.model.transformer import merge
from llada_jax.sampling.text_completion import Options, complete, complete_ids
from llada_jax.text.tokenizer import MASK_LITERAL, Tokenizer

PROMPT_SHOWN = 16  # tokens of a prompt


def first_batch(config: Config, batch: dict, tokenizer: Tokenizer, step: int, characters: int = 300) -> str:
    """The first row of a placed batch as the train step sees it: length, t, text, masked text."""
    objective = forward.OBJECTIVES[config.diffusion.objective]

    @jax.jit
    def row_0(batch):
        rows = jnp.arange(config.batch_size, dtype=jnp.int32, out_sharding=mesh.ROWS_B)
        noisy = objective(
            forward.step_key(config.seed, step),
            batch,
            rows,
            config.diffusion,
            config.model.mask_id,
        )
        prompt_B = batch.get("prompt", jnp.zeros_like(batch["length"]))
        whole = (batch["tokens"], noisy.tokens_BT, noisy.mask_BT, noisy.p_mask_B, batch["length"], prompt_B)
        return [jax.reshard(x, P(*(None,) * x.ndim))[0] for x in whole]

    clean_T, noisy_T, mask_T, p_mask, length, prompt = jax.device_get(row_0(batch))
    t = (p_mask - config.diffusion.eps) / (1 - config.diffusion.eps)
    first = max(0, prompt - PROMPT_SHOWN)
    clean, masked = (tokenizer.decode(x[first:length], continuation=first > 0) for x in (clean_T, noisy_T))
    given = f", {prompt} of the prompt" if prompt else ""
    return (
        f"first row of step {step}: {length} tokens{given}, t = {t:.3f}, {int(mask_T.sum())} masked\n"
        f"  text:   {_cut(clean, characters)!r}\n"
        f"  masked: {_cut(masked, characters)!r}"
    )


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "..."


def sample_texts(
    graphdef: nnx.GraphDef, params: dict, tokenizer: Tokenizer, config: SamplingConfig, seed: int, chat: bool = False
) -> list[tuple[str, str]]:
    """(prompt, whole text) of each of config.prompts; one with [MASK] in it is filled in, not continued.

    If `chat`, they are messages of a user: (message, answer).
    """
    options = Options(steps=config.steps, block_length=config.block_length, temperature=config.temperature)
    texts = []
    for prompt in config.prompts:
        if chat:
            ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
            one = dataclasses.replace(options, gen_length=config.gen_length)
            (text,) = complete_ids(merge(graphdef, params), tokenizer, [ids], one, jax.random.key(seed))
            texts.append((prompt, text))
            continue
        fills = MASK_LITERAL in prompt
        one = dataclasses.replace(options, gen_length=0 if fills else config.gen_length)
        (text,) = complete(merge(graphdef, params), tokenizer, [prompt], one, jax.random.key(seed))
        texts.append((prompt, text if fills else prompt + text))
    return texts


def show_samples(samples: list[tuple[str, str]], chat: bool = False) -> str:
    """Samples of `sample_texts` for the console, each under its prompt."""
    blocks = []
    for prompt, text in samples:
        kind = "answer" if chat else "infilling" if MASK_LITERAL in prompt else "completion"
        shown = prompt.replace(MASK_LITERAL, "_")
        body = "\n".join("  | " + line for line in text.split("\n"))
        blocks.append(f"{kind} {'to' if chat else 'of'} {_cut(shown, 120)!r}:\n{body}")
    return "\n".join(blocks)


def yardsticks(rows: HeldOut, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of two models without context on the held-out rows: token unigrams, and xz -9.

    Args:
      rows: of text, as `likelihood.validate` takes them.
      tokenizer: turns the tokens back into the bytes that xz compresses.
    """
    tokens_NT, length_N, _, bytes_N = rows
    ids = np.concatenate([row[:n] for row, n in zip(tokens_NT, length_N, strict=True)])
    counts = np.bincount(ids)
    counts = counts[counts > 0]
    nats = -(counts * np.log(counts / counts.sum())).sum()
    text = tokenizer.decode(ids, skip_special=True).encode()
    total = max(int(bytes_N.sum()), 1)
    return {
        "unigram_bits_per_byte": float(nats) / math.log(2) / total,
        "xz_bits_per_byte": len(lzma.compress(text, preset=9)) * 8 / max(len(text), 1),
    }


def final_report(workdir: str, bits_per_byte: float, marks: dict[str, float], held_out_bytes: int) -> str:
    """The quickstart's last words: the bound beside its yardsticks, and what to do next."""
    return f"""
held-out text, {held_out_bytes:,} bytes, bits per byte (lower is better):
  this model, likelihood bound (Eq. 6)  {bits_per_byte:6.3f}
  its tokens' unigram entropy           {marks["unigram_bits_per_byte"]:6.3f}
  xz -9                                 {marks["xz_bits_per_byte"]:6.3f}

next:
  python -m llada_jax.sample --model={workdir} --prompt="class Queue:" --block_length=8 --show
  python -m llada_jax.sample --model={workdir} --prompt="if not isinstance(value,[MASK]):"
  the same training command with --config.steps=N (more than before) goes on from here
  --config.data.input=FILES (and a new --workdir) trains on your own text
  tensorboard --logdir={workdir}/tensorboard    curves; {workdir}/metrics.jsonl has the numbers
"""
