"""Whether a request is let in at all: `base.py` is the interface, every other file one
way to judge (all pure)."""
