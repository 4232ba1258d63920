"""What a person reads of a run: the first batch decoded, samples, and the yardsticks at the end."""

import lzma
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax import diffusion, sampling
from llada_jax.config import Config, SamplerConfig, SamplingConfig
from llada_jax.model import Transformer, merge
from llada_jax.tokenizer import Tokenizer


def first_batch(config: Config, batch: dict, tokenizer: Tokenizer, step: int, characters: int = 300) -> str:
    """The first row of a placed batch as the train step sees it: length, t, text, masked text."""
    objective = diffusion.OBJECTIVES[config.diffusion.objective]

    @jax.jit
    def row_0(batch):
        rows = jax.numpy.arange(config.batch_size, dtype=jax.numpy.int32, out_sharding=P(("data", "fsdp")))
        noisy = objective(
            diffusion.step_key(config.seed, step),
            batch["tokens"],
            batch["length"],
            rows,
            config.diffusion,
            config.model.mask_id,
        )
        whole = (batch["tokens"], noisy.tokens_BT, noisy.mask_BT, noisy.t_B, batch["length"])
        return [jax.reshard(x, P(*(None,) * x.ndim))[0] for x in whole]

    clean_T, noisy_T, mask_T, t, length = jax.device_get(row_0(batch))
    clean, masked = (tokenizer.decode(x[:length]) for x in (clean_T, noisy_T))
    return (
        f"first row of step {step}: {length} tokens, mask ratio {t:.3f}, {int(mask_T.sum())} masked\n"
        f"  text:   {_cut(clean, characters)!r}\n"
        f"  masked: {_cut(masked, characters)!r}"
    )


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "..."


def sample_texts(
    graphdef: nnx.GraphDef, params: dict, tokenizer: Tokenizer, config: SamplingConfig, seed: int
) -> list[tuple[str, str]]:
    """(prompt, whole text) of each of config.prompts, in one batch.

    A prompt with [MASK] in it is filled in, any other continued by gen_length tokens; a text ends at EOS
    beyond its prompt. An empty prompt becomes BOS.
    """
    model: Transformer = merge(graphdef, params)
    rows = []
    for prompt in config.prompts:
        ids = tokenizer.encode(prompt, special=True) or [tokenizer.bos_id]
        appended = 0 if tokenizer.mask_id in ids else config.gen_length
        rows.append((ids, appended))
    width = max(len(ids) + appended for ids, appended in rows)
    canvas = np.full((len(rows), width), tokenizer.mask_id, np.int32)
    real = np.zeros((len(rows), width), bool)
    for i, (ids, appended) in enumerate(rows):
        start = width - len(ids) - appended  # padding on the left
        canvas[i, start : start + len(ids)] = ids
        real[i, start:] = True
    settings = SamplerConfig(
        steps=config.steps, gen_length=0, block_length=config.block_length, temperature=config.temperature
    )
    tokens = np.asarray(sampling.generate(model, canvas, settings, jax.random.key(seed), real))
    texts = []
    for i, (ids, appended) in enumerate(rows):
        row = tokens[i, real[i]].tolist()
        if appended and tokenizer.eos_id in row[len(ids) :]:
            row = row[: row.index(tokenizer.eos_id, len(ids))]
        texts.append((config.prompts[i], tokenizer.decode(row, skip_special=True)))
    return texts


def show_samples(samples: list[tuple[str, str]]) -> str:
    """Samples for the console, each under its prompt."""
    blocks = []
    for prompt, text in samples:
        kind = "infilling" if "[MASK]" in prompt else "completion"
        shown = prompt.replace("[MASK]", "_") if kind == "infilling" else prompt
        body = "\n".join("  | " + line for line in text.split("\n"))
        blocks.append(f"{kind} of {_cut(shown, 120)!r}:\n{body}")
    return "\n".join(blocks)


def yardsticks(rows: tuple[np.ndarray, np.ndarray, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of two models without context on the held-out rows: token unigrams, and xz -9.

    Args:
      rows: tokens int32 (N, T), length int32 (N,), bytes int64 (N,), as `likelihood.validate` takes them.
      tokenizer: turns the tokens back into the bytes that xz compresses.
    """
    tokens_NT, length_N, bytes_N = rows
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
  python -m llada_jax.sample --model={workdir} --prompt="def main():" --show
  python -m llada_jax.sample --model={workdir} --prompt="for i in [MASK][MASK][MASK][MASK]:" --gen_length=0
  the same training command with --config.steps=N (more than before) goes on from here
  --config.data.input=FILES (and a new --workdir) trains on your own text
  tensorboard --logdir={workdir}/tensorboard    curves; {workdir}/metrics.jsonl has the numbers
"""
