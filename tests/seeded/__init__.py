"""The faults that `tests/faults.py` seeds: in how a model learns and answers, in autoregressive models, and all around.

A good fault is one that a casual review would pass: the program still runs, and what it prints still looks right.
"""

from seeded import answers, around, autoregressive, learning
from seeded.fault import Fault

FAULTS: tuple[Fault, ...] = (*learning.FAULTS, *answers.FAULTS, *autoregressive.FAULTS, *around.FAULTS)
