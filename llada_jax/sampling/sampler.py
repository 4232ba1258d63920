"""The reverse process (Section 2.4 and Appendix B.4 of arXiv 2502.09992), which turns MASK tokens into text.

One compiled program, a `lax.while_loop` over reverse steps, denoises a canvas [prompt | MASK ... MASK]. Every step
predicts the masked tokens of the active block and keeps some of the predictions; the other tokens stay masked. The MASK
positions of a row (first those in the prompt, then the appended ones) are cut in order into blocks. The blocks are
finished one after another, each in its share of the steps.

Rows are independent of each other. Each row has its own blocks and steps, and its noise depends only on the key, the
row, the block, the step and the slot within the block. A row is computed from its first real token on, so left padding
changes neither its positions nor its result.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, C slots of one chunk.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, SamplerConfig
from llada_jax.devices import mesh
from llada_jax.model.compute import compute_dtype
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import watching
from llada_jax.sampling.canvas import Dials, Rows, arguments, roll, scalar, start, take
from llada_jax.sampling.commit import RULES, SCHEDULE, Ranked, progress
from llada_jax.sampling.guidance import guided_trunk
from llada_jax.sampling.remasking import LAST, REMASKING, Predictions, allowed, choose, entropies, gumbel, schedule
from llada_jax.sampling.settings import TO_THE_END, resolve
from llada_jax.sampling.truncation import truncate

# Number of positions per row that go through the head at once, so that memory holds logits of (B, HEAD_CHUNK, V) only.
HEAD_CHUNK = 64


def _is_end(ids: jax.Array, config: SamplerConfig) -> jax.Array:
    """Returns bool of the shape of ids, True for every id that ends a text: EOS, end of turn, and end_ids."""
    return _is_any(ids, _ends(config))


def _is_any(ids: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, (ids == one for one in wanted))


def _ends(config: SamplerConfig) -> tuple[int, ...]:
    return tuple(i for i in (config.eos_id, config.eot_id, *config.end_ids) if i is not None)


def _predict(
    model: Transformer,
    h_BTD: jax.Array,
    position_BC: jax.Array,
    key_BC: jax.Array,
    dials: Dials,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts the tokens at some positions of the canvas.

    Returns:
      The tokens, int32 (B, C); their scores, fp32 (B, C), NaN where the logits are not finite; and the entropies of the
      distributions, fp32 (B, C), which are zero if the settings do not need them.
    """
    h_BCD = take(h_BTD, position_BC[:, :, None])
    logits_BCV = model.logits(h_BCD)
    vocabulary = jnp.arange(model.config.vocab_size)
    allowed_V = allowed(model.config, config.mask_id)
    absent_V = _is_any(vocabulary, (config.eos_id, *config.end_ids)) if config.logits_eos_inf else None
    unsure_V = _is_end(vocabulary, config) if config.confidence_eos_eot_inf else None
    key_BC2 = jax.vmap(jax.vmap(jax.random.split))(key_BC)
    noise_BCV, drawn_V = None, allowed_V
    if config.temperature:
        noise_BCV = dials.temperature * gumbel(key_BC2[:, :, 0], model.config.vocab_size)
        if config.top_k or config.top_p < 1:
            may_V = allowed_V if absent_V is None else allowed_V & ~absent_V
            kept_BCV = truncate(
                jnp.where(may_V, logits_BCV, -jnp.inf) / dials.temperature,
                dials.top_k if config.top_k else None,
                dials.top_p if config.top_p < 1 else None,
            )
            drawn_V = kept_BCV > -jnp.inf
    token_BC, probability_BC = choose(logits_BCV, noise_BCV, drawn_V, unsure_V, absent_V)
    uncounted_V = functools.reduce(jnp.logical_or, (x_V for x_V in (absent_V, unsure_V) if x_V is not None), False)
    counted_BCV = jnp.where(uncounted_V, -jnp.inf, logits_BCV)
    score_BC = REMASKING[config.remasking](Predictions(probability_BC, counted_BCV, allowed_V, key_BC2[:, :, 1]))
    if config.confidence_eos_eot_inf:
        score_BC = jnp.where(_is_end(token_BC, config), LAST, score_BC)
    entropy_BC = entropies(counted_BCV) if config.commit == "entropy" else jnp.zeros_like(probability_BC)
    return token_BC, jnp.where(jnp.isnan(probability_BC), jnp.nan, score_BC), entropy_BC


