"""Runs evaluations: lm-evaluation-harness tasks, the published settings, and the couplet test of the paper.

This package may import loading, formats, scoring, and every package below them. Start reading at `run.py`.
"""
