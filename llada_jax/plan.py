"""Plans a run: python -m llada_jax.plan --config=configs/8b.py:v5p-4x4x8 --topology=v5p:4x4x8

Compiles the real train step for hardware that need not be present. Reports the number of parameters, the memory per
chip, the FLOPs, the bytes that collectives move, the least time that a step can take, and what the whole run costs if
every step takes that time.

--topology has the form [SLICESx]CHIP:SHAPE, for example v5e:16x16, v5p:4x4x8, v6e:16x16, 2xv5p:4x4x8 (two slices),
h200:8 or 2xh200:8 (two nodes). Plans for TPUs need `pip install "jax[tpu]"`, plans for GPUs need
`pip install "jax[cuda13]"`; neither needs the hardware. The exit code is 0 if the train step fits into the memory of
the chips, and 1 if it does not.
"""

import json

import jax
from absl import flags
from ml_collections import config_flags

from llada_jax.cli import entry_point, outputs, paths, streams
from llada_jax.config import UserError
from llada_jax.planning import topology
from llada_jax.planning.estimate import page, plan

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file of the run, e.g. configs/8b.py:v5p-4x4x8")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Hardware to plan for, [SLICESx]CHIP:SHAPE, e.g. v5p:4x4x8, 2xv5p:4x4x8 or h200:8."
)
_JSON = flags.DEFINE_boolean("json", False, "Print the plan as one line of JSON instead of text.")
_HLO = paths.define("hlo", None, "File to write the text of the compiled program (optimized HLO) to.")


def main() -> int:
    """Prints the plan and returns the exit code."""
    config = entry_point.config_of(_CONFIG)
    if not _TOPOLOGY.value:
        raise UserError("--topology=CHIP:SHAPE is missing; name the hardware to plan for, e.g. --topology=v5p:4x4x8")
    hlo = outputs.check_file(_HLO.value, "hlo") if _HLO.value else None
    streams.require_stdout("start the program with stdout open")
    topology.prepare_environment()
    jax.config.update("jax_platforms", "cpu")
    # Programs compiled for described devices cannot be loaded from the cache again.
    jax.config.update("jax_enable_compilation_cache", False)
    record, text = plan(config, _TOPOLOGY.value)
    if hlo:
        outputs.write_text(hlo, text, "hlo")
    print(json.dumps(record, allow_nan=False) if _JSON.value else page(record))
    return entry_point.FINISHED if record["fits"] else entry_point.FAILURE


if __name__ == "__main__":
    entry_point.run(main)
