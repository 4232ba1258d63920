"""Writes with an autoregressive model: one token after another, with the keys and values of all tokens before it.

A pass over the prompts fills the cache and gives the first token of each row. One compiled program, a `lax.while_loop`,
then feeds the newest token of each row and draws the next one, until every row has ended or has `gen_length` tokens.

Rows are independent of each other. In the cache, each row begins at slot 0 with its first real token, so the slot of a
token is its position: padding and other rows change neither. The noise of a token depends on the key of its row and on
how many tokens were drawn before it.

Letters in names, in addition to those of `model/transformer.py`: G also stands for the generated tokens of a row.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, SamplerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.compute import compute_dtype
from llada_jax.model.int8 import in_dtype
from llada_jax.model.kv_cache import Cache, appending_trunk, empty_cache, writing_trunk
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import watching
from llada_jax.sampling.cache import check_memory
from llada_jax.sampling.canvas import Dials, arguments, placed_key, row_keys, scalar
from llada_jax.sampling.plan import is_end
from llada_jax.sampling.remasking import allowed
from llada_jax.sampling.settings import TO_THE_END, check_prompt
from llada_jax.sampling.step import predict


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """What is known of the rows after some tokens of each have been drawn."""

    tokens_BG: jax.Array  # int32: the tokens drawn so far, then zeros
    done: jax.Array  # int32 scalar: the number of tokens drawn of each row
    ended_B: jax.Array  # bool: whether a row has ended
    finite: jax.Array  # bool scalar: whether every prediction was finite. If not, the tokens mean nothing.
    cache: Cache
    length_B: jax.Array  # int32: the number of tokens of each prompt
    fed_B1: jax.Array  # int32: the token of each row that its newest one was predicted from
    key_B: jax.Array  # PRNG keys: the source of each row's noise


def begin(
    model: Transformer, prompt_BT, config: SamplerConfig, key: jax.Array, prompt_mask_BT
) -> tuple[State, np.ndarray]:
    """Reads the prompts and draws the first token of each row, on the mesh in use.

    Returns:
      The state, with B rounded up to the mesh's batch shards, and the prompts, int32 (B, T), as they were given.

    Raises:
      UserError: If a prompt or the key is impossible, or if the cache does not fit into the memory of a device.
    """
    prompt_BT = np.asarray(prompt_BT)
    real_BT = np.ones(prompt_BT.shape, bool) if prompt_mask_BT is None else np.asarray(prompt_mask_BT).astype(bool)
    check_prompt(prompt_BT, real_BT, model.config.vocab_size)
    if config.mask_id is not None and ((prompt_BT == config.mask_id) & real_BT).any():
        raise UserError(
            f"the prompt contains MASK (id {config.mask_id}): a causal model continues texts and fills in nothing"
        )
    order_BT = np.argsort(~real_BT, axis=1, kind="stable")
    fed_BT = np.take_along_axis(np.where(real_BT, prompt_BT, 0), order_BT, axis=1).astype(np.int32)
    length_B = real_BT.sum(axis=1, dtype=np.int32)
    if not length_B.all():
        # A text without a beginning follows the end of the text before it.
        if config.eos_id is None:
            raise UserError("a prompt is empty, and the model does not say which token is EOS: give each a token")
        fed_BT = np.pad(fed_BT, ((0, 0), (0, int(fed_BT.shape[1] == 0))))
        fed_BT[length_B == 0, 0] = config.eos_id
        length_B = np.maximum(length_B, 1)
    slots = fed_BT.shape[1] + config.gen_length
    check_memory(model, len(fed_BT), slots)
    key_data, kind = placed_key(key, len(fed_BT))
    *placed, row_B = mesh.place_rows(fed_BT, length_B, np.arange(len(fed_BT), dtype=np.int32))
    key_B = row_keys(key_data, row_B, kind)
    dials, static = arguments(config)
    return _read(model, *placed, key_B, dials, config=static, count=config.gen_length), prompt_BT.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _read(model: Transformer, tokens_BT, length_B, key_B, dials: Dials, config: SamplerConfig, count: int) -> State:
    """Fills the cache with the prompts, each of which begins at slot 0, and draws the first token of each row."""
    model = in_dtype(model, compute_dtype(model.compute))
    batch, length = tokens_BT.shape
    cache = empty_cache(model.config, model.compute, batch, length + count)
    # No token sees the padding behind it, so nothing needs to say what is real.
    h_BTD, cache = writing_trunk(model, tokens_BT, None, None, cache)
    last_BT = jnp.arange(length) == length_B[:, None] - 1
    h_B1D = jnp.sum(jnp.where(last_BT[:, :, None], h_BTD, 0), axis=1, keepdims=True)
    fed_B1 = jnp.sum(jnp.where(last_BT, tokens_BT, 0), axis=1, keepdims=True)
    zeros_BG = length_B[:, None] * 0 + jnp.zeros(count, jnp.int32)
    state = State(zeros_BG, jnp.int32(0), length_B < 0, jnp.bool_(True), cache, length_B, fed_B1, key_B)
    return _draw(model, state, h_B1D, dials, config)


def _draw(model: Transformer, state: State, h_B1D: jax.Array, dials: Dials, config: SamplerConfig) -> State:
    """Draws the next token of each row from the hidden states of its newest one."""
    key_B1 = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.done)[:, None]
    token_B1, score_B1, _ = predict(model, model.logits(h_B1D), key_B1, dials, config)
    token_B, bad_B = token_B1[:, 0], jnp.isnan(score_B1[:, 0])
    finite, ended_B = state.finite & ~jnp.any(bad_B & ~state.ended_B), state.ended_B
    if config.stop_at_end:
        token_B = jnp.where(ended_B, config.eos_id, token_B)
        ended_B |= is_end(token_B, config)
    here_G = jnp.arange(state.tokens_BG.shape[1]) == state.done
    tokens_BG = jnp.where(here_G, token_B[:, None], state.tokens_BG)
    return dataclasses.replace(state, tokens_BG=tokens_BG, done=state.done + 1, ended_B=ended_B, finite=finite)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def extend(model: Transformer, state: State, more: jax.Array, dials: Dials, config: SamplerConfig) -> State:
    """Draws `more` tokens of each row, or as many as there are to the end, or until an output is not finite."""
    # Cast the weights here, once. Otherwise every turn would cast the fp32 master weights again.
    model = in_dtype(model, compute_dtype(model.compute))
    first, count = state.done, state.tokens_BG.shape[1]

    def goes_on(state: State):
        return state.finite & (state.done < count) & (state.done - first < more) & ~jnp.all(state.ended_B)

    def advance(state: State) -> State:
        fed_B1, slot_B = _newest(state), state.length_B + state.done - 1
        h_B1D, cache = appending_trunk(model, fed_B1, slot_B, state.cache)
        return _draw(model, dataclasses.replace(state, cache=cache, fed_B1=fed_B1), h_B1D, dials, config)

    return jax.lax.while_loop(goes_on, advance, state)


def _newest(state: State) -> jax.Array:
    """Returns the newest token of each row, int32 (B, 1)."""
    here_G = jnp.arange(state.tokens_BG.shape[1]) == state.done - 1
    return jnp.sum(jnp.where(here_G, state.tokens_BG, 0), axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("mask_id", "alternatives"))
def look(model: Transformer, state: State, mask_id: int | None, alternatives: int) -> tuple[jax.Array, ...]:
    """Returns what `watching.likeliest` tells of the newest token of each row, replicated on every device."""
    model = in_dtype(model, compute_dtype(model.compute))
    h_B1D, _ = appending_trunk(model, state.fed_B1, state.length_B + state.done - 2, state.cache)
    told = watching.likeliest(model.logits(h_B1D), _newest(state), allowed(model.config, mask_id), alternatives)
    return tuple(jax.reshard(x, P(*[None] * x.ndim)) for x in told)


@functools.partial(jax.jit, static_argnames="config")
def _written(tokens_BG, done, prompt_BT, config: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the rows as the caller knows them, on every device: one small program, and not one for each operation.

    Args:
      tokens_BG: int32, the tokens drawn, with B rounded up to the mesh's batch shards.
      done: int32 scalar, the number of tokens drawn of each row.
      prompt_BT: int32, the prompts as they were given.
      config: The settings that are static.

    Returns:
      The prompts with what was drawn, int32 (B, T + G), where EOS follows an end; and the number of tokens of each row
      up to its end, or of those that were drawn, int32 (B,).
    """
    tokens_BG = jax.reshard(tokens_BG, P(None, None))[: len(prompt_BT)]
    steps_B = jnp.full(len(prompt_BT), done, jnp.int32)
    if config.stop_at_end:
        drawn_G = jnp.arange(tokens_BG.shape[1]) < done
        tokens_BG = jnp.where(drawn_G, tokens_BG, config.eos_id)
        before_BG = jnp.cumsum(is_end(tokens_BG, config), axis=1) == 0
        steps_B = jnp.minimum(jnp.sum(before_BG, axis=1, dtype=jnp.int32) + 1, done)
    return jnp.concatenate([prompt_BT, tokens_BG], axis=1), steps_B


