"""One device's work: a model, its paged KV cache, and steps over flat batches of tokens.

Knows: checkpoints, tensors, KV blocks, sampling, and the thread in which steps run.
Does not know: other workers, routers' policies, Ray, or where a request came from.
Start reading at `sequence.py` (what a step is made of), then `runner.py` (one step), then `model.py`.

Importing this package, `sequence`, `config`, `block_pool` or `tokenizer` does not import torch: routers use
them.
"""
