"""Runs evaluations: tasks of lm-evaluation-harness, published settings, and the couplet test of the paper.

May import: loading, formats, scoring, sampling, model, devices, text, cli, storage, config. Start reading at `run.py`.
"""
