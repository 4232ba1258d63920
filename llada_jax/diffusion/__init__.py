"""The forward process, the training objectives, and the masked cross-entropy.

May import: devices and what devices may import. Start reading at `forward.py`.
"""
