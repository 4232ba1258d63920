"""Lets Orbax write checkpoints to s3://. Of its own it writes to gs:// alone, though all it needs is there.

Orbax writes arrays by TensorStore and small files by etils.epath, and both know s3://. But Orbax (0.12.8) asks in five
places whether an address is in gs://: when it names the bucket for TensorStore, when it keeps the two slashes of an
address, when it chooses the size of the files with arrays (400 MiB in place of 2 GiB), and when it decides whether a
checkpoint becomes complete by a rename or by an object that is written last, and how it is removed. `prepare` replaces
these five functions by ones that treat s3:// alike, and only in a process that uses such an address.
"""

import functools
import os
from typing import Any

from llada_jax.config import UserError
from llada_jax.storage import addresses


def prepare(path: str | os.PathLike) -> None:
    """Prepares Orbax for checkpoints at an address. Call this before Orbax is told the address.

    Raises:
      UserError: If it is in s3://, and this version of Orbax does not have the functions that are replaced.
    """
    if addresses.parse(path).kind == "s3" and not _teach():
        import orbax.checkpoint as ocp

        raise UserError(f"{path}: checkpoints cannot be in s3:// with Orbax {ocp.__version__}: install Orbax 0.12.8")


def _is_s3(path: Any) -> bool:
    return os.fspath(path).startswith("s3:/")


@functools.cache
def _teach() -> bool:
    """Replaces Orbax's functions. Returns False if there are none, or if that has not the wanted effect."""
    try:
        from etils import epath
        from orbax.checkpoint._src.path import atomicity_defaults, gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        is_gcs, spec_of = gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs
        uses_driver, normalised = tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path
        size_of = tensorstore_utils._get_backend_ocdbt_target_data_file_size
        default = atomicity_defaults.get_default_temporary_path_class
        gcs_utils.is_gcs_path = lambda path: _is_s3(path) or is_gcs(path)
        gcs_utils.get_kvstore_for_gcs = lambda path: _spec(path) if _is_s3(path) else spec_of(path)
        tensorstore_utils._use_gcs_driver = lambda path: _is_s3(path) or uses_driver(path)
        tensorstore_utils._normalize_path = lambda path: normalised(path).replace("s3:/", "s3://")
        tensorstore_utils._get_backend_ocdbt_target_data_file_size = lambda spec: size_of(_like_gcs(spec))
        made, like = (tensorstore_utils.build_kvstore_tspec(f"{kind}://bucket/folder", "x") for kind in ("s3", "gs"))
        size = tensorstore_utils._get_backend_ocdbt_target_data_file_size
        same = default(epath.Path("s3://b/x")) is default(epath.Path("gs://b/x")) and size(made) == size(like)
        return made["base"] == _spec("s3://bucket/folder") and same
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return False


def _spec(path: Any) -> dict[str, Any]:
    kind, bucket, name = addresses.parse(path)
    return addresses.spec(kind, bucket) | {"path": name}


def _like_gcs(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns a description of a checkpoint in s3:// as one in gs://, for the function that chooses a size by it."""
    base = (spec or {}).get("base")
    return {"base": {"driver": "gcs"}} if isinstance(base, dict) and base.get("driver") == "s3" else spec
