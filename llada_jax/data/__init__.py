"""From text and conversations to prepared sets (`prepare/`), and from prepared sets to batches (`read/`).

May import: diffusion, devices, text, config. Start reading at `sets.py`, which decides what a run reads.
"""
