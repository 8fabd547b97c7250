"""`prelay simulate`: a workload through a cluster that there is not, judged and drawn like a real one.

Knows: how to get from what people write to clusters of `cluster.simulator`, and from rows to figures. Does
not know: how anything is simulated.

Start reading at `plan.py`; `measure.py` runs it.
"""