def _plan(
    rows: Rows, tokens_BT: jax.Array, step: jax.Array, steps: jax.Array, config: SamplerConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns `schedule` or `progress`, changed so that a row that needs no further block takes no further step."""
    slot_T, in_order_BT = jnp.arange(tokens_BT.shape[1]), None
    if config.commit != SCHEDULE or config.stop_at_end:
        in_order_BT = take(tokens_BT, rows.order_BT)
    if config.commit == SCHEDULE:
        block_B, inner_B, count_B, total_B = schedule(rows.masks_B, steps, config.block_length, step)
    else:
        masked_BT = (in_order_BT == config.mask_id) & (slot_T < rows.masks_B[:, None])
        block_B, inner_B, count_B, left_B = progress(masked_BT, rows.masks_B, config.block_length)
        total_B = jnp.where(left_B > 0, step + left_B, 0)
    if not config.stop_at_end:
        return block_B, inner_B, count_B, total_B
    # Look for an end only among the appended tokens of finished blocks. The MASK tokens of the prompt come first.
    look_BT = (slot_T >= rows.own_B[:, None]) & (slot_T < (block_B * config.block_length)[:, None])
    ended_B = jnp.any(_is_end(in_order_BT, config) & look_BT, axis=1)
    return block_B, inner_B, jnp.where(ended_B, 0, count_B), jnp.where(ended_B, 0, total_B)


def _reverse_step(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    step: jax.Array,
    dials: Dials,
    config: SamplerConfig,
    alternatives: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, watching.Seen | None]:
    """Takes one more reverse step in every row that is not finished.

    Returns:
      The canvas; bool (B,), True for a row that took the step; bool (), whether all predictions were finite; and the
      predictions with this number of alternatives, or None if `alternatives` is None.
    """
    block_B, inner_B, count_B, _ = _plan(rows, tokens_BT, step, dials.steps, config)
    batch, length = tokens_BT.shape
    # At least 2, because JAX cannot tell how a slice of shape (1, 1) is split. Slots beyond the block are not masked.
    width = max(2, min(config.block_length, length))
    chunk = min(width, HEAD_CHUNK)
    width += -width % chunk

    index_BK = jnp.zeros_like(block_B)[:, None] + jnp.arange(width, dtype=jnp.int32)
    slot_BK = block_B[:, None] * config.block_length + index_BK
    position_BK = take(rows.order_BT, jnp.minimum(slot_BK, length - 1))
    masked_BK = take(tokens_BT, position_BK) == config.mask_id
    masked_BK &= (slot_BK < rows.masks_B[:, None]) & (index_BK < config.block_length)
    # Put the slots that are still masked first, in order, so that chunks without masked slots need not be computed.
    first_BK = jnp.argsort(~masked_BK, axis=1, stable=True)
    index_BK, position_BK, masked_BK = (take(x, first_BK) for x in (index_BK, position_BK, masked_BK))

    if rows.given_BT is None:
        h_BTD = model.trunk(tokens_BT, rows.real_BT)
    else:
        h_BTD = guided_trunk(model, tokens_BT, rows.given_BT, rows.real_BT, dials.cfg_scale, config.mask_id)
    key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(rows.key_B, block_B), inner_B)

    def predict_chunk(i, predicted):
        def part(x_BK):
            return jax.lax.dynamic_slice_in_dim(x_BK, i * chunk, chunk, axis=1)

        # Each slot of the block has its own key, so its noise does not depend on how slots are grouped into chunks.
        key_BC = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, part(index_BK))
        new = _predict(model, h_BTD, part(position_BK), key_BC, dials, config)
        if alternatives is not None:
            logits_BCV = model.logits(take(h_BTD, part(position_BK)[:, :, None]))  # the same that _predict computes
            new += watching.likeliest(logits_BCV, new[0], allowed(model.config, config.mask_id), alternatives)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old_BK, new_BC, i * chunk, axis=1)
            for old_BK, new_BC in zip(predicted, new, strict=True)
        )

    nothing_BK = jnp.full_like(position_BK, -jnp.inf, dtype=jnp.float32)
    predicted = (jnp.zeros_like(position_BK), nothing_BK, jnp.zeros_like(nothing_BK))
    if alternatives is not None:
        predicted += watching.nothing(position_BK, alternatives)
    if width == chunk:
        token_BK, score_BK, entropy_BK, *seen = predict_chunk(0, predicted)
    else:
        chunks = -(-jnp.max(jnp.sum(masked_BK, axis=1, dtype=jnp.int32)) // chunk)
        token_BK, score_BK, entropy_BK, *seen = jax.lax.fori_loop(0, chunks, predict_chunk, predicted)
    if alternatives is not None:
        seen = watching.Seen(position_BK, masked_BK & (count_B > 0)[:, None], score_BK, *seen)

    finite = ~jnp.any(jnp.isnan(score_BK) & masked_BK)
    # The sort is stable, so among equal scores the lowest position stays. Slots that are not masked always come last.
    score_BK = jnp.where(masked_BK, score_BK, -jnp.inf)
    best_BK = jnp.argsort(-score_BK, axis=1, stable=True)
    token_BK, position_BK = (take(x, best_BK) for x in (token_BK, position_BK))
    kept_BK = jnp.arange(width) < count_B[:, None]
    if config.commit != SCHEDULE:
        score_BK, entropy_BK, masked_BK = (take(x, best_BK) for x in (score_BK, entropy_BK, masked_BK))
        passes_BK = RULES[config.commit].passes(Ranked(score_BK, entropy_BK, position_BK), dials.commit_bound)
        kept_BK |= passes_BK & masked_BK & (count_B[:, None] > 0)
    # Predictions that are not kept get the position `length`, outside the canvas: they are dropped.
    position_BK = jnp.where(kept_BK, position_BK, length)
    write = jax.vmap(lambda row_T, at_K, new_K: row_T.at[at_K].set(new_K, mode="drop"))
    write = jax.shard_map(write, in_specs=(mesh.TOKENS_BT,) * 3, out_specs=mesh.TOKENS_BT)
    return write(tokens_BT, position_BK, token_BK), count_B > 0, finite, seen or None


@functools.partial(jax.jit, static_argnames="config")
def denoise(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    step: jax.Array,
    stop: jax.Array,
    dials: Dials,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs reverse steps from `step` up to `stop` or to the end, or until the model's output is not finite.

    Returns:
      The canvas, int32 (B, T), replicated on every device; the number of steps done by now; the largest total number of
      steps, as far as it is known by now; the number of steps that each row took in this call, int32 (B,), replicated;
      and bool (), whether the output of the model was finite wherever a token was predicted from it. If not, the canvas
      means nothing.
    """
    # Cast the weights here, once. Otherwise every step would cast the fp32 master weights again.
    model = jax.tree.map(lambda p: p.astype(compute_dtype(model.compute)), model)
    tokens_BT = roll(jax.reshard(tokens_BT, mesh.TOKENS_BT), rows.shift_B)

    def steps_in_all(step, tokens_BT):
        return jnp.max(_plan(rows, tokens_BT, step, dials.steps, config)[3])

    def advance(carry):
        step, _, tokens_BT, steps_B, _ = carry
        tokens_BT, took_B, finite, _ = _reverse_step(model, rows, tokens_BT, step, dials, config)
        return step + 1, steps_in_all(step + 1, tokens_BT), tokens_BT, steps_B + took_B, finite

    step, total, tokens_BT, steps_B, finite = jax.lax.while_loop(
        lambda carry: carry[4] & (carry[0] < jnp.minimum(stop, carry[1])),
        advance,
        (step, steps_in_all(step, tokens_BT), tokens_BT, jnp.zeros_like(rows.masks_B), jnp.bool_(True)),
    )
    if config.stop_at_end:
        tokens_BT = _fill_with_end(rows, tokens_BT, step, dials, config)
    return (
        jax.reshard(roll(tokens_BT, -rows.shift_B), P(None, None)),
        step,
        total,
        jax.reshard(steps_B, P(None)),
        finite,
    )


@functools.partial(jax.jit, static_argnames=("config", "alternatives"))
def look(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    step: jax.Array,
    dials: Dials,
    config: SamplerConfig,
    alternatives: int,
) -> watching.Seen:
    """Returns what a reverse step predicts, replicated on every device, with positions that count the padding."""
    model = jax.tree.map(lambda p: p.astype(compute_dtype(model.compute)), model)
    tokens_BT = roll(jax.reshard(tokens_BT, mesh.TOKENS_BT), rows.shift_B)
    seen = _reverse_step(model, rows, tokens_BT, step, dials, config, alternatives)[3]
    seen = seen._replace(position_BK=(seen.position_BK + rows.shift_B[:, None]) % tokens_BT.shape[1])
    return jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), seen)


