"""From text files and conversations to ArrayRecord shards of token ids.

May import: what data may import. Start reading at `prepare_text.py`.
"""
