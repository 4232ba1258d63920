"""Conversations with a model: the messages, the answers, and the session in a terminal or a pipe.

This package may import everything except the entry points, evaluation, planning and training.
Start reading at `conversation.py`.
"""
