"""Object storage: requests to a bucket that are repeated if they fail for a passing reason, and whole objects.

May import: config. Start reading at `objects.py`.
"""
