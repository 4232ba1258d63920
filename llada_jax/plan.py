"""Plans a run: python -m llada_jax.plan --config=configs/8b.py:v5p-4x4x8 --topology=v5p:4x4x8

Compiles the real train step for hardware that need not be present. Reports the number of parameters, the memory per
chip, the FLOPs, the bytes that collectives move, the least time that a step can take, and what the whole run costs if
every step takes that time. For TPUs it also reports how long a step takes by the compiler's own estimate, and where the
time goes; nobody has compared this estimate with a pod. --html and --trace show it as a timeline.

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
from llada_jax.planning import clock, storage, timeline, topology
from llada_jax.planning.estimate import loss_turns, page, plan
from llada_jax.planning.hlo import Module

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file of the run, e.g. configs/8b.py:v5p-4x4x8")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Hardware to plan for, [SLICESx]CHIP:SHAPE, e.g. v5p:4x4x8, 2xv5p:4x4x8 or h200:8."
)
_JSON = flags.DEFINE_boolean("json", False, "Print the plan as one line of JSON instead of text.")
_HLO = paths.define("hlo", None, "File to write the text of the compiled program (optimized HLO) to.")
_HTML = paths.define("html", None, "File to write a page with the timeline of the estimated step to (TPUs only).")
_TRACE = paths.define("trace", None, "File to write the estimated step to as a trace for Perfetto (TPUs only).")
_KERNEL_SHARE = flags.DEFINE_float(
    "kernel_share",
    None,
    "Share of the chip's peak that attention kernels reach, in (0, 1], because the compiler has no estimate for them. "
    "The default is an assumption about the chip.",
)

_STORAGE = flags.DEFINE_float(
    "storage_gb_per_s",
    storage.RATE / 1e9,
    "Gigabytes (10^9 bytes) per second that each host is taken to read from the storage, or to write to it.",
)


def main() -> int:
    """Prints the plan and returns the exit code."""
    config = entry_point.config_of(_CONFIG)
    if not _TOPOLOGY.value:
        raise UserError("--topology=CHIP:SHAPE is missing; name the hardware to plan for, e.g. --topology=v5p:4x4x8")
    share, estimated = _KERNEL_SHARE.value, topology.parse(_TOPOLOGY.value)[1].clock is not None
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--kernel_share={share:g}: must be greater than 0 and at most 1, e.g. --kernel_share=0.5")
    if not (rate := _STORAGE.value * 1e9) > 0:
        raise UserError(f"--storage_gb_per_s={_STORAGE.value:g}: must be greater than 0, e.g. --storage_gb_per_s=1")
    files = {}
    for flag in (_HLO, _HTML, _TRACE):
        if flag.value and flag is not _HLO and not estimated:
            raise UserError(f"--{flag.name}: only the compilers for TPUs estimate times; leave the flag out")
        files[flag.name] = outputs.check_file(flag.value, flag.name) if flag.value else None
    streams.require_stdout("start the program with stdout open")
    topology.prepare_environment()
    jax.config.update("jax_platforms", "cpu")
    # Programs compiled for described devices cannot be loaded from the cache again.
    jax.config.update("jax_enable_compilation_cache", False)
    record, text = plan(config, _TOPOLOGY.value, share, rate)
    if files["hlo"]:
        outputs.write_text(files["hlo"], text, "hlo")
    if (files["html"] or files["trace"]) and record.get("estimated_step_seconds"):
        module = Module(text)
        block = clock.simulate(_TOPOLOGY.value, module, loss_turns(config, record["chips"]), share)
        if files["html"]:
            outputs.write_text(files["html"], timeline.html(record, module, block), "html")
        if files["trace"]:
            outputs.write_text(files["trace"], timeline.trace(module, block), "trace")
    print(json.dumps(record, allow_nan=False) if _JSON.value else page(record))
    return entry_point.FINISHED if record["fits"] else entry_point.FAILURE


if __name__ == "__main__":
    entry_point.run(main)
