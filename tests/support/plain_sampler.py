"""The sampler in plain numpy: it works on one row and one position at a time, with logits of the whole canvas.

A choice between two tokens or two positions that is closer than the rounding of logits could go the other way on
another machine. `row` raises an AssertionError if a test depends on such a choice.
"""

import functools

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


SLOTS = 32  # no block of a test has more


@functools.partial(jax.jit, static_argnames="size")
def random_numbers(step_key, size: int):
    """Returns random bits (SLOTS, size) and uniform numbers (SLOTS,): what each slot of a block draws with its keys."""

    def of_slot(index):
        draw_key, score_key = jax.random.split(jax.random.fold_in(step_key, index))
        return jax.random.bits(draw_key, (size,), jnp.uint32), jax.random.uniform(score_key)

    return jax.vmap(of_slot)(jnp.arange(SLOTS))


def gumbel(bits: np.ndarray) -> np.ndarray:
    uniform = (bits.astype(np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def guided(one, model, canvas_T, given_T, cfg_scale: float) -> np.ndarray:
    """Returns logits, float64 (T, V), guided as in Eq. 16 of arXiv 2502.09992.

    one(canvas_T, stream) returns the logits of one canvas: that with the prompt (stream 0), or that without (1).
    """
    if not cfg_scale:
        return one(canvas_T, 0)
    without_TV = one(np.where(given_T, model.config.mask_id, canvas_T).astype(np.int32), 1)
    return without_TV + (cfg_scale + 1) * (one(canvas_T, 0) - without_TV)


def logits_of(model, canvas_T, real_T, given_T, config: SamplerConfig, blocks: list[list[int]], block: int):
    """Returns the guided logits of a pass over all tokens, float64 (T, V)."""

    def one(canvas_T, stream):
        return np.asarray(model(canvas_T[None], real_T[None]))[0].astype(np.float64)

    return guided(one, model, canvas_T, given_T, config.cfg_scale)


def steps_by_rule(canvas, blocks: list[list[int]], mask_id: int):
    """Yields (block, tokens of the block that are filled, None) as long as a token is masked."""
    for index, block in enumerate(blocks):
        while left := sum(int(canvas[i] == mask_id) for i in block):
            yield index, len(block) - left, None


def kept_by_rule(config: SamplerConfig, candidates: list[tuple]) -> int | list[bool]:
    """Returns which of the candidates (-score, position, token, entropy), the best first, the rule of commit keeps."""
    default = {"threshold": 0.9, "factor": 1.0, "frechet": 0.25, "entropy": 0.01, "local": 0.9}[config.commit]
    bound = default if config.commit_bound is None else config.commit_bound
    scores, entropies = [-c[0] for c in candidates], [c[3] for c in candidates]
    near = [any(abs(c[1] - d[1]) <= 4 and -d[0] >= bound for d in candidates) for c in candidates]
    kept = []
    for n in range(1, len(candidates) + 1):
        score, first = scores[n - 1], entropies[:n]
        value = {
            "threshold": score - bound,
            "factor": bound - (n + 1) * (1 - score),
            "frechet": sum(scores[:n]) - (n - 1) - (1 - score) - bound,
            "entropy": bound - (sum(first) - max(first)),
            "local": score - (min(bound, 0.75) if near[n - 1] else bound),
        }[config.commit]
        # Entropies and sums of a few doubts have errors of some 1e-6 in fp32.
        assert n == 1 or abs(value) > 1e-5, f"the rule is within rounding of its bound at position {candidates[n - 1]}"
        kept.append(n == 1 or value > 0)
    return kept


def predictions(model, canvas, block: list[int], logits_TV, step_key, config: SamplerConfig):
    """Returns what a step predicts for the masked positions of a block.

    Returns:
      The candidates (-score, position, token, entropy), the best first; and by position, how much more likely the token
      is than any other, as a difference of logits with their noise.
    """
    mask_id, size = model.config.mask_id, model.config.vocab_size
    ends = ids_of_ends(config)
    holes = [i for first, end in model.config.holes for i in range(first, end)]
    candidates, margins = [], {}
    if config.temperature or config.remasking == "random":  # all at once, because keys take longer than all the rest
        bits_KV, uniform_K = map(np.asarray, random_numbers(step_key, size))
    for index, position in enumerate(block):
        if canvas[position] != mask_id:
            continue
        logits = logits_TV[position]
        if config.logits_eos_inf:
            logits[[config.eos_id, *(config.end_ids or ())]] = -np.inf
        noisy = logits.copy()
        if config.temperature:
            noisy += config.temperature * gumbel(bits_KV[index])
        noisy[[mask_id, *holes, *range(model.config.token_count or size, size)]] = -np.inf
        token = int(noisy.argmax())
        margins[position] = noisy[token] - np.partition(noisy, -2)[-2]
        if config.confidence_eos_eot_inf:
            logits[ends] = -np.inf
        probability = np.exp(logits) / np.exp(logits).sum()
        possible = probability[probability > 0]
        entropy = -float(np.sum(possible * np.log(possible)))
        score = probability[token]
        if config.remasking == "random":
            score = float(uniform_K[index])
        if config.remasking == "margin":
            may = np.delete(probability, [mask_id, *holes, *range(model.config.token_count or size, size)])
            score = np.sort(may)[-1] - np.sort(may)[-2]
        if config.remasking == "entropy":
            score = -entropy
        if config.confidence_eos_eot_inf and token in ends:
            score = -1e9
        candidates.append((-score, position, token, entropy))
    return sorted(candidates), margins


def stops(config: SamplerConfig, tokens) -> bool:
    """Returns whether these tokens, all of finished blocks, end a row."""
    return (config.stop_at_end or config.length == "append") and bool({*map(int, tokens)} & {*ids_of_ends(config)})


def ids_of_ends(config: SamplerConfig) -> list[int]:
    return [i for i in (config.eos_id, config.eot_id, *(config.end_ids or ())) if i is not None]


def error_of_choice(model, length: int, config: SamplerConfig) -> float:
    """Returns the rounding error, relative to the size of logits, of a difference of two logits."""
    # A guided logit is (w + 1) times a logit minus w times another one.
    return 2 * (2 * config.cfg_scale + 1) * rounding.of_logits(model.config, length)


def keep(canvas, candidates, margins, count: int, off: float, by_schedule: bool) -> None:
    """Writes the first of the candidates into the canvas."""
    chosen, left = candidates[:count], candidates[count:]
    for _, position, token, _ in chosen:
        canvas[position] = token
        assert margins[position] > off, f"two tokens at position {position} are as likely as each other"
    if chosen and left and left[0][0] < 0 and by_schedule:
        # The logarithm of a probability is a logit minus the logarithm of a sum, which has the same error.
        gap = np.log(chosen[-1][0] / left[0][0])
        assert gap > 2 * off, f"positions {chosen[-1][1]} and {left[0][1]} are as sure as each other"


def row(model, prompt_T, real_T, config: SamplerConfig, key, logits_of=logits_of) -> tuple[np.ndarray, int]:
    """Returns the finished canvas of one row, and the number of reverse steps.

    Args:
      model: The mask predictor.
      prompt_T: The ids of the prompt.
      real_T: bool, True for real tokens.
      config: The settings of the sampler.
      key: The key of the row.
      logits_of: The function that makes a forward pass.
    """
    canvas, real, todo, blocks = layout(model, prompt_T, real_T, config)
    given, mask_id, taken = canvas != model.config.mask_id, model.config.mask_id, 0
    for block, step, count in (
        schedule(len(todo), config.steps, config.block_length)
        if config.commit == "schedule"
        else steps_by_rule(canvas, blocks, mask_id)
    ):
        before = [i for done in blocks[:block] for i in done if i >= len(prompt_T)]
        if stops(config, canvas[before]):
            canvas[[i for i in todo if canvas[i] == mask_id]] = config.eos_id
            break
        taken += 1
        logits_TV = logits_of(model, canvas, real, given, config, blocks, block)
        step_key = jax.random.fold_in(jax.random.fold_in(key, block), step)
        off = error_of_choice(model, len(canvas), config) * rounding.size(logits_TV)
        candidates, margins = predictions(model, canvas, blocks[block], logits_TV, step_key, config)
        if count is None:
            kept = kept_by_rule(config, candidates)
            count = sum(kept)
            candidates = [c for c, k in zip(candidates, kept, strict=True) if k] + [
                c for c, k in zip(candidates, kept, strict=True) if not k
            ]
        keep(canvas, candidates, margins, count, off, config.commit == "schedule")
    return canvas, taken


def layout(model, prompt_T, real_T, config: SamplerConfig):
    """Returns the canvas, which of its tokens are real, the positions to fill, and the same cut into blocks."""
    canvas = np.concatenate([prompt_T, np.full(config.gen_length, model.config.mask_id)]).astype(np.int32)
    real = np.concatenate([real_T, np.ones(config.gen_length, bool)])
    todo = [i for i in range(len(canvas)) if canvas[i] == model.config.mask_id and real[i]]
    return canvas, real, todo, [todo[i : i + config.block_length] for i in range(0, len(todo), config.block_length)]


def generate(model, prompts, config: SamplerConfig, key, return_steps: bool = False, passes=lambda: logits_of, row=row):
    """Returns the finished canvas of all rows; row i uses the key fold_in(key, i).

    Args:
      model: The mask predictor.
      prompts: The ids (B, T), and bool (B, T), True for real tokens.
      config: The settings of the sampler.
      key: The key of all rows.
      return_steps: Whether to return the number of reverse steps of each row as well.
      passes: A function that returns what makes the forward passes of one row.
      row: The function that denoises one row.
    """
    rows = enumerate(zip(*prompts, strict=True))
    done = [row(model, *prompt, config, jax.random.fold_in(key, i), passes()) for i, prompt in rows]
    out_BT = np.stack([canvas for canvas, _ in done])
    return (out_BT, [steps for _, steps in done]) if return_steps else out_BT
