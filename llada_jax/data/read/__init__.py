"""Reads prepared sets and makes the batches of a run.

Start reading at `pipeline.py`. What this package may import is said in `data/__init__.py`.
"""
