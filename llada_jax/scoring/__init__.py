"""Scores texts: the likelihood bound of held-out rows, the likelihood of answers, and tests of greedy decoding.

May import: data, sampling, model, diffusion, devices, config. Start reading at `bound.py`.
"""
