"""Builds the optimizer (AdamW or Muon) as an optax chain without a learning rate, and the learning rate schedule.

The train step combines the two. They are separate because a skipped step must still advance the schedule, while it
must not change Adam's moments and bias correction: the schedule counts the steps of the run, Adam counts updates.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from llada_jax.config import OptimizerConfig, UserError
from llada_jax.devices import mesh


def schedule_points(config: OptimizerConfig, steps: int) -> list[tuple[float, float]]:
    """Converts config.schedule to steps.

    Args:
      config: The configuration of the optimizer.
      steps: Number of steps of the run. A fractional position p in config.schedule means step p * steps.

    Returns:
      The corners of the schedule as (step, factor of the peak learning rate).

    Raises:
      UserError: If the schedule is empty, a point is not a pair, the positions do not ascend, a fractional position
        lies outside [0, 1], a position is negative, or a factor is negative or not finite.
    """
    points = []
    for point in config.schedule:
        if not isinstance(point, tuple | list) or len(point) != 2:
            raise UserError(f"config.optimizer.schedule: {point!r} is not a (position, factor) pair")
        position, factor = point
        if isinstance(position, float) and not 0 <= position <= 1:
            raise UserError(
                f"config.optimizer.schedule: position {position} must be an int (a step) or a fraction in [0, 1]; "
                "write a step without a decimal point"
            )
        position = position * steps if isinstance(position, float) else position
        if position < 0 or not 0 <= factor < float("inf"):
            raise UserError(f"config.optimizer.schedule: {point!r} must be finite and not negative")
        if points and position < points[-1][0]:
            raise UserError(
                f"config.optimizer.schedule: position {point[0]} comes before the position in front of it "
                f"(step {position:g} of {steps} is before step {points[-1][0]:g}); sort the positions"
            )
        points.append((float(position), float(factor)))
    if not points:
        raise UserError(
            "config.optimizer.schedule is empty: write at least one point; ((0, 1.0),) is a constant learning rate"
        )
    return points


def rate_at(config: OptimizerConfig, steps: int, step: int) -> float:
    """Returns the learning rate of a step, as `make_schedule` computes it, without a device.

    Args:
      config: The configuration of the optimizer.
      steps: Number of steps of the run.
      step: The step; 0 is the first.
    """
    positions, factors = np.array(schedule_points(config, steps)).T
    return float(config.peak_learning_rate * _factor(np, positions, factors, np.float64(step + 1)))


def _factor(xp: ModuleType, positions: Any, factors: Any, x: Any) -> Any:
    """Returns the piecewise linear function through some points, at the place x. `xp` is numpy or jax.numpy."""
    right = xp.clip(xp.searchsorted(positions, x, side="left"), 1, len(positions) - 1) if len(positions) > 1 else 0
    left = xp.maximum(right - 1, 0)
    span = xp.maximum(positions[right] - positions[left], 1e-6)
    share = xp.clip((x - positions[left]) / span, 0.0, 1.0)
    return factors[left] + share * (factors[right] - factors[left])


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that computes the learning rate of a step.

    Args:
      config: The configuration of the optimizer.
      steps: Number of steps of the run.

    Returns:
      A function from a step (int, 0 is the first) to the fp32 learning rate: the piecewise linear function through the
      points of config.schedule, times the peak learning rate. The update of step s uses its value at s + 1, so that a
      warm-up from (0, 0) does not waste its first step.

    Raises:
      UserError: If `schedule_points` rejects the schedule.
    """
    points = schedule_points(config, steps)
    # Keep the array on the host: the devices of a plan (llada_jax.plan) do not exist and cannot compute it.
    on_host = np.array(points, np.float32)

    def schedule(step: jax.Array) -> jax.Array:
        positions, factors = jnp.asarray(on_host[:, 0]), jnp.asarray(on_host[:, 1])
        return config.peak_learning_rate * _factor(jnp, positions, factors, step.astype(jnp.float32) + 1)

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the chain of gradient clipping by global norm, Adam or Muon, and decoupled weight decay.

    The caller still has to multiply the updates by -learning rate. With config.name "muon", Muon updates the matrices
    inside the layers, and Adam updates all other parameters (embedding, head, norm weights). config.muon_scale scales
    the updates of Muon.

    Raises:
      UserError: If config.name or config.state_dtype is unknown.
    """
    if config.name not in NAMES:
        raise UserError(f"config.optimizer.name={config.name!r}: choose one of {', '.join(NAMES)}")
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rule = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps)
    if config.name == "muon":
        orthogonal = functools.partial(_orthogonalise_all, scale=config.muon_scale)
        muon = optax.chain(optax.trace(MUON_MOMENTUM, nesterov=True), optax.stateless(orthogonal))
        rule = optax.partition({"adam": rule, "muon": muon}, _muon_or_adam)
    if config.state_dtype not in STATE_DTYPES:
        raise UserError(f"config.optimizer.state_dtype={config.state_dtype!r}: choose one of {', '.join(STATE_DTYPES)}")
    if config.state_dtype != "float32":
        rule = stored_as(rule, jnp.dtype(config.state_dtype))
    return optax.chain(clip, rule, optax.add_decayed_weights(config.weight_decay, mask=decayed))


def stored_as(rule: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Wraps `rule` so that its fp32 state is stored in `dtype` between updates. Updates are still computed in fp32.

    A moment stored in bfloat16 loses changes that are smaller than 1/256 of itself. Therefore `config_check` requires
    betas of at most 0.99.
    """

    def cast(state, source, target):
        return jax.tree.map(lambda x: x.astype(target) if x.dtype == source else x, state)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(lambda params: cast(rule.init(params), jnp.float32, dtype), update)


