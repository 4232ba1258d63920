"""A published model to be changed."""

import shutil

import pytest
from paths import PARITY


@pytest.fixture
def folder(tmp_path):
    """A copy of the GQA model, to be changed."""
    shutil.copytree(PARITY / "gqa", tmp_path / "model")
    return tmp_path / "model"
