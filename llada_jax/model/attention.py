"""Bidirectional attention: one front, `attention`, kernels behind it, and one plain reference.

There is no causal mask: every real token attends to every real token of its row. Which keys are real is
said by `real`: None (all of them), bool (B, S), or int32 (B,), the number of them at the start of each row;
never by a (T, S) mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.config import UserError
from llada_jax.devices import mesh
from llada_jax.model.cpu import MASKED_OUT, SAVED_NAME, cpu_attention, real_mask


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    *,
    kernel: str = "xla",
    query_chunk: int = 512,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, each group of H / G query heads sharing one key/value head.

    Args:
      q_BTHK: queries, any float dtype, sharded over batch and heads.
      k_BSGK, v_BSGK: keys and values of the same dtype, H divisible by G.
      real: which keys may be attended to, see the module's docstring; rows split like the queries'.
      kernel: a name in KERNELS, as `choose_kernel` gives it.
      query_chunk: queries per chunk of the xla kernel.

    Returns:
      (B, T, H, K) in the dtype of q; softmax and accumulation are fp32.

    Raises:
      UserError: no such kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"config.compute.attention={kernel!r}: choose one of {', '.join(CHOICES)}")
    run = KERNELS[kernel]
    if kernel == "xla":
        run = functools.partial(run, query_chunk=query_chunk)
    heads = mesh.HEADS_BTHK
    if real is None:
        run, inputs, specs = functools.partial(run, real=None), (q_BTHK, k_BSGK, v_BSGK), (heads,) * 3
    else:
        inputs = (q_BTHK, k_BSGK, v_BSGK, real)
        specs = (heads, heads, heads, P(mesh.BATCH, *(None,) * (real.ndim - 1)))
    # Without the check, as kernels do not say how their outputs vary over the mesh. Nothing float is
    # replicated over an axis here, so gradients need no reduction that the check would add.
    return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)


def choose_kernel(name: str, dtype: jnp.dtype, head_width: int, device: jax.Device) -> str:
    """The kernel that config.compute.attention means on this kind of device, decided once per run.

    "auto" is the first that can run of: splash (TPU), cuDNN's flash attention (GPU), the CPU's own, xla.

    Raises:
      UserError: no such kernel, or it cannot run here. There is no silent fall-back to a dense one.
    """
    if name not in CHOICES:
        raise UserError(f"config.compute.attention={name!r}: choose one of {', '.join(CHOICES)}")
    if name == "auto":
        order = ("splash", "cudnn", "cpu", "xla")
        return next(kernel for kernel in order if _obstacle(kernel, dtype, head_width, device) is None)
    if obstacle := _obstacle(name, dtype, head_width, device):
        raise UserError(f"config.compute.attention={name}: {obstacle}; 'auto' takes what runs here")
    return name


def _obstacle(name: str, dtype: jnp.dtype, head_width: int, device: jax.Device) -> str | None:
    """Why a kernel cannot run on this kind of device; None if it can."""
    home = {"splash": "tpu", "cudnn": "gpu", "cpu": "cpu"}.get(name, device.platform)
    if device.platform != home:
        return f"it runs on {home}, this is {device.platform}"
    if name != "cudnn":
        return None
    # A device that is only described (llada_jax.plan) has no capability to ask for; AMD's are no numbers.
    capability = str(getattr(device, "compute_capability", None) or "9.0")
    if not capability.replace(".", "", 1).isdigit() or float(capability) < 8.0:
        return f"cuDNN attention needs compute capability 8.0, this device has {capability}"
    if dtype != jnp.bfloat16:
        return "cuDNN attention computes in bfloat16: set --config.compute.dtype=bfloat16"
    if head_width % 8 or head_width > 128:
        return f"cuDNN attention takes heads of up to 128 in steps of 8, these have a width of {head_width}"
    return None


def reference_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None) -> jax.Array:
    """The definition, with all (T, S) scores in memory. On one device; see `attention`."""
    batch, length, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    if real is not None:
        scores = jnp.where(real_mask(real, k_BSGK.shape[1])[:, None, None, None, :], scores, MASKED_OUT)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v_BSGK, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, width).astype(q_BTHK.dtype)


def xla_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None, *, query_chunk: int
) -> jax.Array:
    """`reference_attention` over chunks of queries: (query_chunk, S) scores at a time, never (T, S)."""
    length = q_BTHK.shape[1]
    if length <= query_chunk:
        return reference_attention(q_BTHK, k_BSGK, v_BSGK, real)
    chunks = -(-length // query_chunk)
    padding = chunks * query_chunk - length
    q_BTHK = jnp.pad(q_BTHK, ((0, 0), (0, padding), (0, 0), (0, 0)))
    batch, _, heads, width = q_BTHK.shape
    q_chunks = q_BTHK.reshape(batch, chunks, query_chunk, heads, width).swapaxes(0, 1)

    # Without the checkpoint the backward pass would keep every chunk's scores: (T, S) again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(carry, q):
        return carry, reference_attention(q, k_BSGK, v_BSGK, real)

    _, out = jax.lax.scan(one_chunk, None, q_chunks)
    return out.swapaxes(0, 1).reshape(batch, chunks * query_chunk, heads, width)[:, :length]


def cudnn_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention. It takes lengths only, so the real keys of each row are brought to its front."""
    if real is not None and real.ndim == 2:
        # The order of keys does not matter to full attention: they carry their positions in them already.
        order_BS = jnp.argsort(~real, axis=1, stable=True)
        k_BSGK, v_BSGK = (jnp.take_along_axis(x, order_BS[:, :, None, None], axis=1) for x in (k_BSGK, v_BSGK))
        real = real.sum(axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, key_value_seq_lengths=real, implementation="cudnn"
    )  # scaled by 1 / sqrt(K) inside


def splash_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, real: jax.Array | None, *, interpret: bool = False
) -> jax.Array:
    """TPU's flash attention: scores only ever in blocks. Padding is given by segments: 1 real, 0 not.

    T and S are filled up to a multiple of 128 with keys of segment 0. interpret: run it anywhere, slowly.
    """
    # Imported here: it takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q_BTHK.shape[1:]
    keys = k_BSGK.shape[1]
    if keys % LANES and real is None:
        real = jnp.full(k_BSGK.shape[0], keys, jnp.int32)

    def laid_out(x):  # (B, T, H, K) -> (B, H, T filled up, K)
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)))

    q = laid_out((q_BTHK.astype(jnp.float32) * width**-0.5).astype(q_BTHK.dtype))
    k, v = laid_out(k_BSGK), laid_out(v_BSGK)
    q_block, kv_block = _block(q.shape[2]), _block(k.shape[2])
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_kv_compute=kv_block,
            block_q_dkv=q_block,
            block_kv_dkv=kv_block,
            block_kv_dkv_compute=kv_block,
            use_fused_bwd_kernel=True,  # one pass over the scores in the backward pass instead of two
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


def _block(length: int) -> int:
    """The largest block up to 512 that divides a multiple of LANES."""
    return next(block for block in (512, 384, 256, LANES) if length % block == 0)


LANES = 128  # of a TPU's vector unit: the blocks of splash attention are multiples of it
KERNELS = {
    "xla": xla_attention,
    "reference": reference_attention,
    "cpu": cpu_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "splash_interpreted": functools.partial(splash_attention, interpret=True),  # for tests without a TPU
}
CHOICES = ("auto", *KERNELS)
