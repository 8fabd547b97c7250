"""The decode role: takes over prompts' KV and writes their answers, all of them one token per step.

Knows: which sequences run, which wait for a place, and which are still being handed over.
Does not know: models (a StepRunner computes), other decode workers, or how requests are placed.
Start reading at `loop.py` (the life of a request in this role), then `scheduler.py`.
"""
