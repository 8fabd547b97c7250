"""What the KV of a prompt's full blocks is known by: the same on workers and on routers. No torch here.

A full block is known by a digest over all tokens from the beginning of its sequence to its end: blake2b of
the digest before it and its own tokens. The chain begins with the model's identity and the request's salt, so
that neither another model nor another tenant ever finds it. 128 bits make a collision, by chance or by
intent, a matter of 2**64 blocks (cf. Zheng et al. 2023, who compare the tokens themselves, in a tree).

Workers tell routers the first 64 bits only: what a router finds wrong by them costs a worse placement, never
a wrong token, for the worker looks again by all 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_DIGEST_NBYTES = 16


def prefix_digests(identity: str, salt: str, block_size: int, token_ids: Sequence[int]) -> list[bytes]:
    """Of the full blocks of `token_ids`, in order; 16 bytes each.

    identity: of the model (WorkerInfo.model_fingerprint); whatever the KV of a token depends on besides the
    tokens before it. salt: as in Prefill.cache_salt.
    """
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    digest = blake2b(identity.encode(), digest_size=_DIGEST_NBYTES).digest()
    digest = blake2b(digest + salt.encode(), digest_size=_DIGEST_NBYTES).digest()
    digests: list[bytes] = []
    nbytes = 4 * block_size
    for start in range(0, len(tokens) - nbytes + 1, nbytes):
        digest = blake2b(digest + tokens[start : start + nbytes], digest_size=_DIGEST_NBYTES).digest()
        digests.append(digest)
    return digests


def short(digest: bytes) -> int:
    """Its first 64 bits, little-endian: what BlockEvents carry."""
    return int.from_bytes(digest[:8], "little")
