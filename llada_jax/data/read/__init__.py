"""From prepared sets to the batches of a run.

May import: what data may import. Start reading at `pipeline.py`.
"""
