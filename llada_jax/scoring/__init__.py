"""Scores texts: the likelihood bound of held-out rows, the likelihood of answers, and tests of greedy decoding.

This package may import sampling, data, diffusion, model, devices and config. Start reading at `bound.py`.
"""
