"""The prefill role: reads prompts, samples their first token, and hands their KV over.

Knows: the order in which prompts are computed, and which of them are owed to which decode worker.
Does not know: models (a StepRunner computes), other prefill workers, or how requests are placed.
Start reading at `loop.py` (the life of a request in this role), then `scheduler.py`.
"""
