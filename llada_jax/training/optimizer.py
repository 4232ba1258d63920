"""AdamW or Muon as an optax chain without a learning rate, and the schedule, applied by the train step.

Kept apart because a skipped step must still advance the schedule, while Adam's moments and its bias
correction must not see it: the schedule counts steps of the run, Adam counts updates.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from llada_jax.config import OptimizerConfig, UserError
from llada_jax.devices import mesh


def schedule_points(config: OptimizerConfig, steps: int) -> list[tuple[float, float]]:
    """config.schedule in steps. UserError unless positions ascend and factors are finite and >= 0."""
    points = []
    for point in config.schedule:
        if not isinstance(point, tuple | list) or len(point) != 2:
            raise UserError(f"config.optimizer.schedule: {point!r} is not a (position, factor) pair")
        position, factor = point
        if isinstance(position, float) and not 0 <= position <= 1:
            raise UserError(
                f"config.optimizer.schedule: position {position} must be an int (a step) or a fraction in [0, 1]"
            )
        position = position * steps if isinstance(position, float) else position
        if position < 0 or not 0 <= factor < float("inf"):
            raise UserError(f"config.optimizer.schedule: {point!r} must not be negative")
        if points and position < points[-1][0]:
            raise UserError(
                f"config.optimizer.schedule: position {point[0]} comes before the one in front of it "
                f"(step {position:g} of {steps} after step {points[-1][0]:g})"
            )
        points.append((float(position), float(factor)))
    if not points:
        raise UserError("config.optimizer.schedule is empty: ((0, 1.0),) is a constant learning rate")
    return points


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step (int, 0 = the first) -> fp32 learning rate: the polyline of config.schedule times the peak.

    The update of step s uses the value at s + 1, so that a warm-up from (0, 0) does not waste its first step.
    """
    points = schedule_points(config, steps)
    # On the host: a mesh of described devices (llada_jax.plan) cannot compute.
    on_host = np.array(points, np.float32)

    def schedule(step: jax.Array) -> jax.Array:
        positions, factors = jnp.asarray(on_host[:, 0]), jnp.asarray(on_host[:, 1])
        x = step.astype(jnp.float32) + 1
        right = jnp.clip(jnp.searchsorted(positions, x, side="left"), 1, len(points) - 1) if len(points) > 1 else 0
        left = jnp.maximum(right - 1, 0)
        span = jnp.maximum(positions[right] - positions[left], 1e-6)
        share = jnp.clip((x - positions[left]) / span, 0.0, 1.0)
        return config.peak_learning_rate * (factors[left] + share * (factors[right] - factors[left]))

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam or Muon, decoupled weight decay; updates still to be multiplied by -learning rate.

    With config.name "muon" the matrices inside the layers go to Muon, all else (embedding, head, norms) to Adam.
    Raises UserError: no such optimiser.
    """
    if config.name not in NAMES:
        raise UserError(f"config.optimizer.name={config.name!r}: choose one of {', '.join(NAMES)}")
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rule = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps)
    if config.name == "muon":
        muon = optax.chain(optax.trace(MUON_MOMENTUM, nesterov=True), optax.stateless(_orthogonalise_all))
        rule = optax.partition({"adam": rule, "muon": muon}, _muon_or_adam)
    if config.state_dtype not in STATE_DTYPES:
        raise UserError(f"config.optimizer.state_dtype={config.state_dtype!r}: choose one of {', '.join(STATE_DTYPES)}")
    if config.state_dtype != "float32":
        rule = stored_as(rule, jnp.dtype(config.state_dtype))
    return optax.chain(clip, rule, optax.add_decayed_weights(config.weight_decay, mask=decayed))


def stored_as(rule: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`rule` with its fp32 state kept in `dtype` between updates, which are computed in fp32.

    In bfloat16 a moment forgets changes below 1/256 of itself: config_check asks for betas <= 0.99.
    """

    def cast(state, source, target):
        return jax.tree.map(lambda x: x.astype(target) if x.dtype == source else x, state)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(lambda params: cast(rule.init(params), jnp.float32, dtype), update)


def decayed(params: dict) -> dict:
    """True for matrices, False for norm weights, which set a scale rather than a direction."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)


NAMES = ("adamw", "muon")
STATE_DTYPES = ("float32", "bfloat16")
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, chosen for its slope at zero
# Root mean square of an AdamW update, about; with it Muon takes AdamW's learning rates and weight decay.
UPDATE_RMS = 0.2
# Each layer and each head is a matrix of its own: leading axes are batch axes, the last two rows and columns.
_HEADS_BEHIND_WIDTH = ("q_proj", "k_proj", "v_proj")  # LDHK, while attn_out is LHKD and the others have no heads


def _muon_or_adam(params: dict) -> dict:
    def choose(path, _):
        return "muon" if path[0].key == "blocks" and not path[-1].key.endswith("norm") else "adam"

    return jax.tree_util.tree_map_with_path(choose, params)


def _orthogonalise_all(updates: dict, _: dict | None = None) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, x: _orthogonalise_stack(path[-1].key, x), updates)


def _orthogonalise_stack(name: str, x: jax.Array) -> jax.Array:
    """`orthogonalise` for each layer, and each head of an attention matrix, of a stacked parameter's update.

    The iteration needs whole matrices. So the shards are exchanged for whole layers, shared out over all devices,
    over fsdp and tensor, or over fsdp, whichever first divides L; where none does every device works on all of
    them. The result goes back to where the parameter lives.
    """
    spec = jax.typeof(x).sharding.spec
    shape = jax.sharding.get_abstract_mesh().shape
    shares = [axes for axes in (mesh.AXES, ("fsdp", "tensor"), ("fsdp",)) if not x.shape[0] % _size(shape, axes)]
    x = jax.reshard(x, P(shares[0] if shares else None, *(None,) * (x.ndim - 1)))
    if name in _HEADS_BEHIND_WIDTH:
        x = orthogonalise(x.swapaxes(1, 2)).swapaxes(1, 2)
    else:
        x = orthogonalise(x)
    return jax.reshard(x, spec)


def _size(shape: dict[str, int], axes: tuple[str, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def orthogonalise(x: jax.Array) -> jax.Array:
    """Five Newton-Schulz steps on the last two axes: singular values to about one (0.7 to 1.2), then RMS UPDATE_RMS."""
    rows, columns = x.shape[-2:]
    if rows > columns:
        return orthogonalise(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-8)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return UPDATE_RMS * columns**0.5 * x
