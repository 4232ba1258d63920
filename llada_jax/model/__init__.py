"""The Transformer, its attention kernels, its low-rank adapters, and int8 weights.

May import: devices, config. Start reading at `transformer.py`.
"""
