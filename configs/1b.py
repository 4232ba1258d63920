"""LLaDA 1B, the size of the paper's scaling study (arXiv 2502.09992, Appendix B), with its data, batch and schedule.

    python -m llada_jax.prepare --input='text/*.parquet' --output=DATA --tokenizer=LLADA_TOKENIZER_DIR
    python -m llada_jax.train --config=configs/1b.py --workdir=runs/1b --config.data.path=DATA

Model: 1,487,243,264 parameters, 969,246,720 without embedding and head; grouped-query attention, 4 key/value heads.
The run is long (2.3 T tokens). For a shorter run, set --config.steps and --config.optimizer.schedule.
Hardware: parameters, gradients and moments take 24 GB. We have not yet run this config at this size. As in
configs/8b.py, the hardware is an argument of this file, a name in HARDWARE below:

    python -m llada_jax.train --config=configs/1b.py:v5e-4x4 --workdir=runs/1b --config.data.path=DATA
    python -m llada_jax.plan  --config=configs/1b.py:v5e-4x4 --topology=v5e:4x4
"""

import runpy
from pathlib import Path

from llada_jax.config import Config, UserError

_8B = runpy.run_path(str(Path(__file__).with_name("8b.py")))
Hardware = _8B["Hardware"]
# As in configs/8b.py; the comments say how many sequences of a micro-batch are on each chip.
HARDWARE = {
    "": Hardware(),
    "v5e-4x4": Hardware(accumulation=40, remat="dots"),  # 2
}


def get_config(hardware: str = "") -> Config:
    """Returns the config of the paper's 1B run, that of configs/8b.py with a smaller model, for a name in HARDWARE."""
    if hardware not in HARDWARE:
        raise UserError(f"configs/1b.py:{hardware}: choose one of {', '.join(filter(None, HARDWARE))}")
    config = _8B["paper_recipe"]()
    config.model.layers = 22
    config.model.width = 2048
    config.model.heads = 32
    config.model.kv_heads = 4
    config.model.feed_forward = 5_634
    config.accumulation, config.compute.remat, config.mesh.data = HARDWARE[hardware]
    return config
