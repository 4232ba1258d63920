"""Conversations with a model: messages, answers, and a session in a terminal or a pipe.

May import: everything below the entry points but evaluation, planning and training. Start reading at `conversation.py`.
"""
