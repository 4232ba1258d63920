"""The jitted train step: sample t, mask, forward, masked cross-entropy, gradients, update."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config, UserError
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.diffusion.cross_entropy import linear_cross_entropy
from llada_jax.model import lora
from llada_jax.model.attention import CHOICES
from llada_jax.model.transformer import REMAT, Transformer, initialise, merge, split
from llada_jax.training.optimizer import NAMES as OPTIMIZERS
from llada_jax.training.optimizer import STATE_DTYPES, make_optimizer, make_schedule, schedule_points


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """All that a run needs to go on."""

    step: jax.Array  # int32, steps done, skipped ones included
    params: dict  # fp32; all of the model's, or its adapters alone (config.model.lora)
    opt_state: tuple


def check_choices(config: Config) -> None:
    """UserError if a setting that names something names what there is not, or the schedule is none."""
    for name, value, known in (
        ("diffusion.objective", config.diffusion.objective, forward.OBJECTIVES),
        ("diffusion.t_sampling", config.diffusion.t_sampling, forward.T_SAMPLING),
        ("compute.remat", config.compute.remat, REMAT),
        ("compute.attention", config.compute.attention, CHOICES),
        ("compute.dtype", config.compute.dtype, ("", "float32", "bfloat16")),
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("optimizer.state_dtype", config.optimizer.state_dtype, STATE_DTYPES),
    ):
        if value not in known:
            raise UserError(f"config.{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    schedule_points(config.optimizer, config.steps)


def make_state(config: Config, params: dict | None = None) -> TrainState:
    """The state at step 0, sharded over the mesh in use. Trace it with jax.eval_shape for a restore target.

    Args:
      config: of the run.
      params: what is trained, to start from; None = freshly initialised.
    """
    if params is None:
        key = jax.random.key(config.seed)
        if config.model.lora.rank:
            params = lora.initialise(config.model, config.compute, key)
        else:
            params = split(initialise(config.model, config.compute, key))[1]
    opt_state = jax.jit(make_optimizer(config.optimizer).init)(params)
    return TrainState(jnp.zeros((), jnp.int32, out_sharding=P()), params, opt_state)


def masked_loss(model: Transformer, noisy: forward.Corrupted, tokens_BT, length_B, chunk: int):
    """Sum over rows of sum(weight * nll), and nll_BT in nats, 0 where not masked."""
    h_BTD = model.trunk(noisy.tokens_BT, length_B)
    return linear_cross_entropy(h_BTD, model.head_weight(), tokens_BT, noisy.weight_BT, chunk)


def make_train_step(config: Config, graphdef: nnx.GraphDef, options: dict[str, bool | int] | None = None) -> Callable:
    """train_step(state, batch, frozen=None) -> state, metrics; jitted, donating state; call it under `jax.set_mesh`.

    options go to the compiler, see `hardware.compiler_options`. frozen holds what the model has beside state.params
    and is not trained, see `lora.partition`: no gradient of it is formed.

    batch holds "tokens" int32 (B, T) and "length" int32 (B,), rows split over the batch axes, and what else the
    objective takes.
    metrics are scalars on the device, except the two vectors over mask-ratio buckets:
      loss          nats per token, Eq. 3 or 5, mean over the rows of the global batch
      grad_norm     global norm before clipping
      learning_rate of this step
      skipped       1 if loss or gradients were not finite and nothing was applied
      tokens        real tokens in the batch
      bucket_nll, bucket_tokens   sum of nll and number of masked tokens by mask ratio
    """
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer)
    objective = forward.OBJECTIVES[config.diffusion.objective]

    def loss_of(params, frozen, key, batch, row_B):
        noisy = objective(key, batch, row_B, config.diffusion, config.model.mask_id)
        tokens_BT, length_B = batch["tokens"], batch["length"]
        model = merge(graphdef, lora.combine(params, frozen))
        total, nll_BT = masked_loss(model, noisy, tokens_BT, length_B, config.compute.loss_chunk)
        bucket_B = jnp.minimum((noisy.p_mask_B * config.logging.buckets).astype(jnp.int32), config.logging.buckets - 1)
        member_BK = (bucket_B[:, None] == jnp.arange(config.logging.buckets)).astype(jnp.float32)
        sums = {
            "bucket_nll": jnp.einsum("b,bk->k", nll_BT.sum(axis=1), member_BK, out_sharding=P(None)),
            "bucket_tokens": jnp.einsum(
                "b,bk->k", noisy.mask_BT.sum(axis=1).astype(jnp.float32), member_BK, out_sharding=P(None)
            ),
            "tokens": length_B.sum(),
        }
        return total / config.batch_size, sums

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def train_step(state: TrainState, batch: dict, frozen: dict | None = None) -> tuple[TrainState, dict]:
        key = forward.step_key(config.seed, state.step)
        rows = jnp.arange(config.batch_size, dtype=jnp.int32, out_sharding=mesh.ROWS_B)
        inputs = (batch, rows)
        if config.accumulation == 1:
            (loss, sums), grads = gradient(state.params, frozen, key, *inputs)
        else:
            # Micro-batches are summed in fp32; the loss is a sum over rows over the batch size, so this is
            # the large batch's gradient. Zeros as the start keep one program, not a first case of its own. The sums
            # are a second (sharded) copy of the gradients: a scan over layers gives its gradients as new arrays.
            def add(total, micro):
                return jax.tree.map(jnp.add, total, gradient(state.params, frozen, key, *micro)), None

            micro = jax.tree.map(lambda x: micro_batches(x, config.accumulation), inputs)
            shapes = jax.eval_shape(gradient, state.params, frozen, key, *jax.tree.map(lambda x: x[0], micro))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)
            ((loss, sums), grads), _ = jax.lax.scan(add, zeros, micro)

        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        learning_rate = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        # A non-finite step moves on without a trace: parameters and moments stay what they were.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped": 1 - finite.astype(jnp.int32),
            **sums,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=options or None)


def micro_batches(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) -> (count, B / count, ...), each shard's rows dealt out in place: nothing travels."""
    shards, rest = mesh.batch_shards(), x.shape[1:]
    micro = x.shape[0] // count
    none = (None,) * len(rest)
    x = jax.lax.reshape(x, (shards, count, micro // shards, *rest), out_sharding=P(mesh.BATCH, None, None, *none))
    x = x.swapaxes(0, 1)
    return jax.lax.reshape(x, (count, micro, *rest), out_sharding=P(None, mesh.BATCH, *none))
