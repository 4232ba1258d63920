"""The jitted train step: sample t, mask tokens, run the model, compute the masked cross-entropy, update parameters."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax.config import Config
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.diffusion.cross_entropy import linear_cross_entropy
from llada_jax.model import lora
from llada_jax.model.transformer import Transformer, initialise, merge, split
from llada_jax.training.optimizer import make_optimizer, make_schedule


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """Everything that a run needs in order to continue."""

    step: jax.Array  # int32, number of completed steps, including skipped steps
    params: dict  # fp32, the trained parameters: all of the model's, or only its adapters (config.model.lora)
    opt_state: tuple  # the state of the optimizer, as optax gives it


def make_state(config: Config, params: dict | None = None) -> TrainState:
    """Returns the state at step 0, sharded over the mesh in use.

    Under `jax.eval_shape` this function returns the abstract state, which is the target for restoring a checkpoint.

    Args:
      config: The run's configuration.
      params: The initial values of the trained parameters. None means freshly initialised parameters.
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
    """Returns the sum of weight * nll over all positions and rows, and the loss of each position.

    Args:
      model: The model.
      noisy: The batch after the forward process.
      tokens_BT: int32, the tokens x_0 that the model must predict.
      length_B: int32, the number of real tokens of each row.
      chunk: Number of positions whose logits are held at once, see `linear_cross_entropy`.

    Returns:
      The fp32 scalar sum, and nll_BT: the negative log-likelihood of each token in nats, 0 where it is not masked.
      Of an autoregressive model, that of a token stands at the position before it.
    """
    h_BTD = model.trunk(noisy.tokens_BT, length_B)
    targets_BT = tokens_BT if noisy.targets_BT is None else noisy.targets_BT
    return linear_cross_entropy(h_BTD, model.head_weight(), targets_BT, noisy.weight_BT, chunk)


def make_train_step(config: Config, graphdef: nnx.GraphDef, options: dict[str, bool | int] | None = None) -> Callable:
    """Returns the jitted function train_step(state, batch, frozen=None) -> (state, metrics).

    Call train_step under `jax.set_mesh`. It donates its argument `state`. Its arguments and results are:

      state: The `TrainState`. It holds the trained parameters.
      batch: A dict with "tokens", int32 (B, T), and "length", int32 (B,), whose rows are split over the batch axes of
        the mesh, and any other arrays that the objective takes.
      frozen: The parameters of the model that are not trained, see `lora.partition`. No gradient of them is computed.
        None means that all parameters are in `state`.
      metrics: A dict of scalars on the device, except for the two vectors over buckets of the mask ratio:
        loss: Nats per token, Eq. 3 or 5, the mean over the rows of the global batch.
        grad_norm: Global norm of the gradients before clipping.
        learning_rate: Learning rate of this step.
        skipped: 1 if the loss or the gradients were not finite and the update was not applied, else 0.
        tokens: Number of real tokens in the batch.
        bucket_nll, bucket_tokens: Sum of nll and number of masked tokens in each bucket of the mask ratio.

    Args:
      config: The run's configuration.
      graphdef: The structure of the model, from `transformer.split`.
      options: Options for the compiler, see `hardware.compiler_options`.
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
            # The gradients of the micro-batches are summed in fp32. The loss is a sum over rows divided by the batch
            # size, so this sum is the gradient of the whole batch. Starting from zeros lets the first micro-batch use
            # the same program as the others. The sums take the memory of a second (sharded) copy of the gradients,
            # because a scan over layers returns its gradients as new arrays.
            def add(total, micro):
                more = gradient(state.params, frozen, key, *micro)
                with jax.named_scope("optimizer"):
                    return jax.tree.map(jnp.add, total, more), None

            micro = jax.tree.map(lambda x: micro_batches(x, config.accumulation), inputs)
            shapes = jax.eval_shape(gradient, state.params, frozen, key, *jax.tree.map(lambda x: x[0], micro))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)
            ((loss, sums), grads), _ = jax.lax.scan(add, zeros, micro)

        # llada_jax.plan tells the optimizer from the model by this name.
        with jax.named_scope("optimizer"):
            grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            learning_rate = schedule(state.step)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
            # A step that is not finite counts as a step but changes nothing else: parameters and moments stay as they
            # were.
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
    """Reshapes (B, ...) to (count, B / count, ...).

    Each device distributes the rows of its own shard among the micro-batches, so no data moves between devices.
    """
    shards, rest = mesh.batch_shards(), x.shape[1:]
    micro = x.shape[0] // count
    none = (None,) * len(rest)
    x = jax.lax.reshape(x, (shards, count, micro // shards, *rest), out_sharding=P(mesh.BATCH, None, None, *none))
    x = x.swapaxes(0, 1)
    return jax.lax.reshape(x, (count, micro, *rest), out_sharding=P(None, mesh.BATCH, *none))
