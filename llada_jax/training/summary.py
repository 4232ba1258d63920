"""What the console shows at the beginning and at the end of a run: the first row, and the final report."""

import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.text.tokenizer import Tokenizer

PROMPT_SHOWN = 16  # number of tokens of a prompt that are shown


def first_batch(config: Config, batch: dict, tokenizer: Tokenizer, step: int, characters: int = 300) -> str:
    """Returns the first row of a batch as the train step sees it: its length, t, its text, and its masked text.

    Args:
      config: The configuration of the run.
      batch: The batch, placed on the mesh in use.
      tokenizer: Decodes the row.
      step: The step, which the noise depends on.
      characters: The largest number of characters of text that is shown.
    """
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
    first = max(0, prompt - PROMPT_SHOWN)
    clean, masked = (tokenizer.decode(x[first:length], continuation=first > 0) for x in (clean_T, noisy_T))
    given = f", {prompt} of the prompt" if prompt else ""
    if config.diffusion.objective in forward.OF_CAUSAL:
        told = f"first row of step {step}: {length} tokens{given}, {int(mask_T.sum())} are predicted"
        return f"{told}\n  text:   {cut(clean, characters)!r}"
    t = forward.t_of(p_mask, config.diffusion)
    return (
        f"first row of step {step}: {length} tokens{given}, t = {t:.3f}, {int(mask_T.sum())} masked\n"
        f"  text:   {cut(clean, characters)!r}\n"
        f"  masked: {cut(masked, characters)!r}"
    )


def cut(text: str, characters: int) -> str:
    """Returns the text, or its first characters and three dots if it is longer."""
    return text if len(text) <= characters else text[:characters] + "..."


def yardsticks(rows: HeldOut, tokenizer: Tokenizer) -> dict[str, float]:
    """Returns the bits per byte of two models without context on the held-out rows: token unigrams, and xz -9.

    Args:
      rows: Held-out rows of text, as `scoring.bound.validate` takes them.
      tokenizer: Turns the tokens back into the bytes that xz compresses.
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


def final_report(
    workdir: str, bits_per_byte: float, marks: dict[str, float], held_out_bytes: int, causal: bool = False
) -> str:
    """Returns the last lines of the quickstart: the bound beside its yardsticks, and what to do next."""
    figure = "exact likelihood" if causal else "likelihood bound (Eq. 6)"
    flags = ['--prompt="class Queue:" --block_length=8 --show', '--prompt="if not isinstance(value,[MASK]):"']
    if causal:
        flags = ['--prompt="class Queue:" --show']
    commands = "\n  ".join(f"python -m llada_jax.sample --model={workdir} {each}" for each in flags)
    return f"""
held-out text, {held_out_bytes:,} bytes, bits per byte (lower is better):
  this model, {figure:24}  {bits_per_byte:6.3f}
  its tokens' unigram entropy           {marks["unigram_bits_per_byte"]:6.3f}
  xz -9                                 {marks["xz_bits_per_byte"]:6.3f}

next:
  {commands}
  the same training command with --config.steps=N (more than before; without minutes) goes on from here
  --config.data.input=FILES (and a new --workdir) trains on your own text
  tensorboard --logdir={workdir}/tensorboard    curves; {workdir}/metrics.jsonl has the numbers
"""
