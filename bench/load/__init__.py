"""The load generator: requests sent as the field measures serving, and judged by one rule.

Knows: traces and their arrivals, how to send over HTTP and gRPC without waiting for answers, what makes a
request good. Does not know: how the server works inside; all it needs is a URL.

Start reading at `run.py` (the open loop). `workload.py` says what is sent and when, `target.py` how,
`judge.py` what came of it; `serve.py` puts them together for `prelay bench serve`.
"""
