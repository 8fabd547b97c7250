"""Requests that wait in the router, because no worker has a slot for them yet (late binding): `base.py` is
the interface, every other file one order (all pure)."""
