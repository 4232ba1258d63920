"""The Transformer, its attention kernels and its low-rank adapters.

This package may import `devices`, and whatever `devices` may import. Start reading at `transformer.py`.
"""
