"""Fixtures of the fault tests: a cluster of two workers of each role, for one test each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster.conftest import start_server as start_server
from tests.faults.harness import Cluster, Nursery, nursery


@pytest.fixture(scope="session", name="nursery")
def nursery_fixture() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture
async def cluster(nursery: Nursery) -> AsyncIterator[Cluster]:
    async with Cluster(nursery) as made:
        await made.add("prefill-0", "prefill-1", "decode-0", "decode-1")
        yield made
