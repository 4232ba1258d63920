"""Imports the programs of benchmarks/, for the tests of what they compute."""

import importlib
import sys

from paths import ROOT


def imported(name: str):
    """Returns a program of benchmarks/ as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
