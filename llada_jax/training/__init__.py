"""A training run: where it begins, its steps, its checkpoints and its metrics.

May import: formats, scoring and everything below them. Start reading at `loop.py`.
"""
