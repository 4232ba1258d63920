"""Turns text files and conversations into ArrayRecord shards of token ids.

May import: the same packages as data. Start reading at `prepare_text.py`.
"""
