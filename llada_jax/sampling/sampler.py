"""The reverse process (Section 2.4 and Appendix B.4 of arXiv 2502.09992), which turns MASK tokens into text.

One compiled program, a `lax.while_loop` over reverse steps, denoises a canvas [prompt | MASK ... MASK]. Every step
predicts the masked tokens of the active block and keeps some of the predictions; the other tokens stay masked. The MASK
positions of a row (first those in the prompt, then the appended ones) are cut in order into blocks. The blocks are
finished one after another, each in its share of the steps.

Rows are independent of each other. Each row has its own blocks and steps, and its noise depends only on the key, the
row, the block, the step and the slot within the block. A row is computed from its first real token on, so left padding
changes neither its positions nor its result.

A step has three parts: where each row stands (`plan.py`), the forward pass (all tokens, or with `cache.py` some), and
the predictions, of which the best are kept (`step.py`). With length=daedal these are in `daedal.py`, because the number
of MASK tokens changes meanwhile.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, SamplerConfig
from llada_jax.devices import mesh
from llada_jax.model.compute import compute_dtype
from llada_jax.model.int8 import in_dtype
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import cache, causal, daedal, revoking, watching
from llada_jax.sampling.canvas import Dials, Rows, arguments, put, roll, scalar, start
from llada_jax.sampling.guidance import guided_trunk
from llada_jax.sampling.lengths import DAEDAL
from llada_jax.sampling.plan import Plan, fill_with_end, plan
from llada_jax.sampling.settings import REMDM, TO_THE_END, WINO, resolve
from llada_jax.sampling.step import active_block, keep_the_best


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """What the reverse steps change."""

    tokens_BT: jax.Array  # int32: the canvas, each row turned so that it begins with its first real token
    steps_B: jax.Array  # int32: the number of reverse steps that each row has taken
    kept: cache.Kept | None  # keys and values; None if the settings keep none
    memory: revoking.Memory | None  # what is known of earlier steps; None if the settings take no token back
    extent: daedal.Extent | None = None  # how far each row goes; None if its length is given


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outcome:
    """What a call of `denoise` has come to; all of it is replicated on every device."""

    canvas_BT: jax.Array  # int32: the canvas as the caller knows it
    steps_B: jax.Array  # int32: the number of reverse steps that each row has taken by now
    passes: jax.Array  # int32 scalar: the number of passes of this call; a row need not take a step in each of them
    going: jax.Array  # bool scalar: whether a row needs further steps
    finite: jax.Array  # bool scalar: whether every prediction was finite. If not, the canvas means nothing.


def begin(model: Transformer, prompt_BT, config: SamplerConfig, key: jax.Array, prompt_mask_BT) -> tuple[Rows, State]:
    """Returns the rows and the state before the first step, on the mesh in use, with B rounded up to its shards."""
    rows, tokens_BT = start(model, prompt_BT, config, key, prompt_mask_BT)
    steps_B, extent = jax.device_put(np.zeros(len(tokens_BT), np.int32), mesh.ROWS_B), None
    if config.length == DAEDAL:
        tokens_BT, extent = daedal.begin(rows, tokens_BT, config.eos_id)
    return rows, State(
        tokens_BT, steps_B, cache.nothing_kept(model, rows, config), revoking.nothing_known(tokens_BT, config), extent
    )


def _where(rows: Rows, state: State, dials: Dials, config: SamplerConfig) -> Plan:
    """Returns where each row stands."""
    if config.length == DAEDAL:
        return daedal.plan(rows, state.tokens_BT, state.extent, state.steps_B, config)
    return plan(rows, state.tokens_BT, state.steps_B, dials.steps, config)


def _reverse_step(
    model: Transformer,
    rows: Rows,
    state: State,
    now: Plan,
    dials: Dials,
    config: SamplerConfig,
    alternatives: int | None = None,
) -> tuple[State, jax.Array, watching.Seen | None]:
    """Takes one more reverse step in every row that is neither finished nor waits for a full pass.

    Returns:
      The state; bool (), whether all predictions were finite; and, with a number of alternatives, what is told of them.
    """
    if config.length == DAEDAL:
        tokens_BT, extent, finite, seen = daedal.step(
            model, rows, state.tokens_BT, state.extent, now, dials, config, alternatives
        )
        return State(tokens_BT, state.steps_B + now.going_B, None, None, extent), finite, seen
    block = active_block(rows, state.tokens_BT, now, config)
    took_B, kept, most_B, revoked_BK = now.going_B, None, None, None
    if cache.used(config):
        h_BND, took_B, kept = cache.hidden(model, rows, state.tokens_BT, state.kept, now, block, dials, config)
        at_BK = jnp.zeros_like(block.index_BK) + jnp.arange(block.index_BK.shape[1], dtype=jnp.int32)
        block = dataclasses.replace(block, masked_BK=block.masked_BK & took_B[:, None])
        now = dataclasses.replace(now, going_B=took_B, count_B=jnp.where(took_B, now.count_B, 0))
    elif rows.given_BT is None:
        h_BND, at_BK = model.trunk(state.tokens_BT, rows.real_BT), block.position_BK
    else:
        at_BK = block.position_BK
        h_BND = guided_trunk(model, state.tokens_BT, rows.given_BT, rows.real_BT, dials.cfg_scale, config.mask_id)
    if config.revoke in REMDM:
        revoked_BK = revoking.draw(rows, now, block, state.memory, dials.revoke_bound, config) & took_B[:, None]
        now = dataclasses.replace(now, count_B=now.count_B + jnp.sum(revoked_BK, axis=1, dtype=jnp.int32))
    elif config.revoke == WINO:
        most_B = revoking.most_accepted(block)
    new = keep_the_best(model, rows, state.tokens_BT, now, block, h_BND, at_BK, dials, config, alternatives, most_B)
    tokens_BT, memory = new.tokens_BT, state.memory
    if config.revoke == WINO:
        h_BKD = h_BND[:, at_BK.shape[1] :]
        revoked_BK, memory = revoking.check(
            model, h_BKD, state.tokens_BT, tokens_BT, block, memory, dials.revoke_bound, config
        )
    elif memory is not None and memory.committed_BT is not None:
        memory = revoking.Memory(committed_BT=put(memory.committed_BT, new.position_BK, new.score_BK))
    if revoked_BK is not None:
        tokens_BT = revoking.take_back(tokens_BT, block, revoked_BK, config)
    return State(tokens_BT, state.steps_B + took_B, kept, memory), new.finite, new.seen


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def denoise(
    model: Transformer, rows: Rows, state: State, passes: jax.Array, dials: Dials, config: SamplerConfig
) -> tuple[Outcome, State]:
    """Runs this number of passes, or as many as there are to the end, or until the model's output is not finite."""
    # Cast the weights here, once. Otherwise every step would cast the fp32 master weights again.
    model = in_dtype(model, compute_dtype(model.compute))

    def goes_on(carry):
        done, _, now, finite = carry
        return finite & (done < passes) & jnp.any(now.going_B)

    def advance(carry):
        done, state, now, _ = carry
        state, finite, _ = _reverse_step(model, rows, state, now, dials, config)
        return done + 1, state, _where(rows, state, dials, config), finite

    carry = (jnp.int32(0), state, _where(rows, state, dials, config), jnp.bool_(True))
    done, state, now, finite = jax.lax.while_loop(goes_on, advance, carry)
    canvas_BT = state.tokens_BT
    if config.stop_at_end:
        canvas_BT = fill_with_end(rows, canvas_BT, now, config)
    outcome = Outcome(
        canvas_BT=jax.reshard(roll(canvas_BT, -rows.shift_B), P(None, None)),
        steps_B=jax.reshard(state.steps_B, P(None)),
        passes=done,
        going=jnp.any(now.going_B),
        finite=finite,
    )
    return outcome, state