def decayed(params: dict) -> dict:
    """Returns a tree that is True for matrices, and False for biases and norm weights, which set no direction."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(_NO_MATRICES), params)


NAMES = ("adamw", "muon")
_NO_MATRICES = ("norm", "bias")  # how the names of parameters end that are not matrices
STATE_DTYPES = ("float32", "bfloat16")
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, chosen for a steep slope at zero
# The approximate root mean square of an AdamW update. Scaled to it, Muon works with the learning rates and the weight
# decay of AdamW.
UPDATE_RMS = 0.2
# Each layer and each attention head is a matrix of its own. `orthogonalise` treats the leading axes as batch axes and
# the last two as rows and columns, so these parameters need their axes D and H swapped.
_HEADS_BEHIND_WIDTH = ("q_proj", "k_proj", "v_proj")  # LDHK, whereas attn_out is LHKD and the others have no heads


def _muon_or_adam(params: dict) -> dict:
    def choose(path, _):
        return "muon" if path[0].key == "blocks" and not path[-1].key.endswith(_NO_MATRICES) else "adam"

    return jax.tree_util.tree_map_with_path(choose, params)


def _orthogonalise_all(updates: dict, _: dict | None = None, scale: float = 1.0) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, x: scale * _orthogonalise_stack(path[-1].key, x), updates)


def _orthogonalise_stack(name: str, x: jax.Array) -> jax.Array:
    """Applies `orthogonalise` to each layer of a stacked parameter's update, and to each head of attention matrices.

    The iteration needs whole matrices. Therefore the devices exchange their shards so that each device holds whole
    layers. The layers are divided among all devices, among the fsdp and tensor axes, or among the fsdp axis: the first
    of these whose size divides the number of layers L. If none does, every device works on all layers. The result is
    sharded like the parameter again.
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
    """Makes the matrices in the last two axes nearly orthogonal with five Newton-Schulz steps.

    The steps bring the singular values close to one (0.7 to 1.2). The result is then scaled so that its root mean
    square is about UPDATE_RMS.
    """
    rows, columns = x.shape[-2:]
    if rows > columns:
        return orthogonalise(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-8)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return UPDATE_RMS * columns**0.5 * x
