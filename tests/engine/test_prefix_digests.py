"""Digests of prefixes: what they depend on, and that they stay what other processes take them for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix_digests import prefix_digests, short

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, st.integers(1, 9), st.data())
def test_only_full_blocks_have_one_and_it_says_all_that_is_before(
    token_ids: list[int], size: int, data: st.DataObject
) -> None:
    digests = prefix_digests("model", "", size, token_ids)
    assert len(digests) == len(token_ids) // size
    assert len(set(digests)) == len(digests)
    if token_ids:
        at = data.draw(st.integers(0, len(token_ids) - 1))
        other = [*token_ids[:at], token_ids[at] ^ 1, *token_ids[at + 1 :]]
        same = [a == b for a, b in zip(digests, prefix_digests("model", "", size, other), strict=True)]
        assert same == [index < at // size for index in range(len(digests))]


@pytest.mark.parametrize("what", [("other", "", 4), ("model", "tenant", 4), ("model", "", 2)])
def test_another_model_tenant_or_block_size_shares_nothing(what: tuple[str, str, int]) -> None:
    token_ids = list(range(16))
    assert not set(prefix_digests(*what, token_ids)) & set(prefix_digests("model", "", 4, token_ids))


def test_they_are_what_earlier_versions_made() -> None:
    """Router and workers may be of different minor versions."""
    digests = prefix_digests("model", "salt", 2, [1, 2, 3, 4, 5])
    assert [digest.hex() for digest in digests] == [
        "7166ab1d8aa115dd6ee86472bf5fc718",
        "e690ec678d87cb15b1e6c50cb1ffbacb",
    ]
    assert short(digests[0]) == int.from_bytes(digests[0], "little") % 2**64
