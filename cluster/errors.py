"""What commands of prelay refuse or give up on, drawn as the tree that it is, with the exit codes.

ClusterError                 1  something failed while starting or running
├── ConfigError              2  the configuration or the command line says something that cannot be done
├── AddressInUseError        3  somebody else listens on an address that the router was told to use
├── ModelError               4  the checkpoint cannot be served
├── RayError                 1  Ray cannot be started, reached, or has no room for the workers
├── RouterError              1  the router process did not start, or ended by itself
├── NoRouterError            1  nobody answers, or no router does, where one was asked for its status
├── WorkerError              1  a worker did not start, keeps dying, or does not do what it is told
├── UnknownWorkerError       2  a worker is named that is not there
├── ChangeError              1  a change of a running deployment was refused or failed
└── DemoError                1  the demo's answers are not what they must be
"""

from __future__ import annotations

from typing import ClassVar


class ClusterError(Exception):
    """Base of all that `cluster` raises on purpose; the message is fit to be shown to a user as it is."""

    exit_code: ClassVar[int] = 1


class ConfigError(ClusterError):
    """Names the key, its value and the remedy."""

    exit_code = 2


class AddressInUseError(ClusterError):
    """Carries the router's own message, which names the address and the setting."""

    exit_code = 3


class ModelError(ClusterError):
    """A file is missing or damaged, or the architecture is not supported."""

    exit_code = 4


class RayError(ClusterError):
    """Ray did not start, the address does not answer, or there are fewer CPUs than the workers need."""


class RouterError(ClusterError):
    """Without the router nothing is served, so this ends the deployment."""


class NoRouterError(ClusterError):
    """Names the address, what came instead of an answer, and where else to look."""


class WorkerError(ClusterError):
    """At the first start; later a worker is started again, and this means that it does not help. Or it was to
    change, and cannot now."""


class UnknownWorkerError(ClusterError):
    """Names those that are there."""

    exit_code = 2


class ChangeError(ClusterError):
    """Carries what the controller said: why, and what to do instead."""


class DemoError(ClusterError):
    """A request failed, or its answer differs from the one computed in a single process."""
