"""The sampler in plain numpy: it works on one row and one position at a time, with logits of the whole canvas.

A choice between two tokens or two positions that is closer than the rounding of logits could go the other way on
another machine. `row` raises an AssertionError if a test depends on such a choice.
"""

import jax
import jax.numpy as jnp
import numpy as np
import rounding

from llada_jax.config import SamplerConfig


def schedule(masks: int, steps: int, block_length: int) -> list[tuple[int, int, int]]:
    """Returns (block, step within the block, tokens unmasked) for every reverse step that unmasks something."""
    sizes = [min(block_length, masks - start) for start in range(0, masks, block_length)]
    result = []
    for block, size in enumerate(sizes):
        block_steps = max(1, steps // len(sizes) + (1 if block < steps % len(sizes) else 0))
        for step in range(block_steps):
            count = size // block_steps + (1 if step < size % block_steps else 0)
            if count:
                result.append((block, step, count))
    return result


def gumbel(key, size: int) -> np.ndarray:
    uniform = (np.asarray(jax.random.bits(key, (size,), jnp.uint32)).astype(np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def logits_of(model, canvas_T, real_T, given_T, cfg_scale: float) -> np.ndarray:
    """Returns logits, float64 (T, V), guided as in Eq. 16 of arXiv 2502.09992."""

    def one(canvas_T):
        return np.asarray(model(canvas_T[None], real_T[None])[0]).astype(np.float64)

    if not cfg_scale:
        return one(canvas_T)
    without_TV = one(np.where(given_T, model.config.mask_id, canvas_T).astype(np.int32))
    return without_TV + (cfg_scale + 1) * (one(canvas_T) - without_TV)


def row(model, prompt_T, real_T, config: SamplerConfig, key) -> np.ndarray:
    """Returns the finished canvas of one row."""
    mask_id, size = model.config.mask_id, model.config.vocab_size
    ends = [i for i in (config.eos_id, config.eot_id, *(config.end_ids or ())) if i is not None]
    holes = [i for first, end in model.config.holes for i in range(first, end)]
    canvas = np.concatenate([prompt_T, np.full(config.gen_length, mask_id)]).astype(np.int32)
    real = np.concatenate([real_T, np.ones(config.gen_length, bool)])
    todo = [i for i in range(len(canvas)) if canvas[i] == mask_id and real[i]]
    given = canvas != mask_id
    blocks = [todo[i : i + config.block_length] for i in range(0, len(todo), config.block_length)]
    # A choice compares two logits. A guided logit is (w + 1) times a logit minus w times another one.
    margin = 2 * (2 * config.cfg_scale + 1) * rounding.of_logits(model.config, len(canvas))
    for block, step, count in schedule(len(todo), config.steps, config.block_length):
        before = [i for done in blocks[:block] for i in done if i >= len(prompt_T)]
        if config.stop_at_end and set(canvas[before].tolist()) & set(ends):
            canvas[[i for i in todo if canvas[i] == mask_id]] = config.eos_id
            break
        logits_TV = logits_of(model, canvas, real, given, config.cfg_scale)
        step_key, margins = jax.random.fold_in(jax.random.fold_in(key, block), step), {}
        off, candidates = margin * rounding.size(logits_TV), []
        for index, position in enumerate(blocks[block]):
            if canvas[position] != mask_id:
                continue
            draw_key, score_key = jax.random.split(jax.random.fold_in(step_key, index))
            logits = logits_TV[position]
            if config.logits_eos_inf:
                logits[[config.eos_id, *(config.end_ids or ())]] = -np.inf
            noisy = logits.copy()
            if config.temperature:
                noisy += config.temperature * gumbel(draw_key, size)
            noisy[[mask_id, *holes, *range(model.config.token_count or size, size)]] = -np.inf
            token = int(noisy.argmax())
            margins[position] = noisy[token] - np.partition(noisy, -2)[-2]
            if config.confidence_eos_eot_inf:
                logits[ends] = -np.inf
            score = np.exp(logits[token]) / np.exp(logits).sum()
            if config.remasking == "random":
                score = float(jax.random.uniform(score_key))
            if config.confidence_eos_eot_inf and token in ends:
                score = -1.0
            candidates.append((-score, position, token))
        chosen, left = sorted(candidates)[:count], sorted(candidates)[count:]
        for _, position, token in chosen:
            canvas[position] = token
            assert margins[position] > off, f"two tokens at position {position} are as likely as each other"
        if left and left[0][0] < 0:
            # The logarithm of a probability is a logit minus the logarithm of a sum, which has the same error.
            gap = np.log(chosen[-1][0] / left[0][0])
            assert gap > 2 * off, f"positions {chosen[-1][1]} and {left[0][1]} are as sure as each other"
    return canvas


def generate(model, prompts, config: SamplerConfig, key) -> np.ndarray:
    """Returns the finished canvas of all rows; row i uses the key fold_in(key, i).

    Args:
      model: The mask predictor.
      prompts: The ids (B, T), and bool (B, T), True for real tokens.
      config: The settings of the sampler.
      key: The key of all rows.
    """
    rows = enumerate(zip(*prompts, strict=True))
    return np.stack([row(model, *prompt, config, jax.random.fold_in(key, i)) for i, prompt in rows])
