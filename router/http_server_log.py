"""What aiohttp logs of requests that it refuses itself, before any of our code sees them."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError


class HttpServerLog(logging.LoggerAdapter[logging.Logger]):
    """The `logger` of an aiohttp server: a request that is not HTTP (headers over the limit, an encoding that
    is not known) is one line, and not a traceback that any client could fill the log with."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        """Called by aiohttp with the exception as `exc_info`."""
        if isinstance(exc_info, HttpProcessingError):
            self.info("event=bad_http status=%d error=%r", exc_info.code, exc_info.message[:200])
        elif isinstance(exc_info, RequestPayloadError):  # of a body that was refused already
            self.info("event=bad_http error=%r", str(exc_info)[:200])
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)
