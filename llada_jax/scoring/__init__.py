"""Likelihoods: the bound of held-out rows, the likelihood of answers, and whether greedy decoding gives an answer.

May import: sampling, data, diffusion, model, devices, config. Start reading at `bound.py`.
"""
