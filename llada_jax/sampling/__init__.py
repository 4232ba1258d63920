"""The reverse process: from masked tokens to tokens, and from prompts to text.

May import: model, devices, text, config. Start reading at `sampler.py`.
"""
