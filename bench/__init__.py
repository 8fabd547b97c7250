"""Measurements that anyone can repeat: limits of the machine, the engine beside others, profiles of steps.

Knows: how to time, what a figure is to be compared with, how to draw it. Does not know: how the measured
thing works inside. Start reading at `cli.py` (the commands), then `engine.py`. `prelay bench` and
`prelay profile` start this package; `python -m bench.kernels` and `python -m bench.cuda` are commands of
their own.
"""
