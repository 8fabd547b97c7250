"""Choosing the pair of workers for a request: `base.py` is the interface, every other file one policy (all
pure)."""
