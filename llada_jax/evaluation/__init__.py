"""Evaluations: lm-evaluation-harness, published settings, and the couplet test of the paper.

May import: loading, formats, scoring and everything below them. Start reading at `run.py`.
"""
