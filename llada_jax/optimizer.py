"""AdamW as an optax chain without a learning rate, and the schedule, applied to the step by the trainer.

Kept apart because a skipped step must still advance the schedule, while Adam's moments and its bias
correction must not see it: the schedule counts steps of the run, Adam counts updates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llada_jax.config import OptimizerConfig, UserError


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
            raise UserError(f"config.optimizer.schedule: position {point[0]} comes before the one in front of it")
        points.append((float(position), float(factor)))
    if not points:
        raise UserError("config.optimizer.schedule is empty: ((0, 1.0),) is a constant learning rate")
    return points


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step (int, 0 = the first) -> fp32 learning rate: the polyline of config.schedule times the peak.

    The update of step s uses the value at s + 1, so that a warm-up from (0, 0) does not waste its first step.
    """
    points = schedule_points(config, steps)
    positions = jnp.array([p for p, _ in points], jnp.float32)
    factors = jnp.array([f for _, f in points], jnp.float32)

    def schedule(step: jax.Array) -> jax.Array:
        x = step.astype(jnp.float32) + 1
        right = jnp.clip(jnp.searchsorted(positions, x, side="left"), 1, len(points) - 1) if len(points) > 1 else 0
        left = jnp.maximum(right - 1, 0)
        span = jnp.maximum(positions[right] - positions[left], 1e-6)
        share = jnp.clip((x - positions[left]) / span, 0.0, 1.0)
        return config.peak_learning_rate * (factors[left] + share * (factors[right] - factors[left]))

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay; updates still to be multiplied by -learning rate."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(params: dict) -> dict:
    """True for matrices, False for norm weights, which set a scale rather than a direction."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)