@functools.partial(jax.jit, static_argnames=("config", "alternatives"))
def look(
    model: Transformer, rows: Rows, state: State, dials: Dials, config: SamplerConfig, alternatives: int
) -> watching.Seen:
    """Returns what the next pass predicts, replicated on every device, with positions that count the padding."""
    model = in_dtype(model, compute_dtype(model.compute))
    now = _where(rows, state, dials, config)
    seen = _reverse_step(model, rows, state, now, dials, config, alternatives)[2]
    seen = seen._replace(position_BK=(seen.position_BK + rows.shift_B[:, None]) % state.tokens_BT.shape[1])
    return jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), seen)


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

    The program is compiled once per shape (B, T), length, block_length, remasking, commit, revoke, cache,
    suffix_window, and whether there is a temperature, guidance, top_k and top_p. The values of steps, temperature,
    cfg_scale, top_k, top_p, commit_bound, revoke_bound, cache_refresh and key are traced. The caller need not set a
    mesh; on a mesh the rows are split over its batch axes.

    A causal model continues the prompts, one token after another (`sampling/causal.py`); settings that are about masks
    must have their defaults.

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
        two with guidance. A pass that feeds a few tokens, because a cache has the keys and values of the others, counts
        as much as a full one, and so does one that only finds the length.

    Returns:
      The whole canvas, int32 (B, T + gen_length), including padding. The rows keep their order. Where the length is
      not fixed, EOS stands behind the continuation of a row. With return_steps, also the number of reverse steps of
      each row, int32 (B,).

    Raises:
      UserError: If a setting is impossible, an id is outside the vocabulary, shapes do not match, or a cache does not
        fit into the memory of the devices.
      NonFinite: If the output of the model is NaN or infinite where a token is predicted from it.
    """
    config = resolve(config, model)
    if model.config.causal:
        return causal.generate(model, prompt_BT, config, key, prompt_mask_BT, return_steps)
    with mesh.mesh_of(model.embedding[...]):
        rows, state = begin(model, prompt_BT, config, key, prompt_mask_BT)
        if state.tokens_BT.shape[1]:
            dials, static = arguments(config)
            outcome, _ = denoise(model, rows, state, scalar(TO_THE_END), dials, config=static)
            if not outcome.finite:
                raise NonFinite
            canvas_BT, steps_B = outcome.canvas_BT, outcome.steps_B
        else:
            canvas_BT, steps_B = jax.reshard(state.tokens_BT, P(None, None)), jax.reshard(state.steps_B, P(None))
        if len(canvas_BT) > len(prompt_BT):
            canvas_BT, steps_B = (jax.lax.slice_in_dim(x, 0, len(prompt_BT)) for x in (canvas_BT, steps_B))
        return (canvas_BT, steps_B) if return_steps else canvas_BT


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
        of most probable tokens at each position. A second program computes them, which at least doubles the time.

    Yields:
      The canvas before the first step, with nothing new and without scores, and then each step.

    Raises:
      UserError, NonFinite: As `generate`.
    """
    config = resolve(config, model)
    watching.check(alternatives, model.config.vocab_size)
    if model.config.causal:
        yield from causal.generate_steps(model, prompt_BT, config, key, prompt_mask_BT, alternatives)
        return
    batch = len(prompt_BT)
    with mesh.mesh_of(model.embedding[...]):
        rows, state = begin(model, prompt_BT, config, key, prompt_mask_BT)
        dials, static = arguments(config)
    prompt_BT = np.asarray(prompt_BT, np.int32)
    shown_BT = np.pad(prompt_BT, ((0, 0), (0, config.gen_length)), constant_values=config.mask_id)
    if config.length == DAEDAL:
        shown_BT[:, prompt_BT.shape[1] + daedal.FIRST :] = config.eos_id
    yield watching.step(shown_BT, shown_BT, config.mask_id, None)
    going, seen = shown_BT.shape[1] > 0, None
    while going:
        # Enter the mesh for each step separately, because the consumer's own code runs between two steps.
        with mesh.mesh_of(model.embedding[...]):
            if alternatives is not None:
                seen = look(model, rows, state, dials, config=static, alternatives=alternatives)
            outcome, state = denoise(model, rows, state, scalar(1), dials, config=static)
        if not outcome.finite:
            raise NonFinite
        before_BT, shown_BT = shown_BT, np.asarray(outcome.canvas_BT)[:batch]
        going = bool(outcome.going)
        if outcome.passes:
            yield watching.step(shown_BT, before_BT, config.mask_id, seen)
