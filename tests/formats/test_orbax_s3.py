"""Tests what Orbax is taught about s3://, as far as no bucket is needed."""

import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils

from llada_jax.formats import orbax_s3


@pytest.fixture(autouse=True)
def taught():
    orbax_s3.prepare("s3://bucket/run")


@pytest.mark.parametrize("wrap", [lambda base: base, lambda base: {"driver": "kvstack", "layers": [{"base": base}]}])
def test_files_are_as_large_as_in_gs(wrap):
    size = {}
    for kind in ("s3", "gs", ""):
        folder = f"{kind}://bucket/run" if kind else "/run"
        base = tensorstore_utils.build_kvstore_tspec(folder, "x")["base"]
        size[kind] = tensorstore_utils._get_backend_ocdbt_target_data_file_size({"base": wrap(base)})
    assert size == {"s3": 400 << 20, "gs": 400 << 20, "": 2 << 30}
