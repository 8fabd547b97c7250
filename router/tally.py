"""What has become of requests since the router started, for operators who ask (`RouterAdmin.GetStatus`)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from router.requests import Details, Outcome

RECENT_REQUESTS = 1024


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; 0 of nothing."""

    p50_s: float
    p90_s: float
    p99_s: float


class RecentTimes:
    """The last RECENT_REQUESTS times."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=RECENT_REQUESTS)

    def add(self, seconds: float) -> None:
        self._times.append(seconds)

    def quantiles(self) -> Quantiles:
        """By nearest rank: each is a time that was measured."""
        times = sorted(self._times)
        if not times:
            return Quantiles(0.0, 0.0, 0.0)
        p50, p90, p99 = (times[math.ceil(share * len(times)) - 1] for share in (0.5, 0.9, 0.99))
        return Quantiles(p50, p90, p99)


class Tally:
    """Outcomes by SLO class, tokens, and recent times to first token and per output token."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ttft = RecentTimes()
        self.tpot = RecentTimes()
        self._outcomes: defaultdict[str, Counter[Outcome]] = defaultdict(Counter)

    def rejected(self, slo_class: str) -> None:
        """A request was turned away because of load or missing workers."""
        self._outcomes[slo_class][Outcome.REJECTED] += 1

    def ended(self, details: Details, num_tokens: int) -> None:
        """A request that was let in has ended, after so many tokens."""
        self._outcomes[details.slo_class][details.outcome] += 1
        if details.ttft_s is not None:
            self.ttft.add(details.ttft_s)
        if num_tokens > 1 and details.outcome.is_complete:
            self.tpot.add(details.tpot_s)

    def by_class(self) -> Mapping[str, Counter[Outcome]]:
        """Outcomes of each class that had requests."""
        return self._outcomes

    @property
    def outcomes(self) -> Counter[Outcome]:
        """Of all classes together."""
        return sum(self._outcomes.values(), Counter[Outcome]())
