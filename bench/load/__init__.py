"""The load generator: requests sent as the field measures serving, and judged by one rule.

Knows: how to send over HTTP and gRPC without waiting for answers. Does not know: how the server works inside;
all it needs is a URL. What is sent, and what makes a request good, is in `cluster.workload`.

Start reading at `run.py` (the open loop). `target.py` says how requests are sent; `serve.py` puts it together
for `prelay bench serve`.
"""
