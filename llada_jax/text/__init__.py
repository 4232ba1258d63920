"""Tokenizers behind one interface, and chat templates.

May import: config. Start reading at `tokenizer.py`.
"""
