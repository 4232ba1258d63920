"""Forward passes with kept keys and values in plain numpy: one row, all keys and values written out by position.

As in the published code of Fast-dLLM, the keys and values of a pass are written into those that are kept, wherever they
are fed again. `Passes` is what `plain_sampler.row` takes to make the passes of one row.
"""

import numpy as np
import plain_sampler

from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import split


def norm(x_TD, weight_D, eps: float):
    return x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + eps) * weight_D


def rotated(x_THK, position_T, theta: float):
    half = x_THK.shape[-1] // 2
    angle = position_T[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x_THK[..., :half], x_THK[..., half:]
    turned = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate(turned, axis=-1)


def forward(model, canvas_T, fed: list[int], seen: list[int], kept: list[tuple[np.ndarray, np.ndarray]]):
    """Returns the logits, float64 (T, V), of the positions that are fed. The others have those of the first of these.

    Args:
      model: The mask predictor.
      canvas_T: The ids of all positions.
      fed: The positions that are computed.
      seen: The positions that are attended to.
      kept: The keys and values (T, G, K) of each layer, in which those of the positions that are fed are replaced.
    """
    c, params = model.config, split(model)[1]
    params = {name: np.asarray(x, np.float64) for name, x in params.items() if name != "blocks"} | {
        "blocks": {name: np.asarray(x, np.float64) for name, x in params["blocks"].items()}
    }
    fed, x_ND = np.asarray(fed), params["embedding"][canvas_T[fed]]
    real_from = min(seen)  # positions count from the first real token
    for layer, (k_TGK, v_TGK) in enumerate(kept):
        w = {name: x[layer] for name, x in params["blocks"].items()}
        h_ND = norm(x_ND, w["attn_norm"], c.norm_eps)
        q_NHK, k_NGK, v_NGK = (np.einsum("nd,dhk->nhk", h_ND, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        q_NHK, k_TGK[fed] = (rotated(x, fed - real_from, c.rope_theta) for x in (q_NHK, k_NGK))
        v_TGK[fed] = v_NGK
        group = c.heads // c.kv_heads
        keys, values = (np.repeat(x[seen], group, axis=1) for x in (k_TGK, v_TGK))
        weight = np.exp(np.einsum("nhk,shk->hns", q_NHK, keys) / np.sqrt(c.head_width))
        weight /= weight.sum(axis=-1, keepdims=True)
        x_ND = x_ND + np.einsum("hns,shk,hkd->nd", weight, values, w["attn_out"])
        h_ND = norm(x_ND, w["ff_norm"], c.norm_eps)
        gate = h_ND @ w["ff_proj"]
        x_ND = x_ND + (gate / (1 + np.exp(-gate)) * (h_ND @ w["up_proj"])) @ w["ff_out"]
    logits_NV = norm(x_ND, params["final_norm"], c.norm_eps) @ params["head"]
    logits_TV = np.repeat(logits_NV[:1], len(canvas_T), axis=0)
    logits_TV[fed] = logits_NV
    return logits_TV


class Passes:
    """Makes the passes of one row, and remembers what they keep."""

    def __init__(self):
        self.block, self.age, self.kept, self.fed = None, 0, {}, []

    def __call__(self, model, canvas_T, real_T, given_T, config: SamplerConfig, blocks: list[list[int]], block: int):
        later = [i for following in blocks[block + 1 :] for i in following]
        far = later[config.suffix_window :] if config.suffix_window else []
        last = max(np.flatnonzero(real_T)) if config.suffix_window else None
        if config.length == "append":
            far = [i for i in later if i >= len(canvas_T) - config.gen_length]
        seen = [int(i) for i in np.flatnonzero(real_T) if i not in far or i == last]
        stale = config.cache != "none" and block == self.block
        if stale and config.cache_refresh:
            stale = self.age < config.cache_refresh
        fed = seen
        if stale:
            fed = blocks[block] if config.cache == "dual" else [i for i in seen if i >= blocks[block][0]]
        self.block, self.age = block, self.age + 1 if stale else 1
        self.fed.append(len(fed))

        def one(canvas_T, stream):
            if not stale:
                shape = (2, len(canvas_T), model.config.kv_heads, model.config.head_width)
                self.kept[stream] = [tuple(np.full(shape, np.nan)) for _ in range(model.config.layers)]
            return forward(model, canvas_T, fed, seen, self.kept[stream])

        return plain_sampler.guided(one, model, canvas_T, given_T, config.cfg_scale)
