"""Conversations with a model: the messages, the answers, and the session in a terminal or a pipe.

May import: sampling, model, text, cli, config. Start reading at `conversation.py`.
"""