def generate(
    model: Transformer, prompt_BT, config: SamplerConfig, key: jax.Array, prompt_mask_BT, return_steps: bool
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Continues the prompts. The arguments and results are those of `sampler.generate`, with resolved settings.

    The steps of a row are its tokens up to its end: each took one forward pass, the first one over the whole prompt.
    """
    with mesh.mesh_of(model.embedding[...]):
        if config.gen_length == 0:
            check_prompt(np.asarray(prompt_BT), None, model.config.vocab_size)
            canvas_BT = jax.device_put(np.asarray(prompt_BT, np.int32), P(None, None))
            steps_B = jnp.zeros(len(canvas_BT), jnp.int32)
        else:
            state, prompt_BT = begin(model, prompt_BT, config, key, prompt_mask_BT)
            dials, static = arguments(config)
            state = extend(model, state, scalar(TO_THE_END), dials, config=static)
            if not state.finite:
                raise NonFinite
            given_BT = jax.device_put(prompt_BT, P(None, None))
            canvas_BT, steps_B = _written(state.tokens_BG, state.done, given_BT, config=static)
        return (canvas_BT, steps_B) if return_steps else canvas_BT


def generate_steps(
    model: Transformer,
    prompt_BT,
    config: SamplerConfig,
    key: jax.Array,
    prompt_mask_BT,
    alternatives: int | None = None,
) -> Iterator[watching.Step]:
    """Does the same as `generate`, but yields the rows before the first token and after each token of all rows.

    Where no token is drawn yet, a step has `watching.open_id`. With alternatives, the score of a token is its
    probability.
    """
    open_id, first = watching.open_id(config.mask_id), np.shape(prompt_BT)[1]
    shown_BT = np.pad(np.asarray(prompt_BT, np.int32), ((0, 0), (0, config.gen_length)), constant_values=open_id)
    yield watching.step(shown_BT, shown_BT, open_id, None)
    done, state, ended, going_B, seen = 0, None, False, np.ones(len(shown_BT), bool), None
    while done < config.gen_length and not ended:
        # Enter the mesh for each token separately, because the consumer's own code runs between two tokens.
        with mesh.mesh_of(model.embedding[...]):
            if state is None:
                state, _ = begin(model, prompt_BT, config, key, prompt_mask_BT)
                dials, static = arguments(config)
            else:
                state = extend(model, state, scalar(1), dials, config=static)
            if not state.finite:
                raise NonFinite
            done = int(state.done)
            drawn_BG, ended_B = jax.reshard(state.tokens_BG, P(None, None)), jax.reshard(state.ended_B, P(None))
            drawn_BG, ended_B = (np.asarray(x)[: len(shown_BT)] for x in (drawn_BG, ended_B))
            if alternatives is not None:
                told = look(model, state, config.mask_id, alternatives)
                at_B1 = np.full((len(shown_BT), 1), first + done - 1)
                seen = watching.Seen(at_B1, going_B[:, None], told[0], *told)
        going_B, ended = ~ended_B, bool(ended_B.all())
        before_BT, shown_BT = shown_BT, shown_BT.copy()
        shown_BT[:, first : first + done] = drawn_BG[:, :done]
        if ended:
            shown_BT[:, first + done :] = config.eos_id
        yield watching.step(shown_BT, before_BT, open_id, seen)
