"""`prelay bench goodput`: deployments brought up in turn, and the highest rate that each serves well.

Knows: an experiment (which deployments, which workloads, which limits), how to start and stop a deployment,
how to look for the rate at which attainment falls below 90 % and 99 %, and how to compare. Does not know: how
requests are sent and judged (`bench.load`), or what a deployment is inside (`cluster`).

Start reading at `run.py` (what is measured in which order). `search.py` says which rate comes next,
`figures.py` what came out, `visit.py` what happens between the start and the end of a deployment, `venue.py`
where it is started: on this machine, or in virtual time (`simulated.py`).
"""
