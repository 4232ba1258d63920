"""Models on disk: published folders and training workdirs, read and written.

May import: model, devices, text, cli, config. Start reading at `published.py`.
"""
