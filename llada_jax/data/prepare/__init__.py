"""Turns text files and conversations into ArrayRecord shards of token ids.

Start reading at `prepare_text.py`. What this package may import is said in `data/__init__.py`.
"""
