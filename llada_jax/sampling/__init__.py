"""The reverse process: it fills in masked tokens, and completes prompts in text.

May import: model, devices, text, cli, config. Start reading at `sampler.py`.
"""
