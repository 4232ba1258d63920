"""What all entry points share: exit codes, one-line error messages, and the compilation cache.

This package may import config. Start reading at `entry_point.py`.
"""
