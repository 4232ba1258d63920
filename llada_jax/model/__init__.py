"""The Transformer, its attention kernels and its low-rank adapters.

May import: devices and what devices may import. Start reading at `transformer.py`.
"""
