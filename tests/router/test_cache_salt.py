"""What a request's tenant becomes for workers: tenants never share cached KV."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prelay.v1 import worker_pb2

from engine.sequence import RequestKey
from router import commands


@pytest.mark.parametrize(("tenant", "salt"), [("", ""), ("acme", "acme"), ("bad \udcff", "bad \\udcff")])
def test_both_workers_hear_the_tenant_as_salt(make_request, tenant, salt):
    """Headers may hold bytes that are no text."""
    request = replace(make_request(), tenant=tenant)
    key, peer = RequestKey("r", 1), worker_pb2.PeerRef()
    assert commands.reserve(key, request, peer, None).reserve.cache_salt == salt
    assert commands.prefill(key, request, peer, None).prefill.cache_salt == salt
