"""The front door: takes requests over HTTP and gRPC, places each on a pair of workers, and streams the answer
back.

Knows: the public interfaces, SLO classes, the gate queue, placement, the load of every worker, the life of
every request.
Does not know: tensors, KV blocks' contents, schedulers inside workers, Ray, or how workers are started. Start
reading at `dispatch.py` (the life of a request), then `live_requests.py` (its beginning and its end), then
`record.py` (its tokens and text), then `http_api.py`.

Never imports torch or Ray: it is a process of its own, `python -m router SETTINGS_JSON`.
"""
