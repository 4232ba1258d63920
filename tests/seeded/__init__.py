"""The faults that `tests/faults.py` seeds, in three parts: how a model learns, how it answers, and all around it.

A good fault is one that a casual review would pass: the program still runs, and what it prints still looks right.
"""

from seeded import answers, around, learning
from seeded.fault import Fault

FAULTS: tuple[Fault, ...] = (*learning.FAULTS, *answers.FAULTS, *around.FAULTS)