def _fill_with_end(rows: Rows, tokens_BT: jax.Array, step: jax.Array, dials: Dials, config: SamplerConfig) -> jax.Array:
    """Returns the canvas with EOS in place of MASK in all blocks that the rows no longer need."""
    ended_B = _plan(rows, tokens_BT, step, dials.steps, config)[3] == 0
    # Fill only the first masks_B positions of a row's order: any other MASK, such as one in the padding, is kept.
    rank_BT = jnp.argsort(rows.order_BT, axis=1)
    fill_BT = ended_B[:, None] & (rank_BT < rows.masks_B[:, None]) & (tokens_BT == config.mask_id)
    return jnp.where(fill_BT, _ends(config)[0], tokens_BT)


def generate(
    model: Transformer,
    prompt_BT: jax.typing.ArrayLike,
    config: SamplerConfig,
    key: jax.Array,
    prompt_mask_BT: jax.typing.ArrayLike | None = None,
    *,
    return_steps: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Fills in the MASK tokens of the prompts and gen_length appended ones, all rows in one compiled program.

    The program is compiled once per shape (B, T), block_length, remasking, commit, and whether there is a temperature,
    guidance, top_k and top_p. The values of steps, temperature, cfg_scale, top_k, top_p, commit_bound and key are
    traced. The caller need not set a mesh; on a mesh the rows are split over its batch axes.

    Only tokens other than MASK are chosen. The config of a model from `llada_jax.load` knows from its tokenizer which
    ids are tokens (token_count, holes). If there was no tokenizer, all ids below token_count count as tokens.

    Args:
      model: The mask predictor.
      prompt_BT: int ids, on the host or on a device. MASK tokens among them are filled in.
      config: The settings of the sampler.
      key: Either one key, so that row i uses fold_in(key, i), or keys (B,), one for each row. With a key of its own, a
        row has the same result at any place in any batch.
      prompt_mask_BT: bool, True for a real token. Padding, usually on the left, is neither attended to nor filled in.
      return_steps: Whether to return the number of reverse steps of each row as well. A step is one forward pass, or
        two with guidance.

    Returns:
      The whole canvas, int32 (B, T + gen_length), including padding. The rows keep their order. With return_steps, also
      the number of reverse steps of each row, int32 (B,).

    Raises:
      UserError: If a setting is impossible, an id is outside the vocabulary, or shapes do not match.
      NonFinite: If the output of the model is NaN or infinite where a token is predicted from it.
    """
    config = resolve(config, model)
    with mesh.mesh_of(model.embedding[...]):
        rows, tokens_BT = start(model, prompt_BT, config, key, prompt_mask_BT)
        steps_B = jax.device_put(np.zeros(len(tokens_BT), np.int32), P())
        if tokens_BT.shape[1]:
            dials, static = arguments(config)
            tokens_BT, _, _, steps_B, finite = denoise(
                model, rows, tokens_BT, scalar(0), scalar(TO_THE_END), dials, config=static
            )
            if not finite:
                raise NonFinite
        tokens_BT, steps_B = (jax.lax.slice_in_dim(x, 0, len(prompt_BT)) for x in (tokens_BT, steps_B))
        return (tokens_BT, steps_B) if return_steps else tokens_BT


def denoise_steps(
    model: Transformer,
    prompt_BT: jax.typing.ArrayLike,
    config: SamplerConfig,
    key: jax.Array,
    prompt_mask_BT: jax.typing.ArrayLike | None = None,
    *,
    alternatives: int | None = None,
) -> Iterator[watching.Step]:
    """Does the same as `generate`, with the same compiled program, but yields the canvas after every step.

    Args:
      model, prompt_BT, config, key, prompt_mask_BT: As for `generate`.
      alternatives: With a number, each step also tells the scores and probabilities of its predictions, and this number
        of most probable tokens at each position. A second program computes them, which takes as long as the step.

    Yields:
      The canvas before the first step, with nothing new and without scores, and then each step.

    Raises:
      UserError, NonFinite: As `generate`.
    """
    config = resolve(config, model)
    watching.check(alternatives, model.config.vocab_size)
    batch = len(prompt_BT)
    with mesh.mesh_of(model.embedding[...]):
        rows, tokens_BT = start(model, prompt_BT, config, key, prompt_mask_BT)
        dials, static = arguments(config)
    shown_BT = np.asarray(tokens_BT)[:batch]
    yield watching.step(shown_BT, shown_BT, config.mask_id, None)
    done, total, seen = 0, int(shown_BT.shape[1] > 0), None
    while done < total:
        # Enter the mesh for each step separately, because the consumer's own code runs between two steps.
        with mesh.mesh_of(model.embedding[...]):
            if alternatives is not None:
                seen = look(model, rows, tokens_BT, scalar(done), dials, config=static, alternatives=alternatives)
            tokens_BT, step, all_steps, _, finite = denoise(
                model, rows, tokens_BT, scalar(done), scalar(done + 1), dials, config=static
            )
        if not finite:
            raise NonFinite
        before_BT, shown_BT = shown_BT, np.asarray(tokens_BT)[:batch]
        done, total = int(step), int(all_steps)
        if done:
            yield watching.step(shown_BT, before_BT, config.mask_id, seen)
