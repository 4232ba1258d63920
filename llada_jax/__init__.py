"""Train and sample LLaDA, a masked diffusion language model (arXiv 2502.09992), in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llada_jax.config import SamplerConfig
    from llada_jax.loading import load
    from llada_jax.sampling.sampler import generate
    from llada_jax.sampling.warming import pad, warm_up
    from llada_jax.scoring.likelihood import log_likelihood

__all__ = ["SamplerConfig", "generate", "load", "log_likelihood", "pad", "warm_up"]

# These are imported on first use, so that a process that only tokenises does not wait for the import of jax.
_HOME = {
    "SamplerConfig": "llada_jax.config",
    "generate": "llada_jax.sampling.sampler",
    "load": "llada_jax.loading",
    "log_likelihood": "llada_jax.scoring.likelihood",
    "pad": "llada_jax.sampling.warming",
    "warm_up": "llada_jax.sampling.warming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llada_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
