"""The reverse process: fills in masked tokens, and completes text prompts.

This package may import model, devices, text, cli and config. Start reading at `sampler.py`.
"""
