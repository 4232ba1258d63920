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

import dataclasses
import functools
from collections.abc import Hashable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, SamplerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.compute import compute_dtype
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.guidance import guided_trunk
from llada_jax.sampling.remasking import REMASKING, allowed, choose, gumbel, schedule
from llada_jax.sampling.settings import TO_THE_END, check_prompt, resolve

# Number of positions per row that go through the head at once, so that memory holds logits of (B, HEAD_CHUNK, V) only.
HEAD_CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """The data that stays the same while rows are denoised. Positions count from a row's first real token."""

    order_BT: jax.Array  # int32: positions of the MASK tokens to fill, ascending, then all other positions
    masks_B: jax.Array  # int32: number of MASK tokens to fill
    own_B: jax.Array  # int32: number of these that stand in the prompt itself
    shift_B: jax.Array  # int32: number of padding tokens in front
    real_BT: jax.Array | None  # bool: True for a real token; None if all tokens are real
    given_BT: jax.Array | None  # bool: True for the prompt's tokens, which guidance hides; None without guidance
    key_B: jax.Array  # PRNG keys: the source of each row's noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dials:
    """The settings that are traced, so that other values do not compile the program again."""

    steps: jax.Array  # int32
    temperature: jax.Array  # fp32
    cfg_scale: jax.Array  # fp32


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns jnp.take_along_axis(x, index, axis=1), computed on the devices that hold the rows."""
    # Without shard_map, JAX cannot tell which sharding an index of shape (1, 1) follows.
    split = mesh.TOKENS_BT if x.ndim == 2 else mesh.HIDDEN_BTD
    take = functools.partial(jnp.take_along_axis, axis=1)
    return jax.shard_map(take, in_specs=(split, split), out_specs=split)(x, index)


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
    temperature: jax.Array,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns the predicted tokens, int32 (B, C), and their scores, fp32 (B, C), at some positions of the canvas.

    A score is NaN if the logits at its position are not finite.
    """
    h_BCD = _take(h_BTD, position_BC[:, :, None])
    logits_BCV = model.logits(h_BCD)
    vocabulary = jnp.arange(model.config.vocab_size)
    allowed_V = allowed(model.config, config.mask_id)
    absent_V = _is_any(vocabulary, (config.eos_id, *config.end_ids)) if config.logits_eos_inf else None
    unsure_V = _is_end(vocabulary, config) if config.confidence_eos_eot_inf else None
    key_BC2 = jax.vmap(jax.vmap(jax.random.split))(key_BC)
    noise_BCV = None
    if config.temperature:
        noise_BCV = temperature * gumbel(key_BC2[:, :, 0], model.config.vocab_size)
    token_BC, probability_BC = choose(logits_BCV, noise_BCV, allowed_V, unsure_V, absent_V)
    score_BC = REMASKING[config.remasking](probability_BC, key_BC2[:, :, 1])
    if config.confidence_eos_eot_inf:  # below every score of any strategy
        score_BC = jnp.where(_is_end(token_BC, config), -1.0, score_BC)
    return token_BC, jnp.where(jnp.isnan(probability_BC), jnp.nan, score_BC)


