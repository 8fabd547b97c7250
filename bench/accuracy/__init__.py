"""`prelay bench accuracy`: how far the simulator is from what it simulates.

Knows: how to hold one run against the other, and what the simulator learns from a light run. Does not know:
how deployments are started and loaded (`bench.goodput`), how one becomes a simulated cluster
(`bench.simulate.twin`), or how anything is simulated.

Start reading at `run.py`; `case.py` is one deployment with its twin, `correction.py` what the twin learns.
"""
