"""Fixtures of the tests of deploy/: a deployment to watch."""

from __future__ import annotations

from tests.cluster.conftest import start_server as start_server
