"""Moves a request's KV cache from its prefill to its decode worker: offered by one, pulled by the other.

Knows: the hand-off protocol (leases, epochs, acknowledgement), where the bytes of one layout lie in another,
and ways to copy them out of a peer's memory. Does not know: schedulers, routers, or models.
Start reading at `handoff.py` (the words, the picture, the guarantees), then `offer_side.py` and
`pull_side.py` (cores that decide), `layout.py` (which bytes go where), `link.py` (the gRPC stream between two
workers), and `base.py` (what a backend is), with `ipc.py` as the simplest one.
"""
