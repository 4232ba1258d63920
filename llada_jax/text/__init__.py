"""Tokenizers behind one common interface, and chat templates.

This package may import config. Start reading at `tokenizer.py`.
"""
