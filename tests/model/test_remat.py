"""Tests of what the backward pass keeps of the layers, and what it computes again."""

import jax
import jax.numpy as jnp
import pytest

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model import transformer as models
from llada_jax.model.compute import remat_policy
from llada_jax.model.transformer import merge, split

CONFIG = ModelConfig(layers=2, width=32, heads=8, kv_heads=8, feed_forward=48, vocab_size=64, mask_id=63)
B, T = 4, 10


def test_full_remat_keeps_less_than_none():
    """With full remat, the forward pass keeps less for the backward pass than without remat."""

    def kept(remat):
        compute = ComputeConfig(dtype="float32", remat=remat)
        with jax.set_mesh(mesh.one_device_mesh()):
            graphdef, params = split(models.abstract_model(CONFIG, compute))
            tokens = jax.ShapeDtypeStruct((B, 64), jnp.int32)
            run = jax.jit(jax.grad(lambda p, t: merge(graphdef, p).trunk(*mesh.place_rows(t)).sum()))
            return run.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert kept("full") < kept("none")


@pytest.mark.parametrize("kernel", ["cpu", "xla", "splash_interpreted"])
@pytest.mark.parametrize("remat", ["attention", "rotated", "dots"])
def test_what_attention_needs_is_kept_once(kernel, remat):
    compute = ComputeConfig(dtype="float32", remat=remat, attention=kernel, query_chunk=4)
    with jax.set_mesh(mesh.one_device_mesh()):
        graphdef, params = split(models.abstract_model(CONFIG, compute))
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
        run = lambda p, t: merge(graphdef, p).trunk(*mesh.place_rows(t))  # noqa: E731
        kept = jax.tree.leaves(jax.eval_shape(lambda p, t: jax.vjp(lambda p: run(p, t), p)[1], params, tokens))
    heads = [x for x in kept if x.ndim == 5 and x.shape[1] == B and x.shape[-1] == CONFIG.head_width]
    inputs = {"attention": 0, "rotated": 2, "dots": 2 if kernel == "cpu" else 3}[remat]  # queries, keys and values
    assert len(heads) == inputs + 1


def test_exchanged_halves_of_heads_are_not_kept():
    """Where the backward pass needs rotated heads, it computes them from the heads, also where products are kept."""
    policy = remat_policy(ComputeConfig(remat="dots"), 0)
    cos, sin = models.rope_table(T, CONFIG.head_width, 10_000.0)
    turn = jax.checkpoint(lambda x: jnp.sin(models.apply_rope_on_tpu(x, cos, sin)), policy=policy)
    with jax.set_mesh(mesh.one_device_mesh()):
        x = jax.ShapeDtypeStruct((B, T, CONFIG.heads, CONFIG.head_width), jnp.float32)
        kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(turn, x)[1], x))
    assert [y.shape for y in kept if y.ndim == 4] == [x.shape]  # the input alone


@pytest.mark.parametrize(("remat", "unroll", "kept_apart"), [("full", 0, True), ("full", 1, False), ("none", 0, False)])
def test_unrolled_layers_are_computed_again_too(remat, unroll, kept_apart):
    """Without a barrier, the compiler for GPUs kept everything: it saw that the same is computed twice."""
    # The projections of the kernel for CPUs have barriers of their own.
    compute = ComputeConfig(dtype="float32", attention="reference", remat=remat, unroll=unroll)
    with jax.set_mesh(mesh.one_device_mesh()):
        graphdef, params = split(models.abstract_model(CONFIG, compute))
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
        run = jax.jit(jax.grad(lambda p, t: merge(graphdef, p).trunk(*mesh.place_rows(t)).sum()))
        assert ("optimization_barrier" in run.lower(params, tokens).as_text()) == kept_apart
