"""The mask predictor: a Transformer without a causal mask (Section 2.2 of arXiv 2502.09992).

Its layers are pre-norm Llama blocks without biases, with RMSNorm, SwiGLU and RoPE. The model has no time input, because
it can see the mask ratio in the tokens. Modules are used only as pytrees of parameters.

With config.model.causal, the same Transformer is an autoregressive model: each token sees only itself and the tokens
before it, and its logits are those of the next token. qkv_bias and qk_norm make it that of Qwen2 and of Qwen3.

Letters in names give the dimensions of arrays: B batch, T sequence (S for the sequence of keys), D model width, H
heads, G key/value heads, K head width, F feed-forward width, V vocabulary, L layers, R rank of the low-rank adapters.
"""

import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model.attention import attention
from llada_jax.model.compute import remat_policy, resolve_compute
from llada_jax.model.cpu import ROTATED_NAME, project
from llada_jax.model.rope import apply_rope, apply_rope_on_tpu, rope_table

# The matrices inside a layer, each with the letters of its input dimensions and of its output dimensions.
MATRICES = {
    "q_proj": ("d", "hk"),
    "k_proj": ("d", "gk"),
    "v_proj": ("d", "gk"),
    "attn_out": ("hk", "d"),
    "ff_proj": ("d", "f"),
    "up_proj": ("d", "f"),
    "ff_out": ("f", "d"),
}

BIASED = ("q", "k", "v")  # q_proj, k_proj and v_proj may have biases: q_bias, k_bias and v_bias
NORMED = ("q", "k")  # queries and keys may have norms: q_norm and k_norm

SCALE = "_scale"  # what model/int8.py appends to the name of a matrix for the name of its scales

# GPUs multiply matrices several times faster if their rows are multiples of 16 bytes (8 numbers in bfloat16). The
# feed-forward width of the paper's 1B model, 5634, is not: such matrices are used with zeros added, which changes no
# sum. A multiple of 64 was a little faster than one of 8, but must not add much.
NEEDED, ALIGNED, MOST_ADDED = 8, 64, 0.03


def added_columns(width: int) -> int:
    """Returns the number of zeros that are added to a feed-forward width, or to the part that a tensor shard has."""
    if width % NEEDED == 0:
        return 0
    return -width % ALIGNED if -width % ALIGNED <= MOST_ADDED * width else -width % NEEDED


