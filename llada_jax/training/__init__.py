"""A training run: where it begins, its steps, its checkpoints, and its metrics.

May import: scoring, formats, data, sampling, model, diffusion, devices, text, cli, storage, config. Start reading at
`run.py`.
"""
