"""SLO classes: the limits on TTFT and TPOT that a request is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from router.errors import InvalidRequestError, SettingsError


@dataclass(frozen=True, slots=True)
class SloLimits:
    """Limits in seconds, inclusive."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Slo:
    """What one request is judged by: its class (a metrics label) and the limits in force for it.

    priority: the greater goes first. is_own: the client gave limits itself, so that it is told if they cannot
    be met. may_downgrade: rather than be refused, be served as its class's `downgrade_to`.
    """

    slo_class: str
    limits: SloLimits
    priority: int = 0
    is_own: bool = False
    may_downgrade: bool = False


class SloPolicy:
    """Resolves what a client asked for into an `Slo`."""

    def __init__(self, classes: Mapping[str, SloLimits], default: str) -> None:
        """Raises SettingsError when the default is not a class or a limit is not a positive number."""
        if default not in classes:
            raise SettingsError(f"default_slo_class is {default!r}, which is not one of {sorted(classes)}")
        for name, limits in classes.items():
            for field in ("ttft_s", "tpot_s"):
                value = getattr(limits, field)
                if not (math.isfinite(value) and value > 0):
                    raise SettingsError(
                        f"slo_classes.{name}.{field} is {value!r}; give a positive number of seconds"
                    )
        self._classes = dict(classes)
        self._default = default

    @property
    def classes(self) -> Mapping[str, SloLimits]:
        """The configured classes."""
        return self._classes

    def resolve(
        self,
        slo_class: str | None,
        ttft_s: float | None,
        tpot_s: float | None,
        *,
        names: tuple[str, str, str] = ("slo.slo_class", "slo.ttft", "slo.tpot"),
    ) -> Slo:
        """The class that was named (or the default), with the limits that were given in place of the class's
        own.

        names: what the three arguments are called where the client wrote them, for the error.
        Raises InvalidRequestError for an unknown class, and for a limit that is not a positive finite number.
        """
        name = slo_class or self._default
        known = self._classes.get(name)
        if known is None:
            raise InvalidRequestError(
                f"unknown SLO class {name!r}; known: {', '.join(sorted(self._classes))}", names[0]
            )
        for value, param in ((ttft_s, names[1]), (tpot_s, names[2])):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequestError(f"{param} must be a positive duration, got {value!r} s", param)
        return Slo(
            slo_class=name,
            limits=SloLimits(
                ttft_s=known.ttft_s if ttft_s is None else ttft_s,
                tpot_s=known.tpot_s if tpot_s is None else tpot_s,
            ),
        )