def _parameter(name: str, key: jax.Array, shape: tuple[int, ...], sigma) -> nnx.Param:
    """Returns a new parameter, sharded as mesh.PARAMETERS specifies.

    Its values are drawn from a normal distribution that is truncated at 3 sigma. If sigma is None, as for the weights
    of norms, all values are one.
    """
    spec = mesh.PARAMETERS[name]
    if sigma is None:
        return nnx.Param(jnp.ones(shape, jnp.float32, out_sharding=spec))
    key = jax.random.fold_in(key, list(mesh.PARAMETERS).index(name))
    return nnx.Param(sigma * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32, out_sharding=spec))


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Computes x / rms(x) over the last axis in fp32, casts it to the dtype of x, and multiplies it by weight."""
    x_fp32 = x.astype(jnp.float32)
    x_fp32 = x_fp32 * jax.lax.rsqrt(jnp.mean(x_fp32 * x_fp32, axis=-1, keepdims=True) + eps)
    return x_fp32.astype(x.dtype) * weight.astype(x.dtype)


def _einsum(equation: str, x: jax.Array, weight: jax.Array, out_sharding: P) -> jax.Array:
    return jnp.einsum(equation, x, weight, out_sharding=out_sharding)


class Block(nnx.Module):
    """One layer. It is built under vmap, so that the parameters of all layers are stacked along L."""

    def __init__(self, config: ModelConfig, key: jax.Array, layer: jax.Array):
        c, make = config, functools.partial(_parameter, key=key)
        inner, outer = c.width**-0.5, (2 * (layer + 1)) ** -0.5
        self.attn_norm = make("attn_norm", shape=(c.width,), sigma=None)
        self.q_proj = make("q_proj", shape=(c.width, c.heads, c.head_width), sigma=inner)
        self.k_proj = make("k_proj", shape=(c.width, c.kv_heads, c.head_width), sigma=inner)
        self.v_proj = make("v_proj", shape=(c.width, c.kv_heads, c.head_width), sigma=inner)
        self.attn_out = make("attn_out", shape=(c.heads, c.head_width, c.width), sigma=inner * outer)
        self.ff_norm = make("ff_norm", shape=(c.width,), sigma=None)
        self.ff_proj = make("ff_proj", shape=(c.width, c.feed_forward), sigma=inner)
        self.up_proj = make("up_proj", shape=(c.width, c.feed_forward), sigma=inner)
        self.ff_out = make("ff_out", shape=(c.feed_forward, c.width), sigma=c.feed_forward**-0.5 * outer)
        for name in BIASED if c.qkv_bias else ():
            shape, spec = getattr(self, f"{name}_proj").shape[1:], mesh.PARAMETERS[f"{name}_bias"]
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=spec)))
        for name in NORMED if c.qk_norm else ():
            setattr(self, f"{name}_norm", make(f"{name}_norm", shape=(c.head_width,), sigma=None))
        for name in c.lora.targets if c.lora.rank else ():
            shape, count = getattr(self, name).shape, len(MATRICES[name][0])
            a, b = (*shape[:count], c.lora.rank), (c.lora.rank, *shape[count:])
            setattr(self, f"{name}_a", make(f"{name}_a", shape=a, sigma=math.prod(shape[:count]) ** -0.5))
            # B starts at zero, so that training starts exactly from the model without adapters.
            b_spec = mesh.PARAMETERS[f"{name}_b"]
            setattr(self, f"{name}_b", nnx.Param(jnp.zeros(b, jnp.float32, out_sharding=b_spec)))

    def __call__(self, x_BTD, rope, real, config: ModelConfig, compute: ComputeConfig) -> jax.Array:
        """Adds attention and then the feed-forward network to x_BTD, in the dtype of x_BTD."""
        return self.with_keys(x_BTD, rope, real, config, compute)[0]

    def with_keys(
        self,
        x_BTD,
        rope,
        real,
        config: ModelConfig,
        compute: ComputeConfig,
        among=lambda k, v: (k, v),
        attend=None,
    ):
        """Computes the layer, and returns the keys and values that were attended to as well.

        `among` gets the rotated keys and the values of the input, (B, T, G, K), and may put them among others: what it
        returns, (B, S, G, K), is attended to. `attend` may take the place of `attention`, whose arguments it gets; None
        means `attention`, which is causal if the model is.
        """
        # The attention kernel has been chosen for the devices in use, so "cpu" means that they are CPUs.
        product = project if compute.attention == "cpu" else _einsum
        # The kernel "splash" runs on TPUs only. "splash_interpreted" runs on any device, and so does the plain form of
        # the rotation that goes with it.
        rotate = apply_rope_on_tpu if compute.attention == "splash" else apply_rope

        def use(name: str, letters: str, dtype: jnp.dtype = x_BTD.dtype) -> jax.Array:
            weight = getattr(self, name)[...]
            spec = mesh.gathered(mesh.PARAMETERS[name])
            if weight.dtype == jnp.int8:
                weight = jax.reshard(weight, spec).astype(dtype)
            else:  # The cast comes before the gather, because bfloat16 halves the number of bytes that are transferred.
                weight = jax.reshard(weight.astype(dtype), spec)
            shards = mesh.tensor_shards()
            added = added_columns(config.feed_forward // shards)
            if not added or "f" not in letters:
                return weight
            # Each shard gets its own zeros. With all of them at the end, columns would move between the shards.
            pad = functools.partial(jnp.pad, pad_width=[(0, added * (letter == "f")) for letter in letters])
            return pad(weight) if shards == 1 else jax.shard_map(pad, in_specs=spec, out_specs=spec)(weight)

        def linear(name: str, x: jax.Array, out_sharding: P) -> jax.Array:
            inputs, outputs = MATRICES[name]
            y = product(f"bt{inputs},{inputs}{outputs}->bt{outputs}", x, use(name, inputs + outputs), out_sharding)
            if hasattr(self, name + SCALE):
                y = (y * use(name + SCALE, outputs, jnp.float32)).astype(y.dtype)
            if not hasattr(self, f"{name}_a"):
                return y
            # The product with the adapter is added to y. W + A B is never formed, because its gradient would be as
            # large as W. Sums over heads or over the feed-forward width are reduced over the tensor shards here, while
            # they have only R columns.
            xa_BTR = _einsum(f"bt{inputs},{inputs}r->btr", x, use(f"{name}_a", f"{inputs}r"), mesh.HIDDEN_BTD)
            xa_BTR *= config.lora.alpha / config.lora.rank
            return y + _einsum(f"btr,r{outputs}->bt{outputs}", xa_BTR, use(f"{name}_b", f"r{outputs}"), out_sharding)

        def heads(name: str) -> jax.Array:
            x_BTHK = linear(f"{name}_proj", h_BTD, mesh.HEADS_BTHK)
            if config.qkv_bias:
                x_BTHK += use(f"{name}_bias", MATRICES[f"{name}_proj"][1])
            if config.qk_norm and name in NORMED:
                x_BTHK = rms_norm(x_BTHK, getattr(self, f"{name}_norm")[...], config.norm_eps)
            return x_BTHK

        # llada_jax.plan tells the parts of the model apart by these name scopes, here and in the functions called.
        h_BTD = rms_norm(x_BTD, self.attn_norm[...], config.norm_eps)
        with jax.named_scope("attention_projections"):
            q_BTHK, k_BTGK, v_BTGK = (heads(name) for name in ("q", "k", "v"))
        with jax.named_scope("attention"):
            q_BTHK, k_BTGK = (checkpoint_name(rotate(x, *rope), ROTATED_NAME) for x in (q_BTHK, k_BTGK))
            k_BSGK, v_BSGK = among(k_BTGK, v_BTGK)
        attend = attend or functools.partial(attention, causal=config.causal)
        o_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, real, kernel=compute.attention, query_chunk=compute.query_chunk)
        with jax.named_scope("attention_projections"):
            x_BTD += linear("attn_out", o_BTHK, mesh.HIDDEN_BTD)

        h_BTD = rms_norm(x_BTD, self.ff_norm[...], config.norm_eps)
        with jax.named_scope("feed_forward"):
            gate_BTF = linear("ff_proj", h_BTD, mesh.FEED_FORWARD_BTF)
            up_BTF = linear("up_proj", h_BTD, mesh.FEED_FORWARD_BTF)
            f_BTF = jax.nn.silu(gate_BTF) * up_BTF
            return x_BTD + linear("ff_out", f_BTF, mesh.HIDDEN_BTD), (k_BSGK, v_BSGK)


class Transformer(nnx.Module):
    """The mask predictor p_theta(. | x_t).

    Parameters are fp32 and are initialised as in the published configuration ("mitchell"): they are drawn from a normal
    distribution that is truncated at 3 sigma. sigma is 1 / sqrt(width) for the embedding and the head, and
    1 / sqrt(d_in) for the matrices inside a block. For the two output matrices of a block it is also divided by
    sqrt(2 (layer + 1)). The weights of norms are one.

    Construct the model under `jax.set_mesh`, and under `jax.jit`, so that each device allocates only its own shards.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        self.config = copy.deepcopy(config)  # static data must not change when the caller changes its config
        self.compute = dataclasses.replace(compute)
        embedding_key, head_key, blocks_key = jax.random.split(key, 3)
        shape, sigma = (config.vocab_size, config.width), config.width**-0.5
        self.embedding = _parameter("embedding", embedding_key, shape, sigma)
        self.blocks = jax.vmap(functools.partial(Block, config))(
            jax.random.split(blocks_key, config.layers), jnp.arange(config.layers)
        )
        self.final_norm = _parameter("final_norm", key, (config.width,), None)
        self.head = None if config.tied_embeddings else _parameter("head", head_key, shape[::-1], sigma)

    def resolved_compute(self) -> ComputeConfig:
        """Returns `compute` with the dtype and the attention kernel decided, for the default device if they are not."""
        compute = self.compute
        if compute.dtype and compute.attention != "auto":
            return compute
        return resolve_compute(self.config, compute)

    def trunk(self, tokens_BT: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """Computes the hidden states after the final norm and before the head.

        Call this under `jax.set_mesh`.

        Args:
          tokens_BT: The int32 ids of the tokens. B must be divisible by the number of batch shards, data x fsdp.
          real: Which tokens may be attended to: None for all tokens, a mask, bool (B, T), or the number of real tokens
            at the start of each row, int32 (B,).

        Returns:
          The hidden states (B, T, D) in the compute dtype.
        """
        compute, config = self.resolved_compute(), self.config
        rope = rope_table(tokens_BT.shape[1], config.head_width, config.rope_theta, config.rope_scaling)
        x_BTD = embed(self.embedding[...], tokens_BT, jnp.dtype(compute.dtype))

        def layer(x_BTD, block):
            return block(x_BTD, rope, real, config, compute), None

        unroll = compute.unroll or config.layers
        if (policy := remat_policy(compute, config.lora.rank)) is not None:
            # Where the layers are not a loop, the compiler would find that the backward pass computes the same again.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=unroll >= config.layers)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, self.blocks, unroll=unroll)
        return rms_norm(x_BTD, self.final_norm[...], config.norm_eps)

    def head_weight(self) -> jax.Array:
        """Returns the output matrix (D, V) in fp32, which is the transposed embedding if the embeddings are tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Returns the fp32 logits (B, T, V) of the hidden states that `trunk` has returned."""
        weight = jax.reshard(self.head_weight().astype(h_BTD.dtype), P(None, "tensor"))
        return jnp.einsum(
            "btd,dv->btv", h_BTD, weight, preferred_element_type=jnp.float32, out_sharding=mesh.LOGITS_BTV
        )

    def __call__(self, tokens_BT: jax.Array, padding_mask_BT: jax.Array | None = None) -> jax.Array:
        """Computes the logits of every position with a compiled function; no mesh needs to be set.

        This is meant for notebooks and tests and not for training, because every device gets the whole array of logits.

        Args:
          tokens_BT: The int32 ids of the tokens, with MASK for unknown tokens; a causal model knows no MASK.
          padding_mask_BT: A bool mask, True for real tokens; padding is not attended to. None means that all tokens are
            real.

        Returns:
          The fp32 logits (B, T, V).
        """
        with mesh.mesh_of(self.embedding[...]):
            return _forward(self, *mesh.place_rows(tokens_BT, padding_mask_BT), rows=len(tokens_BT))


@functools.partial(jax.jit, static_argnames="rows")
def _forward(model: Transformer, tokens_BT, padding_mask_BT, rows: int):
    # The result is replicated, so that a notebook can index it like any other array.
    return jax.reshard(model.logits(model.trunk(tokens_BT, padding_mask_BT)), P(None, None, None))[:rows]


@jax.named_scope("embedding")
def embed(embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows of the embedding table for the ids of the tokens, (B, T, D) in `dtype`.

    The table itself is not transferred between devices. Each fsdp shard looks up its slice of D for the ids of all fsdp
    shards; then the shards exchange slices of D for slices of B. This transfers less data than gathering the table. It
    also sums the gradient of the table in fp32 on the devices that hold it; the precision matters, because half of all
    ids are MASK and share one row.
    """

    def local(table_VD, ids_BT):
        ids_BT = jax.lax.all_gather(ids_BT, "fsdp", axis=0, tiled=True)
        first = jax.lax.axis_index("tensor") * table_VD.shape[0]
        here = (ids_BT >= first) & (ids_BT < first + table_VD.shape[0])
        x_BTD = table_VD[jnp.where(here, ids_BT - first, 0)] * here[..., None]
        x_BTD = jax.lax.psum(x_BTD.astype(dtype), "tensor")
        return jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    specs = (mesh.PARAMETERS["embedding"], mesh.TOKENS_BT)
    return jax.shard_map(local, in_specs=specs, out_specs=mesh.HIDDEN_BTD)(embedding_VD, tokens_BT)


def split(model: Transformer) -> tuple[nnx.GraphDef, dict]:
    """Splits the model into its static part and its parameters, which are nested dicts of arrays."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: dict) -> Transformer:
    """Undoes `split`. The parameters may be traced or abstract, and their dtype may be another one."""
    return nnx.merge(graphdef, params)


def abstract_model(config: ModelConfig, compute: ComputeConfig) -> Transformer:
    """Returns the model with jax.ShapeDtypeStruct leaves; under `jax.set_mesh` these have their shardings."""
    return jax.eval_shape(lambda: Transformer(config, compute, jax.random.key(0)))


def initialise(config: ModelConfig, compute: ComputeConfig, key: jax.Array) -> Transformer:
    """Returns a newly initialised model, sharded over the mesh in use. Its values are the same on any mesh."""
    return jax.jit(Transformer, static_argnums=(0, 1))(config, compute, key)


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters of a model, without allocating any parameters."""
    with mesh.without_devices():
        leaves = jax.tree.leaves(abstract_model(config, ComputeConfig()))
    return sum(leaf.size for leaf in leaves)
