"""Turns text and conversations into prepared sets (`prepare/`), and reads prepared sets as batches (`read/`).

May import: diffusion, devices, text, cli, storage, config. Start reading at `sets.py`, which decides what a run reads.
"""
