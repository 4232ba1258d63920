"""Rows of the sampler that finds their length, in plain numpy, from the published steps; see `plain_sampler`.

The published code grows its arrays. Here a row is a list of tokens that grows, and only a forward pass fills it up.
"""

import jax
import numpy as np
import plain_sampler
import rounding

from llada_jax.config import SamplerConfig


def confidence(logits_TV: np.ndarray, eos_id: int, off: float) -> float:
    """Returns the confidence in EOS of a continuation, from the logits of its positions."""
    found = []
    for logits, others in zip(logits_TV[::-1], np.delete(logits_TV, eos_id, axis=1)[::-1], strict=True):
        if len(found) < 32 and logits[eos_id] > others.max():
            found.append(float(1 / np.exp(logits - logits[eos_id]).sum()))
        assert len(found) == 32 or abs(logits[eos_id] - others.max()) > off, "EOS is as likely as another token"
    return sum(found) / 32


def row(model, prompt_T, real_T, config: SamplerConfig, key, _=None, log: list | None = None):
    """Returns the finished canvas of one row, and the number of passes.

    Args:
      model, prompt_T, real_T, config, key: As in `plain_sampler.row`.
      log: A list to which what each pass did is appended: "longer", "ready", "fill" or "insert".
    """
    limit, mask_id, eos_id = config.gen_length, model.config.mask_id, config.eos_id
    bound = 0.9 if config.commit_bound is None else config.commit_bound
    start, log = len(prompt_T), [] if log is None else log
    text = [mask_id] * min(64, limit)

    def logits_of(cfg_scale: float):
        canvas_T = np.concatenate([prompt_T, text, [eos_id] * (limit - len(text))]).astype(np.int32)
        seen_T = np.concatenate([real_T, np.arange(limit) < len(text)])
        given_T = np.arange(start + limit) < start

        def one(ids_T, stream):
            return np.asarray(model(ids_T[None], seen_T[None]))[0].astype(np.float64)

        return plain_sampler.guided(one, model, canvas_T, given_T, cfg_scale)[start : start + len(text)]

    def apart(a: float, b: float) -> bool:
        assert abs(a - b) > 1e-5, "a probability is within rounding of its bound"
        return a < b

    passes = 0
    while True:
        passes += 1
        logits_TV = logits_of(0.0)
        off = plain_sampler.error_of_choice(model, start + limit, config) * rounding.size(logits_TV)
        if apart(confidence(logits_TV, eos_id, off), 0.5) and len(text) < limit:
            text += [mask_id] * min(8, limit - len(text))
            log.append("longer")
            continue
        text += [eos_id] * min(16, limit - len(text))
        log.append("ready")
        break

    at = 0
    while at < len(text) and not plain_sampler.stops(config, text[:at]):
        logits_TV = logits_of(config.cfg_scale)
        off = plain_sampler.error_of_choice(model, start + limit, config) * rounding.size(logits_TV)
        step_key = jax.random.fold_in(jax.random.fold_in(key, at // config.block_length), passes)
        passes += 1
        window = list(range(at, min(at + config.block_length, len(text))))
        candidates, margins = plain_sampler.predictions(model, text, window, logits_TV.copy(), step_key, config)
        sure = [c for c in candidates if not apart(-c[0], bound)] or candidates[:1]
        plain_sampler.keep(text, candidates, margins, len(sure), off, by_schedule=len(sure) == 1)
        left, log_as = candidates[len(sure) :], "fill"
        if left and apart(-left[-1][0], 0.1) and len(text) < limit:
            if apart(confidence(logits_TV, eos_id, off), 0.9):
                worst = left[-1][1]
                assert len(left) == 1 or np.log(left[-1][0] / left[-2][0]) < -2 * off, "two are as doubtful"
                text[worst : worst + 1] = [mask_id] * 8
                del text[limit:]
                log_as = "insert"
        log.append(log_as)
        while at < len(text) and mask_id not in text[at : at + config.block_length]:
            at += config.block_length
    text = [eos_id if i == mask_id else i for i in text]
    return np.concatenate([prompt_T, text, [eos_id] * (limit - len(text))]).astype(np.int32), passes
