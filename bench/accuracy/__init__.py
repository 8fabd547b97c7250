"""`prelay bench accuracy`: how far the simulator is from what it simulates.

Knows: how a deployment becomes a simulated cluster, and how to hold one run against the other. Does not know:
how deployments are started and loaded (`bench.goodput`), or how anything is simulated.

Start reading at `run.py`; `case.py` is one deployment with its twin, `correction.py` what the twin learns.
"""
