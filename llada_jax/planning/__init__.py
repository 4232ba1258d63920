"""Plans a run for hardware that need not be present: memory, FLOPs, traffic and time.

May import: training and everything below it. Start reading at `estimate.py`.
"""
