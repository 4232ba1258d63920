"""The Transformer, its attention kernels, and its low-rank adapters.

May import: devices, config. Start reading at `transformer.py`.
"""
