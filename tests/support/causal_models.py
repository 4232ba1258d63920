"""The causal models of `parity_ar` as fixtures, with what transformers computes with them."""

import numpy as np
import pytest
from paths import PARITY_AR

import llada_jax


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3"])
def causal_case(request):
    """Returns a causal model, one of each family, and its cases. Do not change them."""
    return llada_jax.load(PARITY_AR / request.param)[0], np.load(PARITY_AR / request.param / "cases.npz")


@pytest.fixture(scope="session")
def llama():
    """Returns the causal model of Llama's family. Do not change it."""
    return llada_jax.load(PARITY_AR / "llama")[0]
