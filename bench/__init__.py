"""Measurements that anyone can repeat: goodput of deployments, the engine beside others, hand-offs, profiles.

Knows: how to load and time, what a figure is to be compared with, how to draw it. Does not know: how the
measured thing works inside. Start reading at `cli.py` (the commands); `load/` is the load generator, and
`goodput/` compares deployments with it. `prelay bench` and `prelay profile` start this package;
`python -m bench.kernels` and `python -m bench.cuda` are commands of their own.
"""
