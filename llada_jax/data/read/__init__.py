"""Reads prepared sets and makes the batches of a run.

May import: the same packages as data. Start reading at `pipeline.py`.
"""
