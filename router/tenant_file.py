"""Follows the file of tenants, so that keys come and go without a restart."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from router.errors import SettingsError
from router.tenants import Tenants, read_accounts

_LOOK_S = 1.0

_log = logging.getLogger(__name__)


class TenantFile:
    """path: None if everybody may ask. Raises SettingsError."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen = None if path is None else _state(path)
        self.tenants = Tenants(None if path is None else read_accounts(path))

    async def follow(self) -> None:
        """For ever. A file that cannot be used changes nothing."""
        while self._path is not None:
            await asyncio.sleep(_LOOK_S)
            self.look()
        await asyncio.Event().wait()

    def look(self) -> None:
        """Once."""
        assert self._path is not None
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self.tenants.become(read_accounts(self._path))
        except SettingsError as error:
            _log.error("event=tenants_not_read reason=%r: those that were read before stay", str(error))
        else:
            _log.warning("event=tenants_read path=%s", self._path)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
