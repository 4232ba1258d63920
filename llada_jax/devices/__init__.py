"""The device mesh, the placement of every array on it, the processes of a run, and facts about each kind of chip.

May import: cli, config. Start reading at `mesh.py`.
"""
