"""Attention: the function `attention`, the kernels that it calls, and a plain reference.

Every real token attends to every real token of its row; with `causal`, to itself and to the real tokens before it. The
argument `real` says which keys are real tokens. It has one of three forms, and is never a (T, S) mask:

  None         all keys are real;
  bool (B, S)  True where a key is real;
  int32 (B,)   the number of real keys of each row, which are the first keys of the row.

The letters in names are those of transformer.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llada_jax.config import UserError
from llada_jax.devices import mesh
from llada_jax.model.cpu import MASKED_OUT, ROTATED_NAME, SAVED_NAME, cpu_attention, real_mask


@jax.named_scope("attention")
def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    *,
    kernel: str = "xla",
    query_chunk: int = 512,
    causal: bool = False,
) -> jax.Array:
    """Computes softmax(q k^T / sqrt(K)) v, where each group of H / G query heads shares one key/value head.

    Args:
      q_BTHK: The queries, of any float dtype, sharded over batch and heads.
      k_BSGK: The keys, of the same dtype. H must be divisible by G.
      v_BSGK: The values, of the same dtype.
      real: Which keys may be attended to; see the docstring of this module. Its rows are split like those of the
        queries.
      kernel: A name in KERNELS, as returned by `choose_kernel`.
      query_chunk: The number of queries per chunk of the xla kernel.
      causal: Whether query i attends to the keys 0 to i only; T and S must be equal. The outputs of queries that are
        not real themselves mean nothing then: they may attend to nothing.

    Returns:
      The outputs (B, T, H, K) in the dtype of q. Softmax and accumulation are computed in fp32.

    Raises:
      UserError: If there is no kernel of this name.
    """
    if kernel not in KERNELS:
        raise UserError(f"config.compute.attention={kernel!r}: choose one of {', '.join(CHOICES)}")
    assert not causal or q_BTHK.shape[1] == k_BSGK.shape[1], "causal attention has as many queries as keys"
    run = functools.partial(KERNELS[kernel], causal=causal)
    if kernel == "xla":
        run = functools.partial(run, query_chunk=query_chunk)
    heads = mesh.HEADS_BTHK
    if real is None:
        run, inputs, specs = functools.partial(run, real=None), (q_BTHK, k_BSGK, v_BSGK), (heads,) * 3
    else:
        inputs = (q_BTHK, k_BSGK, v_BSGK, real)
        specs = (heads, heads, heads, P(mesh.BATCH, *(None,) * (real.ndim - 1)))
    # check_vma is off because kernels do not say how their outputs vary over the mesh. The check would also add
    # reductions of gradients, but none is needed: no float array is replicated over a mesh axis here.
    out_BTHK = jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)
    # The other kernels name what their backward passes need themselves. Another name would keep the output twice.
    return checkpoint_name(out_BTHK, SAVED_NAME) if kernel in ("xla", "reference") else out_BTHK


def choose_kernel(name: str, dtype: jnp.dtype, head_width: int, device: jax.Device, deterministic: bool = False) -> str:
    """Returns the kernel that config.compute.attention means on this kind of device. It is chosen once per run.

    "auto" means the first of these kernels that can run: splash (on TPU), cuDNN's flash attention (on GPU), the kernel
    for CPUs, xla. If a kernel is named explicitly, no other kernel silently takes its place.

    Args:
      name: The value of config.compute.attention, a name in CHOICES.
      dtype: The dtype of queries, keys and values.
      head_width: K, the width of one head.
      device: A device of the kind that the attention runs on.
      deterministic: The value of config.compute.deterministic.

    Returns:
      A name in KERNELS.

    Raises:
      UserError: If there is no kernel of this name, or if it cannot run on this kind of device.
    """
    if name not in CHOICES:
        raise UserError(f"config.compute.attention={name!r}: choose one of {', '.join(CHOICES)}")
    if name == "auto":
        order = ("splash", "cudnn", "cpu", "xla")
        return next(kernel for kernel in order if _obstacle(kernel, dtype, head_width, device, deterministic) is None)
    if obstacle := _obstacle(name, dtype, head_width, device, deterministic):
        raise UserError(f"config.compute.attention={name}: {obstacle}; 'auto' chooses a kernel that runs here")
    return name


def _obstacle(name: str, dtype: jnp.dtype, head_width: int, device: jax.Device, deterministic: bool) -> str | None:
    """Returns the reason why a kernel cannot run on this kind of device, or None if it can."""
    home = {"splash": "tpu", "cudnn": "gpu", "cpu": "cpu"}.get(name, device.platform)
    if device.platform != home:
        return f"this kernel runs on {home}, but the device is {device.platform}"
    if name != "cudnn":
        return None
    if deterministic:
        # Seen with JAX 0.11.2 on an H200: IndexError: absl::container_internal::raw_hash_map<>::at.
        return "XLA fails on it with config.compute.deterministic"
    # A device that is only described (by llada_jax.plan) has no compute_capability. That of an AMD GPU is not a number.
    capability = str(getattr(device, "compute_capability", None) or "9.0")
    if not capability.replace(".", "", 1).isdigit() or float(capability) < 8.0:
        return f"cuDNN attention needs compute capability 8.0 or higher, but this device has {capability}"
    if dtype != jnp.bfloat16:
        return "cuDNN attention computes in bfloat16: set --config.compute.dtype=bfloat16"
    if head_width % 8 or head_width > 128:
        return (
            "cuDNN attention needs a head width that is a multiple of 8 and at most 128, "
            f"but these heads have a width of {head_width}"
        )
    return None


def reference_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    *,
    causal: bool = False,
    first: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Computes attention as it is defined, on one device, with all (T, S) scores in memory; see `attention`.

    `first` is the position of the first query, which matters with `causal` only.
    """
    batch, length, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    if real is not None:
        scores = jnp.where(real_mask(real, k_BSGK.shape[1])[:, None, None, None, :], scores, MASKED_OUT)
    if causal:
        seen_TS = jnp.arange(k_BSGK.shape[1]) <= first + jnp.arange(length)[:, None]
        scores = jnp.where(seen_TS, scores, MASKED_OUT)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v_BSGK, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, width).astype(q_BTHK.dtype)