def _plan(
    rows: Rows, tokens_BT: jax.Array, step: jax.Array, steps: jax.Array, config: SamplerConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns `schedule`, changed so that a row that needs no further block takes no further step."""
    block_B, inner_B, count_B, total_B = schedule(rows.masks_B, steps, config.block_length, step)
    if not config.stop_at_end:
        return block_B, inner_B, count_B, total_B
    slot_T = jnp.arange(tokens_BT.shape[1])
    # Look for an end only among the appended tokens of finished blocks. The MASK tokens of the prompt come first.
    look_BT = (slot_T >= rows.own_B[:, None]) & (slot_T < (block_B * config.block_length)[:, None])
    in_order_BT = _take(tokens_BT, rows.order_BT)
    ended_B = jnp.any(_is_end(in_order_BT, config) & look_BT, axis=1)
    return block_B, inner_B, jnp.where(ended_B, 0, count_B), jnp.where(ended_B, 0, total_B)


def _reverse_step(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    step: jax.Array,
    dials: Dials,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns the canvas after one more reverse step of every row, and bool (), whether all predictions were finite."""
    block_B, inner_B, count_B, _ = _plan(rows, tokens_BT, step, dials.steps, config)
    batch, length = tokens_BT.shape
    # At least 2, because JAX cannot tell how a slice of shape (1, 1) is split. Slots beyond the block are not masked.
    width = max(2, min(config.block_length, length))
    chunk = min(width, HEAD_CHUNK)
    width += -width % chunk

    index_BK = jnp.zeros_like(block_B)[:, None] + jnp.arange(width, dtype=jnp.int32)
    slot_BK = block_B[:, None] * config.block_length + index_BK
    position_BK = _take(rows.order_BT, jnp.minimum(slot_BK, length - 1))
    masked_BK = _take(tokens_BT, position_BK) == config.mask_id
    masked_BK &= (slot_BK < rows.masks_B[:, None]) & (index_BK < config.block_length)
    # Put the slots that are still masked first, in order, so that chunks without masked slots need not be computed.
    first_BK = jnp.argsort(~masked_BK, axis=1, stable=True)
    index_BK, position_BK, masked_BK = (_take(x, first_BK) for x in (index_BK, position_BK, masked_BK))

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
        new = _predict(model, h_BTD, part(position_BK), key_BC, dials.temperature, config)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old_BK, new_BC, i * chunk, axis=1)
            for old_BK, new_BC in zip(predicted, new, strict=True)
        )

    predicted = (jnp.zeros_like(position_BK), jnp.full_like(position_BK, -jnp.inf, dtype=jnp.float32))
    if width == chunk:
        token_BK, score_BK = predict_chunk(0, predicted)
    else:
        chunks = -(-jnp.max(jnp.sum(masked_BK, axis=1, dtype=jnp.int32)) // chunk)
        token_BK, score_BK = jax.lax.fori_loop(0, chunks, predict_chunk, predicted)

    finite = ~jnp.any(jnp.isnan(score_BK) & masked_BK)
    # The sort is stable, so among equal scores the lowest position stays. Slots that are not masked always come last.
    best_BK = jnp.argsort(jnp.where(masked_BK, -score_BK, jnp.inf), axis=1, stable=True)
    token_BK, position_BK = (_take(x, best_BK) for x in (token_BK, position_BK))
    # Only the best count_B predictions are kept. The others get the position `length`, outside the canvas: dropped.
    position_BK = jnp.where(jnp.arange(width) < count_B[:, None], position_BK, length)
    write = jax.vmap(lambda row_T, at_K, new_K: row_T.at[at_K].set(new_K, mode="drop"))
    write = jax.shard_map(write, in_specs=(mesh.TOKENS_BT,) * 3, out_specs=mesh.TOKENS_BT)
    return write(tokens_BT, position_BK, token_BK), finite


def _roll(tokens_BT: jax.Array, shift_B: jax.Array) -> jax.Array:
    """Rotates each row to the left by its shift."""
    length = tokens_BT.shape[1]
    return _take(tokens_BT, (jnp.arange(length) + shift_B[:, None]) % length)


@functools.partial(jax.jit, static_argnames="config")
def denoise(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    step: jax.Array,
    stop: jax.Array,
    dials: Dials,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs reverse steps from `step` up to `stop` or to the end, or until the model's output is not finite.

    Returns:
      The canvas, int32 (B, T), replicated on every device; the number of steps done by now; the total number of steps,
      as far as it is known by now (stop_at_end can lower it later); and bool (), whether the output of the model was
      finite wherever a token was predicted from it. If not, the canvas means nothing.
    """
    # Cast the weights here, once. Otherwise every step would cast the fp32 master weights again.
    model = jax.tree.map(lambda p: p.astype(compute_dtype(model.compute)), model)
    tokens_BT = _roll(jax.reshard(tokens_BT, mesh.TOKENS_BT), rows.shift_B)

    def steps_in_all(step, tokens_BT):
        return jnp.max(_plan(rows, tokens_BT, step, dials.steps, config)[3])

    def advance(carry):
        step, _, tokens_BT, _ = carry
        tokens_BT, finite = _reverse_step(model, rows, tokens_BT, step, dials, config)
        return step + 1, steps_in_all(step + 1, tokens_BT), tokens_BT, finite

    step, total, tokens_BT, finite = jax.lax.while_loop(
        lambda carry: carry[3] & (carry[0] < jnp.minimum(stop, carry[1])),
        advance,
        (step, steps_in_all(step, tokens_BT), tokens_BT, jnp.bool_(True)),
    )
    if config.stop_at_end:
        tokens_BT = _fill_with_end(rows, tokens_BT, step, dials, config)
    return jax.reshard(_roll(tokens_BT, -rows.shift_B), P(None, None)), step, total, finite


def _fill_with_end(rows: Rows, tokens_BT: jax.Array, step: jax.Array, dials: Dials, config: SamplerConfig) -> jax.Array:
    """Returns the canvas with EOS in place of MASK in all blocks that the rows no longer need."""
    ended_B = _plan(rows, tokens_BT, step, dials.steps, config)[3] == 0
    # Fill only the first masks_B positions of a row's order: any other MASK, such as one in the padding, is kept.
    rank_BT = jnp.argsort(rows.order_BT, axis=1)
    fill_BT = ended_B[:, None] & (rank_BT < rows.masks_B[:, None]) & (tokens_BT == config.mask_id)
    return jnp.where(fill_BT, _ends(config)[0], tokens_BT)


def _start(
    model: Transformer, prompt_BT, config: SamplerConfig, key: jax.Array, prompt_mask_BT
) -> tuple[Rows, jax.Array]:
    """Returns the rows and the canvas before the first step, on the mesh in use, with B rounded up to its shards."""
    prompt_BT = np.asarray(prompt_BT)
    real_BT = None if prompt_mask_BT is None else np.asarray(prompt_mask_BT).astype(bool)
    check_prompt(prompt_BT, real_BT, model.config.vocab_size)
    batch, prompt_length = prompt_BT.shape
    tokens_BT = np.full((batch, prompt_length + config.gen_length), config.mask_id, np.int32)
    tokens_BT[:, :prompt_length] = prompt_BT

    if real_BT is None or real_BT.all():
        shift_B, aligned_BT, real_BT = np.zeros(batch, np.int32), tokens_BT, None
        fill_BT = tokens_BT == config.mask_id
    else:
        real_BT = np.pad(real_BT, ((0, 0), (0, config.gen_length)), constant_values=True)
        shift_B = np.where(real_BT.any(axis=1), real_BT.argmax(axis=1), 0).astype(np.int32)
        at_BT = (np.arange(tokens_BT.shape[1]) + shift_B[:, None]) % tokens_BT.shape[1]
        aligned_BT, real_BT = (np.take_along_axis(x, at_BT, axis=1) for x in (tokens_BT, real_BT))
        fill_BT = (aligned_BT == config.mask_id) & real_BT
    order_BT = np.argsort(~fill_BT, axis=1, kind="stable").astype(np.int32)
    masks_B = fill_BT.sum(axis=1, dtype=np.int32)

    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (batch,)):
        raise UserError(f"key has shape {key.shape}: give one key, or one for each of the {batch} rows")
    # Copy the key through the host: its device may be outside the mesh, and other processes may own parts of the mesh.
    key_data = jax.device_put(jax.device_get(jax.random.key_data(key)), P())
    given_BT = ~fill_BT if config.cfg_scale else None
    *fields, row_B = mesh.place_rows(
        order_BT, masks_B, masks_B - config.gen_length, shift_B, real_BT, given_BT, np.arange(batch, dtype=np.int32)
    )
    rows = Rows(*fields, _row_keys(key_data, row_B, jax.random.key_impl(key)))
    return rows, jax.reshard(mesh.place_rows(tokens_BT)[0], P(None, None))


@functools.partial(jax.jit, static_argnums=2)
def _row_keys(key_data: jax.Array, row_B: jax.Array, kind: Hashable) -> jax.Array:
    """Returns the keys (B,) of the rows, split over the mesh in the same way as row_B."""
    key = jax.random.wrap_key_data(key_data, impl=kind)
    if key.ndim:
        return key.at[row_B].get(out_sharding=mesh.ROWS_B)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)


def _arguments(config: SamplerConfig) -> tuple[Dials, SamplerConfig]:
    """Splits the settings into those that are traced, as arrays, and the others, as static data."""
    on_or_off = {name: float(getattr(config, name) > 0) for name in ("temperature", "cfg_scale")}
    static = dataclasses.replace(config, steps=1, gen_length=0, **on_or_off)
    temperature, cfg_scale = (jax.device_put(np.float32(x), P()) for x in (config.temperature, config.cfg_scale))
    return Dials(_scalar(config.steps), temperature, cfg_scale), static


def _scalar(value: int) -> jax.Array:
    return jax.device_put(np.int32(value), P())


def generate(
    model: Transformer,
    prompt_BT: jax.typing.ArrayLike,
    config: SamplerConfig,
    key: jax.Array,
    prompt_mask_BT: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Fills in the MASK tokens of the prompts and gen_length appended ones, all rows in one compiled program.

    The program is compiled once per shape (B, T), block_length, remasking, greedy or not, and guided or not. The values
    of steps, temperature, cfg_scale and key are traced. The caller need not set a mesh; on a mesh the rows are split
    over its batch axes.

    Only tokens other than MASK are chosen. The config of a model from `llada_jax.load` knows from its tokenizer which
    ids are tokens (token_count, holes). If there was no tokenizer, all ids below token_count count as tokens.

    Args:
      model: The mask predictor.
      prompt_BT: int ids, on the host or on a device. MASK tokens among them are filled in.
      config: The settings of the sampler.
      key: Either one key, so that row i uses fold_in(key, i), or keys (B,), one for each row. With a key of its own, a
        row has the same result at any place in any batch.
      prompt_mask_BT: bool, True for a real token. Padding, usually on the left, is neither attended to nor filled in.

    Returns:
      The whole canvas, int32 (B, T + gen_length), including padding. The rows keep their order.

    Raises:
      UserError: If a setting is impossible, an id is outside the vocabulary, or shapes do not match.
      NonFinite: If the output of the model is NaN or infinite where a token is predicted from it.
    """
    config = resolve(config, model)
    with mesh.mesh_of(model.embedding[...]):
        rows, tokens_BT = _start(model, prompt_BT, config, key, prompt_mask_BT)
        if tokens_BT.shape[1]:
            dials, static = _arguments(config)
            tokens_BT, _, _, finite = denoise(
                model, rows, tokens_BT, _scalar(0), _scalar(TO_THE_END), dials, config=static
            )
            if not finite:
                raise NonFinite
        return jax.lax.slice_in_dim(tokens_BT, 0, len(prompt_BT))


def denoise_steps(
    model: Transformer,
    prompt_BT: jax.typing.ArrayLike,
    config: SamplerConfig,
    key: jax.Array,
    prompt_mask_BT: jax.typing.ArrayLike | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Does the same as `generate`, with the same compiled program, but yields the canvas after every step.

    The arguments and the errors are those of `generate`.

    Yields:
      The canvas, int32 (B, T + gen_length), and bool of the same shape, True for a token that this step revealed: once
      before the first step, with nothing revealed, and then after each step.
    """
    config = resolve(config, model)
    batch = len(prompt_BT)
    with mesh.mesh_of(model.embedding[...]):
        rows, tokens_BT = _start(model, prompt_BT, config, key, prompt_mask_BT)
        dials, static = _arguments(config)
    shown_BT = np.asarray(tokens_BT)[:batch]
    yield shown_BT, np.zeros(shown_BT.shape, bool)
    done, total = 0, int(shown_BT.shape[1] > 0)
    while done < total:
        # Enter the mesh for each step separately, because the consumer's own code runs between two steps.
        with mesh.mesh_of(model.embedding[...]):
            tokens_BT, step, all_steps, finite = denoise(
                model, rows, tokens_BT, _scalar(done), _scalar(done + 1), dials, config=static
            )
        if not finite:
            raise NonFinite
        before_BT, shown_BT = shown_BT, np.asarray(tokens_BT)[:batch]
        done, total = int(step), int(all_steps)
        if done:
            yield shown_BT, shown_BT != before_BT
