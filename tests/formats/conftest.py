"""Fixtures that the tests of the formats share."""

import shutil

import pytest
from paths import PARITY


@pytest.fixture
def folder(tmp_path):
    """Returns a copy of the published model with grouped-query attention, which the test may change."""
    shutil.copytree(PARITY / "gqa", tmp_path / "model")
    return tmp_path / "model"
