"""What a cluster would do with a workload, in virtual time.

Knows: how long steps take (profiles), how much KV fits, who is where. Does not know: sockets, processes,
models. Requests come from `cluster.workload`, and what becomes of them is judged by its rule.

`distserve.py` has the rules of DistServe's own simulator, for comparisons. Start reading at `clock.py`.
"""
