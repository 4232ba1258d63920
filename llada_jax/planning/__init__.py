"""Plans a run for hardware that need not be present: memory, FLOPs, traffic, and time.

May import: training, model, diffusion, devices, cli, config. Start reading at `estimate.py`, and at `clock.py` for
the time of a step.
"""