def xla_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    *,
    query_chunk: int,
    causal: bool = False,
) -> jax.Array:
    """Computes `reference_attention` in chunks of queries: it holds (query_chunk, S) scores at a time, never (T, S)."""
    length = q_BTHK.shape[1]
    if length <= query_chunk:
        return reference_attention(q_BTHK, k_BSGK, v_BSGK, real, causal=causal)
    chunks = -(-length // query_chunk)
    padding = chunks * query_chunk - length
    q_BTHK = jnp.pad(q_BTHK, ((0, 0), (0, padding), (0, 0), (0, 0)))
    batch, _, heads, width = q_BTHK.shape
    q_chunks = q_BTHK.reshape(batch, chunks, query_chunk, heads, width).swapaxes(0, 1)

    # Without jax.checkpoint the scores of every chunk, (T, S) in all, would be kept for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(first, q):
        if not causal:
            return None, reference_attention(q, k_BSGK, v_BSGK, real)
        return first + query_chunk, reference_attention(q, k_BSGK, v_BSGK, real, causal=True, first=first)

    _, out = jax.lax.scan(one_chunk, jnp.int32(0) if causal else None, q_chunks)
    return out.swapaxes(0, 1).reshape(batch, chunks * query_chunk, heads, width)[:, :length]


def cudnn_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None, *, causal: bool = False
) -> jax.Array:
    """Computes attention with cuDNN's flash attention.

    cuDNN takes only the number of real keys per row. Therefore the real keys of each row are moved to the start of it.
    JAX refuses odd lengths, so these get one more query, whose output is dropped, and one more key that is not real.
    """
    length, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    order_BS = None
    if real is not None and real.ndim == 2:
        # The order of the keys does not matter to full attention, because RoPE has already encoded their positions.
        order_BS = jnp.argsort(~real, axis=1, stable=True)
        k_BSGK, v_BSGK = (jnp.take_along_axis(x, order_BS[:, :, None, None], axis=1) for x in (k_BSGK, v_BSGK))
        if causal:  # The queries move with their keys, so that the real tokens keep their order.
            q_BTHK = jnp.take_along_axis(q_BTHK, order_BS[:, :, None, None], axis=1)
        real = real.sum(axis=1, dtype=jnp.int32)
    if keys % 2 and real is None:
        real = jnp.full(k_BSGK.shape[0], keys, jnp.int32)
    q_BTHK, k_BSGK, v_BSGK = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BTHK, k_BSGK, v_BSGK)
    )
    # This call also scales the scores by 1 / sqrt(K).
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, key_value_seq_lengths=real, is_causal=causal, implementation="cudnn"
    )
    if causal and order_BS is not None:
        back_BT = jnp.argsort(order_BS, axis=1)
        return jnp.take_along_axis(out_BTHK, back_BT[:, :, None, None], axis=1)
    return out_BTHK[:, :length]


