"""The device mesh and where every array lies on it, the processes of a run, and what is known of each chip.

May import: cli, config. Start reading at `mesh.py`.
"""
