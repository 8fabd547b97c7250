"""What the router says no with.

RouterError
├── InvalidRequestError          the request is wrong; `param` names the field
│   ├── PromptTooLongError       prompt (plus answer) does not fit the model, or any worker
│   └── SloImpossibleError       the client's own limits, which an idle cluster could not keep
├── ModelNotFoundError           another model than the one served
├── UnauthenticatedError         no API key, or one that nobody knows
├── OverloadedError              gate full; `retry_after_s` says when to come again
│   ├── LateError                the request would be late; `ttft_s` says by what prediction
│   └── RateLimitedError         its tenant has used what it may use in a minute
├── NoWorkersError               a role has no worker that is up
├── NoPairError                  there are workers, but none that are linked to each other
├── WorkerLostError              a worker that the request was on went down, and it is not placed again
├── HandoffFailedError           the pair could not hand the request over
├── WorkerFailedError            a worker reported an error of its own
├── SlowReaderError              the client does not read its answer
├── DeadlineExceededError        the request's deadline passed
├── StoppingError                the router is shutting down
├── WorkerRefusedError           a worker cannot be registered
│   └── WorkerUnreachableError   ... because it does not answer
└── StartupError                 the router cannot start
    ├── SettingsError            the settings are wrong
    └── AddressTakenError        somebody else listens there

Everything down to StoppingError ends a client's request; `http_errors` and `grpc_errors` say as what.
"""

from __future__ import annotations


class RouterError(Exception):
    """Base of all errors raised on purpose here; the message is meant for the person who caused it."""


class InvalidRequestError(RouterError):
    """The request cannot be served as it is. `param`: the field at fault as the client wrote it, or None."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(InvalidRequestError):
    """Prompt and answer need more positions or KV blocks than there are."""


class SloImpossibleError(InvalidRequestError):
    """The client gave limits that no pair of workers could keep if nothing else were there; the message says
    what is possible."""


class ModelNotFoundError(RouterError):
    """The client asked for a model that is not the one served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"the model {asked!r} does not exist here; this deployment serves {served!r}")


class UnauthenticatedError(RouterError):
    """Nobody knows who asks."""


class OverloadedError(RouterError):
    """More requests wait than the router keeps; come again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LateError(OverloadedError):
    """The cluster has more to do than it can do in time, and this request would be late.

    ttft_s: its time to first token, as predicted. retry_after_s: when it may well be in time.
    """

    def __init__(self, message: str, retry_after_s: float, ttft_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.ttft_s = ttft_s


class RateLimitedError(OverloadedError):
    """The tenant has used its requests or tokens of this minute, or as much of it waits as may."""


class NoWorkersError(RouterError):
    """No worker of a role is up, so nothing can be served now."""

    def __init__(self, role: str) -> None:
        super().__init__(f"no {role} worker is up; try again when one has joined (see /health)")


class NoPairError(RouterError):
    """No prefill worker is linked to a decode worker, so nothing can be served now."""


class WorkerLostError(RouterError):
    """A worker that held the request went down."""


class HandoffFailedError(RouterError):
    """The prefill and the decode worker could not hand the request over."""


class WorkerFailedError(RouterError):
    """A worker reported an error that is neither the client's nor a matter of load."""


class SlowReaderError(RouterError):
    """The client left more of its answer unread, for longer, than the router keeps it for."""

    def __init__(self, unread_tokens: int, timeout_s: float) -> None:
        super().__init__(
            f"{unread_tokens} tokens of the answer were not read within {timeout_s:g} s, so it was ended; "
            "read faster, or ask for the answer as a whole"
        )


class DeadlineExceededError(RouterError):
    """The deadline (the caller's, or the router's own limit) passed before the answer was complete."""


class StoppingError(RouterError):
    """The router is shutting down."""

    def __init__(self) -> None:
        super().__init__("the router is shutting down; send the request again to another one")


class WorkerRefusedError(RouterError):
    """The worker cannot be registered: another life, role or model than announced."""


class WorkerUnreachableError(WorkerRefusedError):
    """The worker does not answer at its address."""


class StartupError(RouterError):
    """The router cannot start."""


class SettingsError(StartupError):
    """The settings are wrong; the message names the field."""


class AddressTakenError(StartupError):
    """An address of the settings cannot be listened on."""

    def __init__(self, setting: str, address: str, cause: str) -> None:
        super().__init__(
            f"cannot listen on {address} ({setting}): {cause}; "
            f"stop what listens there, or choose another address for router.{setting}"
        )
