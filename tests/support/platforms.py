"""Marks of tests that cannot run on every kind of device."""

import os

import pytest

# JAX need not be asked, which would start its backend.
ON_CPU = pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS", "cpu") != "cpu",
    reason="the program computes in bfloat16 on accelerators, and the texts to compare with in float32",
)
