"""SLO classes: the limits on TTFT and TPOT that a request is judged by, and how urgent it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from router.errors import InvalidRequestError, SettingsError

MAX_PRIORITY = 2**31 - 1
"""An int32 on the wire; the least is one below its negative."""


@dataclass(frozen=True, slots=True)
class SloLimits:
    """Limits in seconds, inclusive."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class SloClass:
    """A class as it is configured. priority: the greater goes first. downgrade_to: the class as which a
    request of this one may be served that would have to be refused otherwise, if its client allows that."""

    ttft_s: float
    tpot_s: float
    priority: int = 0
    downgrade_to: str | None = None

    @property
    def limits(self) -> SloLimits:
        return SloLimits(self.ttft_s, self.tpot_s)


@dataclass(frozen=True, slots=True)
class Slo:
    """What one request is judged by: its class (a metrics label) and the limits in force for it.

    priority: the greater goes first. own_ttft, own_tpot: the client gave a tighter limit than the class's, so
    it is told if that cannot be met. downgraded: as what it may be served rather than be refused: only if the
    client allows it.
    """

    slo_class: str
    limits: SloLimits
    priority: int = 0
    own_ttft: bool = False
    own_tpot: bool = False
    downgraded: Slo | None = None

    @property
    def may_downgrade(self) -> bool:
        """Whether there is something else as which it may be served."""
        return self.downgraded is not None


@dataclass(frozen=True, slots=True)
class SloWish:
    """What a client asks for; None is what its class says."""

    slo_class: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    priority: int | None = None
    may_downgrade: bool = False


@dataclass(frozen=True, slots=True)
class SloFields:
    """What the fields of a wish are called where the client wrote them, for errors."""

    slo_class: str = "slo.slo_class"
    ttft: str = "slo.ttft"
    tpot: str = "slo.tpot"
    priority: str = "slo.priority"


class SloPolicy:
    """Resolves what a client asked for into an `Slo`."""

    def __init__(self, classes: Mapping[str, SloClass], default: str) -> None:
        """Raises SettingsError when the default is not a class, a limit is not a positive number, or classes
        downgrade to one that is not there or back to themselves."""
        if default not in classes:
            raise SettingsError(f"default_slo_class is {default!r}, which is not one of {sorted(classes)}")
        for name, one in classes.items():
            for field in ("ttft_s", "tpot_s"):
                value = getattr(one, field)
                if not (math.isfinite(value) and value > 0):
                    raise SettingsError(
                        f"slo_classes.{name}.{field} is {value!r}; give a positive number of seconds"
                    )
            if abs(one.priority) > MAX_PRIORITY:
                raise SettingsError(
                    f"slo_classes.{name}.priority is {one.priority}; give a number from {-MAX_PRIORITY} to "
                    f"{MAX_PRIORITY}"
                )
        self._classes = dict(classes)
        self._default = default
        self._slos = {name: Slo(name, one.limits, one.priority) for name, one in classes.items()}
        self._downgraded = {name: self._downgrade(name) for name in classes}

    @property
    def classes(self) -> Mapping[str, SloClass]:
        """The configured classes."""
        return self._classes

    def resolve(self, wish: SloWish, fields: SloFields | None = None) -> Slo:
        """The class that was named (or the default), with what was given in place of the class's own.

        Raises InvalidRequestError for an unknown class, and for a limit that is not a positive finite number.
        """
        fields = fields or SloFields()
        name = wish.slo_class or self._default
        known = self._slos.get(name)
        if known is None:
            raise InvalidRequestError(
                f"unknown SLO class {name!r}; known: {', '.join(sorted(self._classes))}", fields.slo_class
            )
        for value, param in ((wish.ttft_s, fields.ttft), (wish.tpot_s, fields.tpot)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequestError(f"{param} must be a positive duration, got {value!r} s", param)
        priority = known.priority if wish.priority is None else wish.priority
        if abs(priority) > MAX_PRIORITY:
            raise InvalidRequestError(
                f"{fields.priority} must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}",
                fields.priority,
            )
        limits = SloLimits(
            ttft_s=known.limits.ttft_s if wish.ttft_s is None else wish.ttft_s,
            tpot_s=known.limits.tpot_s if wish.tpot_s is None else wish.tpot_s,
        )
        return Slo(
            slo_class=name,
            limits=limits,
            priority=priority,
            own_ttft=limits.ttft_s < known.limits.ttft_s,
            own_tpot=limits.tpot_s < known.limits.tpot_s,
            downgraded=self._downgraded[name] if wish.may_downgrade else None,
        )

    def _downgrade(self, name: str) -> Slo | None:
        """As what requests of that class may be served instead, and these in turn."""
        chain = [name]
        while (target := self._classes[chain[-1]].downgrade_to) is not None:
            if target not in self._classes:
                raise SettingsError(
                    f"slo_classes.{chain[-1]}.downgrade_to is {target!r}, which is not one of "
                    f"{sorted(self._classes)}"
                )
            if target in chain:
                raise SettingsError(
                    f"slo_classes.{chain[-1]}.downgrade_to is {target!r}, so classes downgrade in a circle: "
                    f"{' -> '.join([*chain, target])}"
                )
            chain.append(target)
        downgraded: Slo | None = None
        for below in reversed(chain[1:]):
            downgraded = replace(self._slos[below], downgraded=downgraded)
        return downgraded


def impossible_limits(classes: Mapping[str, SloClass], least: SloLimits) -> Mapping[str, str]:
    """What to say of classes that no request can keep: none gets below `least`, with nothing else to do."""
    said = {}
    for name, one in classes.items():
        for what, limit_s, least_s in (
            ("ttft_s", one.ttft_s, least.ttft_s),
            ("tpot_s", one.tpot_s, least.tpot_s),
        ):
            if limit_s < least_s:
                said[f"{name}.{what}"] = (
                    f"slo_classes.{name}.{what} is {limit_s:g}, but the fastest workers need {least_s:.3g} s "
                    "with nothing else to do: no request of this class can be good"
                )
    return said
