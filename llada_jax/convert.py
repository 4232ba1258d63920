"""Converts a model between formats: python -m llada_jax.convert --input=DIR --output=DIR --format=huggingface|orbax

The input is a training workdir, a published folder, or a folder that this program wrote. The output is a published
folder (huggingface), or a workdir that holds only weights (orbax), for --model=DIR and --config.init_from=DIR. No bit
of a weight changes unless --dtype asks for it. The program runs on the host, which needs memory for all parameters:
once if it converts a published folder to a published folder, and up to twice if Orbax reads or writes the parameters
(float16 and mixed weights are float32 in between).
"""

import math
import sys

from absl import flags

from llada_jax.cli import entry_point, paths
from llada_jax.config import UserError
from llada_jax.formats import FORMATS

_INPUT = paths.define("input", None, "A training workdir, a published folder, or a folder that convert wrote.")
_OUTPUT = paths.define("output", None, "The folder to write. It must be new or empty.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "The format to write.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint of a workdir. Default: the newest.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "The dtype of the weights. Default: unchanged.")
_NAMING = flags.DEFINE_enum(
    "naming", None, ["llada", "llama"], "The naming of the tensors. Default: the naming of the input, or llada."
)
_SHARD_GB = flags.DEFINE_float(
    "shard_gb", 5.0, "The largest size of the tensors in one file, in gigabytes (10^9 bytes)."
)


def main() -> None:
    """Converts as the flags say."""
    for flag in (_INPUT, _OUTPUT, _FORMAT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: --input=DIR, --output=DIR and --format are needed")
    if not 1e-9 <= _SHARD_GB.value < math.inf:
        raise UserError(f"--shard_gb={_SHARD_GB.value}: a positive number of gigabytes is needed")
    with entry_point.importing():
        import jax

        from llada_jax.formats.conversion import convert

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and the host has more memory than one device
    convert(
        _INPUT.value,
        _OUTPUT.value,
        _FORMAT.value,
        step=_STEP.value,
        dtype=_DTYPE.value,
        naming=_NAMING.value,
        shard_bytes=int(_SHARD_GB.value * 10**9),
        progress=True,
    )
    print(f"{_OUTPUT.value} is written", file=sys.stderr)


if __name__ == "__main__":
    entry_point.run(main)
