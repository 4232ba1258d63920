"""All tests run on 8 simulated CPU devices and share one compilation cache."""

import os
import shutil
import tempfile
from pathlib import Path

# These variables must be set before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "llada_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from typing import NamedTuple

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer, initialise
from llada_jax.text.tokenizer import Tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # otherwise a GPU would compute fp32 matmuls in TF32


@pytest.fixture(scope="session")
def make_mesh():
    """Returns make_mesh(data, fsdp, tensor), which makes a mesh over the first devices."""

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
        devices = jax.devices()[: data * fsdp * tensor]
        if len(devices) < data * fsdp * tensor:
            pytest.skip(f"a mesh of {data} x {fsdp} x {tensor} needs more than the {len(devices)} devices here")
        return mesh.mesh_over((data, fsdp, tensor), devices)

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Toy(NamedTuple):
    """A model and a text so small that every way of masking the text can be enumerated."""

    config: ModelConfig
    compute: ComputeConfig
    model: Transformer
    x_0: np.ndarray  # int32 (6,)
    # For the text's first 6 and first 3 tokens: float64 (2**length, length). Row r, column i is the nll of token i if
    # the positions whose bits are set in r are masked.
    nll: dict[int, np.ndarray]


@pytest.fixture(scope="session")
def toy(make_mesh) -> Toy:
    config = ModelConfig(layers=2, width=16, heads=2, kv_heads=2, feed_forward=32, vocab_size=16, mask_id=15)
    compute = ComputeConfig(dtype="float32", unroll=0, loss_chunk=64)
    with jax.set_mesh(make_mesh()):
        model = initialise(config, compute, jax.random.key(3))
    x_0 = np.array([3, 1, 4, 1, 5, 9], np.int32)
    nll = {}
    for length in (6, 3):
        # The model sees only the first `length` tokens, without any padding.
        masked = (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1
        logits = np.asarray(model(np.where(masked, config.mask_id, x_0[:length]).astype(np.int32)), np.float64)
        log_z = np.log(np.exp(logits).sum(axis=-1))
        nll[length] = log_z - logits[:, np.arange(length), x_0[:length]]
        # The nll must depend on what else is masked, or the tests would test nothing.
        assert nll[length].std(axis=0).min() > 0.01
    return Toy(config, compute, model, x_0, nll)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Returns the folder of a published model with random weights and a tokenizer of 400 tokens. Do not change it."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    shutil.copytree(Path(__file__).parent / "parity" / "gqa", folder)
    train_tokenizer([Path(__file__).read_text()], 400, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder) -> tuple[Transformer, Tokenizer]:
    """Returns the model and the tokenizer loaded from `model_folder`."""
    return llada_jax.load(model_folder)