def splash_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    *,
    interpret: bool = False,
    causal: bool = False,
) -> jax.Array:
    """Computes attention with the flash attention for TPUs, which holds scores only in blocks.

    The kernel takes segment ids to tell real keys (segment 1) from padding (segment 0). T and S are padded to a
    multiple of 128; the added keys are in segment 0.

    Args:
      q_BTHK: The queries; see `attention` for this and the next three.
      k_BSGK: The keys.
      v_BSGK: The values.
      real: Which keys may be attended to.
      interpret: Whether to interpret the kernel, which works on any device but is slow.
      causal: Whether query i attends to the keys 0 to i only. Blocks of scores that no query needs are not computed.

    Returns:
      The outputs (B, T, H, K) in the dtype of q.
    """
    # This import takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q_BTHK.shape[1:]
    keys = k_BSGK.shape[1]
    if keys % LANES and real is None:
        real = jnp.full(k_BSGK.shape[0], keys, jnp.int32)

    def laid_out(x):  # (B, T, H, K) -> (B, H, padded T, K)
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)))

    q = laid_out((q_BTHK.astype(jnp.float32) * width**-0.5).astype(q_BTHK.dtype))
    k, v = laid_out(k_BSGK), laid_out(v_BSGK)
    # Where rotated queries and keys are kept, these are: the backward pass needs no others.
    q, k = checkpoint_name(q, ROTATED_NAME), checkpoint_name(k, ROTATED_NAME)
    q_block, kv_block = _block(q.shape[2]), _block(k.shape[2])
    # Keys whose gradients a TPU with 16 MiB of vector memory holds: 4096 in bfloat16 if heads are up to 128 wide. Wider
    # heads need more memory for queries too.
    fitting = 4096 // (-(-width // LANES)) ** 2 * 2 // k.itemsize
    mask = (splash.CausalMask if causal else splash.FullMask)((q.shape[2], k.shape[2]))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_kv_compute=kv_block,
            block_q_dkv=q_block,
            # The kernel returns the gradient of q once for each of these blocks, to be summed: one block is best.
            block_kv_dkv=_block(k.shape[2], max(kv_block, fitting), kv_block),
            block_kv_dkv_compute=kv_block,
            use_fused_bwd_kernel=True,  # the backward pass goes over the scores once, not twice
        ),
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
    segments = None
    if real is not None:
        real = jnp.pad(real_mask(real, keys), ((0, 0), (0, -keys % LANES))).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kv=real)
    out = jax.vmap(kernel)(q, k, v, segments)
    return out[:, :, :length].swapaxes(1, 2).astype(q_BTHK.dtype)


LANES = 128  # lanes of a TPU's vector unit; the block sizes of splash attention are multiples of this number


def _block(length: int, most: int = 512, multiple_of: int = LANES) -> int:
    """Returns the largest block size up to `most` that divides `length`, and that is a multiple of `multiple_of`."""
    return next(block for block in range(most - most % multiple_of, 0, -multiple_of) if length % block == 0)


KERNELS = {
    "xla": xla_attention,
    "reference": reference_attention,
    "cpu": cpu_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "splash_interpreted": functools.partial(splash_attention, interpret=True),  # for tests without a TPU
}
CHOICES = ("auto", *KERNELS)
