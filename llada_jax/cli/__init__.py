"""What all entry points share.

These are exit codes, one-line error messages, the help, shared flags, outputs that are written whole, the compilation
cache, and huge pages.

May import: config. Start reading at `entry_point.py`.
"""
