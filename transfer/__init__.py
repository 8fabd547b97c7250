"""Moves a request's KV cache from its prefill to its decode worker: offered by one, pulled by the other.

Knows: the hand-off protocol (leases, epochs, acknowledgement), and ways to copy blocks out of a peer's
memory. Does not know: schedulers, routers, models, or what the bytes of a block mean.
Start reading at `handoff.py` (the words and the picture), then `offer_side.py` and `pull_side.py` (cores
that decide), then `link.py` (the gRPC stream between two workers) and `ipc.py` (shared memory on one host).
"""
