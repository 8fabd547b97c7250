"""Which workers to run: how each phase is split over devices, how many of each, on which hardware.

Knows: what devices can do (measured, or from first principles), what fits into their memory, what a workload
would get from a plan (by `cluster.simulator`). Does not know: how anything is started.

Start reading at `search.py`. A worker of one kind (`kinds.py`) is measured or reckoned (`roofline.py`,
`memory.py`); `goodput.py` finds the rate at which a plan still attains what was promised; `plans.py` is what
comes out.
"""
