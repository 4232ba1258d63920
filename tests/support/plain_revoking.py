"""Rows of the sampler that takes tokens back, in plain numpy; see `plain_sampler`."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import plain_cache
import plain_sampler
import rounding

from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import split


def paces(masks: int, config: SamplerConfig) -> list[tuple[int, int, int, int, bool]]:
    """Returns (block, step, visible tokens before the step, after it, whether the loop is on) for every step."""
    sizes = [min(config.block_length, masks - start) for start in range(0, masks, config.block_length)]
    result = []
    for block, size in enumerate(sizes):
        steps = max(1, config.steps // len(sizes) + (1 if block < config.steps % len(sizes) else 0))
        counts = [size * i // steps for i in range(steps + 1)]
        if size >= steps:
            counts = [sum(size // steps + (i < size % steps) for i in range(done)) for done in range(steps + 1)]
        begins, ends, share = Fraction(55, 100), Fraction(5, 100), Fraction(9, 10)
        time = [1 - Fraction(i, steps) for i in range(steps + 1)]
        if config.revoke == "remdm_loop":
            counts = []
            for t in time:
                if t > begins:
                    counts.append(math.floor(size * (1 - t) * share / (1 - begins)))
                elif t > ends:
                    counts.append(math.floor(size * share))
                else:
                    counts.append(math.ceil(size * (1 - t * (1 - share) / ends)))
        for i in range(steps):
            result.append((block, i, counts[i], counts[i + 1], ends < time[i] <= begins))
    return result


def sigmas(config: SamplerConfig, committed: list[float], most: float, looping: bool) -> list[float]:
    """Returns the probability with which each visible token is taken back, from those at which they were committed."""
    bound = {"remdm_cap": 0.008, "remdm_rescale": 0.015, "remdm_conf": 1.0, "remdm_loop": 0.02}[config.revoke]
    bound = bound if config.revoke_bound is None else config.revoke_bound
    if config.revoke == "remdm_conf":
        weights = np.exp(-np.array(committed))
        return (bound * most * weights / weights.sum()).tolist()
    one = {"remdm_cap": min(bound, most), "remdm_rescale": bound * most, "remdm_loop": bound if looping else 0.0}
    return [one[config.revoke]] * len(committed)


@jax.jit
def random_numbers(step_key):
    """Returns the uniform numbers (SLOTS,) that decide which slots of a block are taken back."""

    def of_slot(index):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(step_key, index), 2))

    return jax.vmap(of_slot)(jnp.arange(plain_sampler.SLOTS))


def remdm(model, prompt_T, real_T, config: SamplerConfig, key, logits_of=plain_sampler.logits_of):
    """Returns the finished canvas of one row, and the number of reverse steps."""
    canvas, real, todo, blocks = plain_sampler.layout(model, prompt_T, real_T, config)
    mask_id, given, committed = model.config.mask_id, canvas != model.config.mask_id, {}
    taken = 0
    for block, step, before, after, looping in paces(len(todo), config):
        earlier = [i for done in blocks[:block] for i in done if i >= len(prompt_T)]
        if plain_sampler.stops(config, canvas[earlier]):
            canvas[[i for i in todo if canvas[i] == mask_id]] = config.eos_id
            break
        taken += 1
        visible = [i for i in blocks[block] if canvas[i] != mask_id]
        assert len(visible) == before
        most = min(1.0, (len(blocks[block]) - after) / max(before, 1))
        sigma = sigmas(config, [committed[i] for i in visible], most, looping)
        step_key, drawn = jax.random.fold_in(jax.random.fold_in(key, block), step), []
        uniform_K = np.asarray(random_numbers(step_key))
        for i, one in zip(visible, sigma, strict=True):
            drawn.append((float(uniform_K[blocks[block].index(i)]) - one, i))
        back = [i for below, i in sorted(drawn) if below < 0][: len(blocks[block]) - after]
        logits_TV = logits_of(model, canvas, real, given, config, blocks, block)
        off = plain_sampler.error_of_choice(model, len(canvas), config) * rounding.size(logits_TV)
        candidates, margins = plain_sampler.predictions(model, canvas, blocks[block], logits_TV, step_key, config)
        count = after - before + len(back)
        plain_sampler.keep(canvas, candidates, margins, count, off, by_schedule=True)
        committed |= {position: -score for score, position, *_ in candidates[:count]}
        canvas[back] = mask_id
    return canvas, taken


def with_shadows(model, canvas_T, real_T, block: list[int]):
    """Returns the logits of all positions, float64 (T, V), and of the shadows of a block, (J, V)."""
    c, params = model.config, split(model)[1]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, count = len(canvas_T), len(block)
    ids = np.concatenate([canvas_T, np.full(count, c.mask_id)])
    position = np.concatenate([np.arange(length), block]) - np.flatnonzero(real_T)[0]
    sees = np.zeros((length + count, length + count), bool)
    sees[:, :length] = real_T
    sees[length:, length:] = True
    for j, own in enumerate(block):
        sees[length + j, own] = False
    x_ND = params["embedding"][ids]
    for layer in range(c.layers):
        w = {name: x[layer] for name, x in params["blocks"].items()}
        h_ND = plain_cache.norm(x_ND, w["attn_norm"], c.norm_eps)
        q, k, v = (np.einsum("nd,dhk->nhk", h_ND, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = (plain_cache.rotated(x, position, c.rope_theta) for x in (q, k))
        k, v = (np.repeat(x, c.heads // c.kv_heads, axis=1) for x in (k, v))
        scores = np.where(sees, np.einsum("nhk,shk->hns", q, k) / np.sqrt(c.head_width), -np.inf)
        weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        x_ND = x_ND + np.einsum("hns,shk,hkd->nd", weight, v, w["attn_out"])
        h_ND = plain_cache.norm(x_ND, w["ff_norm"], c.norm_eps)
        gate = h_ND @ w["ff_proj"]
        x_ND = x_ND + (gate / (1 + np.exp(-gate)) * (h_ND @ w["up_proj"])) @ w["ff_out"]
    logits_NV = plain_cache.norm(x_ND, params["final_norm"], c.norm_eps) @ params["head"]
    return logits_NV[:length], logits_NV[length:]


def wino(model, prompt_T, real_T, config: SamplerConfig, key, logits_of=None):
    """Returns the finished canvas of one row, and the number of reverse steps."""
    canvas, real, todo, blocks = plain_sampler.layout(model, prompt_T, real_T, config)
    mask_id, given, taken = model.config.mask_id, canvas != model.config.mask_id, 0
    bound = 0.9 if config.revoke_bound is None else config.revoke_bound
    for block, slots in enumerate(blocks):
        earlier = [i for done in blocks[:block] for i in done if i >= len(prompt_T)]
        if config.stop_at_end and set(canvas[earlier].tolist()) & set(plain_sampler.ids_of_ends(config)):
            canvas[[i for i in todo if canvas[i] == mask_id]] = config.eos_id
            break
        accepted_before = 30
        while masked := [i for i in slots if canvas[i] == mask_id]:
            shadow = {}

            def one(ids_T, stream, slots=slots, shadow=shadow):
                logits_TV, shadow[stream] = with_shadows(model, ids_T, real, slots)
                return logits_TV

            logits_TV = plain_sampler.guided(one, model, canvas, given, config.cfg_scale)
            w = config.cfg_scale
            shadow_JV = (w + 1) * shadow[0] - w * shadow[1] if w else shadow[0]
            step_key = jax.random.fold_in(jax.random.fold_in(key, block), taken)
            taken += 1
            off = plain_sampler.error_of_choice(model, len(canvas), config) * rounding.size(logits_TV)
            candidates, margins = plain_sampler.predictions(model, canvas, slots, logits_TV, step_key, config)
            kept = plain_sampler.kept_by_rule(config, candidates)
            accepted = [c for c, k in zip(candidates, kept, strict=True) if k]
            most = min(max(7 * len(masked) // 10, 5), 20)
            if len(accepted) > most:  # then the rule is a prefix of the order, or else these are the best
                accepted = accepted[:most]
            visible, back = [i for i in slots if i not in masked], []
            plain_sampler.keep(canvas, accepted, margins, len(accepted), off, by_schedule=False)
            if len(accepted) > 1:
                doubts = []
                for i in visible:
                    logits = shadow_JV[slots.index(i)].copy()
                    if config.logits_eos_inf:
                        logits[[config.eos_id, *(config.end_ids or ())]] = -np.inf
                    probability = np.exp(logits[canvas[i]]) / np.exp(logits).sum()
                    assert abs(probability - bound) > 1e-5, "a doubt is within rounding of the bound"
                    doubts.append((probability, i))
                doubtful = sorted(d for d in doubts if d[0] < bound)
                back = [i for _, i in doubtful[: accepted_before - 1]]
            canvas[back] = mask_id
            accepted_before = len(accepted)
    return canvas, taken
