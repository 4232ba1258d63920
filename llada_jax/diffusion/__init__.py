"""The forward process, the training objectives, and the masked cross-entropy.

This package may import `devices`, and whatever `devices` may import. Start reading at `forward.py`.
"""
