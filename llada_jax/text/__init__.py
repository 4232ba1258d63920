"""Tokenizers behind one common interface, chat templates, and what a tokenizer and a model must agree on.

May import: config. Start reading at `tokenizer.py`.
"""
