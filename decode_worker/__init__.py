"""The decode role: takes over prompts' KV and writes their answers, all of them one token per step. And the
mixed role, which does the same and also reads prompts itself, beside its decoding.

Knows: which sequences run, which wait for a place, which are read here and in which chunks, and which are
still being handed over.
Does not know: models (a StepRunner computes), other decode workers, or how requests are placed.
Start reading at `loop.py` (the life of a request in this role), then `scheduler.py`, which says what a step
holds; `places.py` who has a place and blocks, `chunk_budget.py` how much of a prompt a step takes.
"""
