"""`tp=2,pp=1,replicas=3`: how many workers there are of a role, and how each is split over devices."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.workload.errors import BadInputError

_NAMES = ("tp", "pp", "replicas")


@dataclass(frozen=True, slots=True)
class Split:
    """tp, pp: tensor and pipeline parallelism of each worker."""

    tp: int = 1
    pp: int = 1
    replicas: int = 1

    @classmethod
    def parse(cls, flag: str, text: str) -> Split:
        """Raises BadInputError."""
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            is_known = name in _NAMES and name not in found
            if not is_known or not (value.isascii() and value.isdigit() and int(value) > 0):
                raise BadInputError(
                    f"{flag} {text!r}: {part!r} is not understood; write it as tp=2,pp=1,replicas=3, each at "
                    "least 1 and each once"
                )
            found[name] = int(value)
        return cls(**found)

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.replicas
