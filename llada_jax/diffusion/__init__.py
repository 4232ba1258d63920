"""The forward process, the training objectives, and the masked cross-entropy.

May import: devices, config. Start reading at `forward.py`.
"""
