"""The flags that name the model of a command."""

from absl import flags

from llada_jax.cli import paths
from llada_jax.config import UserError

_MODEL = paths.define("model", None, "A training workdir, or a folder with a published model.")
STEP = flags.DEFINE_integer("step", None, "The checkpoint of the workdir. Default: the newest.")
WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["int8"],
    "int8: the matrices of the layers are kept as 8-bit integers, in half the memory of bfloat16, and the model's "
    "output changes a little. Default: they keep the dtype of the computation.",
)


def model() -> str:
    """Returns the value of --model. Raises UserError if it is missing."""
    if not _MODEL.value:
        raise UserError("--model=DIR is missing: pass a training workdir, or a folder with a published model")
    return _MODEL.value
