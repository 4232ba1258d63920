"""Plans for hardware that need not be there: memory, FLOPs, traffic and time.

May import: training and everything below it. Start reading at `estimate.py`.
"""
