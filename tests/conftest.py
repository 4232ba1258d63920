"""Tests run on 8 simulated CPU devices and share one compilation cache."""

import os
import tempfile

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "llada_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest

from llada_jax import mesh


@pytest.fixture(scope="session")
def make_mesh():
    """make_mesh(data, fsdp, tensor): a mesh over the first devices."""

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
        devices = jax.devices()[: data * fsdp * tensor]
        return mesh.mesh_over((data, fsdp, tensor), devices)

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
