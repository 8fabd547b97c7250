"""How often a process looks for garbage that serves, or simulates, many requests."""

import gc


def settle() -> None:
    """What is there by now stays, and what a request leaves behind is seldom part of a cycle: to look through
    it all as often as Python does by default takes some percent of the time, and a millisecond or two of
    the decisions that it happens in."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
