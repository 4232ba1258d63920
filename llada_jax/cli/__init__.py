"""What all entry points share.

These are exit codes, one-line error messages, the help, shared flags, outputs that are written whole, and the
compilation cache.

May import: config. Start reading at `entry_point.py`.
"""
