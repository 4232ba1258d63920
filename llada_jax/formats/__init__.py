"""Models on disk: published folders and training workdirs, read, written and converted.

May import: model, diffusion, devices, text, cli, storage, config. Start reading at `workdir.py` for what is trained
here, and at `published.py` for what others publish.
"""

FORMATS = ("huggingface", "orbax")  # what `conversion` writes; here, because flags are defined before JAX is imported
