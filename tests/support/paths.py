"""Paths in the source tree."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH")]))  # of new processes
PARITY = ROOT / "tests" / "parity"  # two published models with random weights, and the reference's outputs
PARITY_AR = ROOT / "tests" / "parity_ar"  # three causal models with random weights, and the outputs of transformers
LLADA_8B = ROOT / "tests" / "llada_8b"  # config.json and tokenizer_config.json of the published 8B model
