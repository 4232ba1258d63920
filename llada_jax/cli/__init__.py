"""What all entry points share: exit codes, one line for a user's mistake, the compilation cache.

May import: config. Start reading at `entry_point.py`.
"""
