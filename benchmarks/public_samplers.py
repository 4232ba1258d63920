"""Compares the sampler with that of another public JAX code: python benchmarks/public_samplers.py --bonsai=CHECKOUT

CHECKOUT is a folder with the public repository jax-ml/bonsai, whose bonsai/models/llada has a sampler for LLaDA; it
needs `pip install jaxtyping tqdm`. Both get the same weights (8 layers of width 512, V 32,000 by default), prompts and
settings, in fp32. They run in turns. Prints one JSON line with the medians of the seconds of a call, the median of the
ratios and the share of equal tokens. Compilation is not counted.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import llada_jax
from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer, initialise, split

MASK = 5


def bonsai_model(checkout: str, model: Transformer):
    """Returns bonsai's module, and its model with the weights of ours."""
    sys.path.insert(0, checkout)
    from bonsai.models.llada import modeling

    c = model.config
    config = modeling.ModelConfig(
        dtype=jnp.float32,
        d_model=c.width,
        n_heads=c.heads,
        n_kv_heads=c.kv_heads,
        n_layers=c.layers,
        embedding_dropout=0.0,
        max_sequence_length=4096,
        rope_theta=c.rope_theta,
        include_qkv_bias=False,
        include_bias=False,
        vocab_size=c.vocab_size,
        embedding_size=c.vocab_size,
        mlp_hidden_size=c.feed_forward,
        shd_cfg=modeling.ShardingConfig.no_sharding(),
        return_hidden_states=False,
        rms_norm_eps=c.norm_eps,
    )
    other = modeling.LLaDAModel(config, rngs=nnx.Rngs(0))
    params = jax.tree.map(np.asarray, split(model)[1])
    other.wte.embedding[...] = jnp.asarray(params["embedding"])
    other.ln_f.weight[...] = jnp.asarray(params["final_norm"])
    other.ff_out.kernel[...] = jnp.asarray(params["head"])
    for i, block in enumerate(other.blocks):
        for name, stacked in params["blocks"].items():
            if name.endswith("_norm"):
                getattr(block, name).weight[...] = jnp.asarray(stacked[i])
            else:
                kernel = getattr(block, name).kernel
                kernel[...] = jnp.asarray(stacked[i].reshape(kernel.shape))
    return modeling, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bonsai", required=True, help="the folder of a checkout of jax-ml/bonsai")
    sizes = {"layers": 8, "width": 512, "heads": 8, "feed_forward": 1536, "vocab_size": 32_000}
    sizes |= {"batch_size": 1, "prompt_length": 448, "gen_length": 64, "steps": 32, "block_length": 32, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    fields = {name: getattr(args, name) for name in ("layers", "width", "heads", "feed_forward", "vocab_size")}
    config = ModelConfig(**fields, kv_heads=args.heads, mask_id=MASK)
    with jax.set_mesh(mesh.mesh_over((1, 1, 1), jax.devices()[:1])):
        model = initialise(config, ComputeConfig(dtype="float32", unroll=1), jax.random.key(0))
    prompt_BT = np.random.default_rng(0).integers(MASK + 1, args.vocab_size, (args.batch_size, args.prompt_length))
    grid = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(grid):
        modeling, other = bonsai_model(args.bonsai, model)
    settings = {name: getattr(args, name) for name in ("steps", "gen_length", "block_length")}

    def ours() -> np.ndarray:
        return np.asarray(llada_jax.generate(model, prompt_BT, SamplerConfig(**settings), jax.random.key(0)))

    def theirs() -> np.ndarray:
        with jax.set_mesh(grid):
            real_BT = jnp.ones(prompt_BT.shape, bool)
            return np.asarray(modeling.generate(other, jnp.asarray(prompt_BT), real_BT, **settings, mask_id=MASK))

    same = float(np.mean(ours()[:, args.prompt_length :] == theirs()[:, args.prompt_length :]))
    seconds = {"ours": [], "bonsai": []}
    for _ in range(args.rounds):
        for name, run in (("ours", ours), ("bonsai", theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    line = {"benchmark": "public_samplers", "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    line |= {"seconds": {name: statistics.median(times) for name, times in seconds.items()}, "same_tokens": same}
    print(json.dumps(line | vars(args) | {"jax": jax.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
