"""Whose requests are not to be given up, so that giving up the largest starves nobody.

Moore-Hodgson keeps most requests, and so gives up long prompts first, and takes no notice of who sends them.
Deficits, as in deficit round robin, guard two kinds: a bin of prompt lengths while its share of requests in
time is below `BIN_SHARE` of what all together attain, and a tenant while what was read for it is below
`TENANT_SHARE` of an equal part. They decide who is given up and not who is next: what is kept is in time,
whatever its order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Set

LENGTH_BINS = (512, 2048, 8192)
"""Prompts of fewer tokens than the first, than the second, ... and the others."""
BIN_SHARE = 0.9
TENANT_SHARE = 0.8
_WINDOW = 512


def length_bin(prompt_tokens: int) -> int:
    """0 to 3."""
    return bisect_right(LENGTH_BINS, prompt_tokens)


class Fairness:
    """What came of the last requests of each bin, and whose prompts were placed last. Bounded in memory."""

    def __init__(self, window: int = _WINDOW) -> None:
        """window: how many of each are remembered."""
        self._window = window
        self._outcomes: deque[tuple[int, bool]] = deque()
        self._offered: Counter[int] = Counter()
        self._attained: Counter[int] = Counter()
        self._placed: deque[tuple[str, float]] = deque()
        self._placed_of: Counter[str] = Counter()
        self._work_s: dict[str, float] = {}
        self._total_work_s = 0.0

    def placed(self, tenant: str, length: int, work_s: float) -> None:
        """A request was placed in time. length: its bin. work_s: what it takes a reader."""
        self._outcome(length, True)
        self._placed.append((tenant, work_s))
        self._placed_of[tenant] += 1
        self._work_s[tenant] = self._work_s.get(tenant, 0.0) + work_s
        self._total_work_s += work_s
        if len(self._placed) > self._window:
            tenant, work_s = self._placed.popleft()
            self._placed_of[tenant] -= 1
            self._work_s[tenant] -= work_s
            self._total_work_s -= work_s
            if not self._placed_of[tenant]:
                del self._placed_of[tenant], self._work_s[tenant]

    def missed(self, length: int) -> None:
        """A request was refused, or can no longer be in time."""
        self._outcome(length, False)

    def guards(self, tenants: Set[str]) -> Guards:
        """tenants: of whom something waits."""
        attained = sum(self._attained.values()) / max(1, len(self._outcomes))
        return Guards(
            {bin_: BIN_SHARE * attained * count for bin_, count in self._offered.items()},
            BIN_SHARE * attained,
            dict(self._attained),
            TENANT_SHARE * self._total_work_s / max(1, len(self._work_s.keys() | tenants)),
            self._work_s,
        )

    def _outcome(self, length: int, in_time: bool) -> None:
        self._outcomes.append((length, in_time))
        self._offered[length] += 1
        self._attained[length] += in_time
        if len(self._outcomes) > self._window:
            length, in_time = self._outcomes.popleft()
            self._offered[length] -= 1
            self._attained[length] -= in_time


class Guards:
    """Hands out what protection there is, for one look at all that wait."""

    def __init__(
        self,
        entitled: dict[int, float],
        entitled_each: float,
        attained: dict[int, int],
        tenant_work_s: float,
        work_s: dict[str, float],
    ) -> None:
        """entitled, attained: requests in time that each bin is due, and has had. entitled_each: what it is
        due more for each that waits. tenant_work_s: reader's time that each tenant is due; work_s: has
        had."""
        self._entitled = entitled
        self._entitled_each = entitled_each
        self._attained = attained
        self._tenant_work_s = tenant_work_s
        self._work_s = work_s
        self._promised_s: dict[str, float] = {}

    def need(self, tenant: str, length: int, work_s: float) -> float:
        """How much of what it is due is missing to the next request's bin or tenant, whichever lacks more: 0
        to 1. If something is, the request is counted as if it had had its turn."""
        entitled = self._entitled[length] = self._entitled.get(length, 0.0) + self._entitled_each
        attained = self._attained.get(length, 0)
        has_s = self._work_s.get(tenant, 0.0) + self._promised_s.get(tenant, 0.0)
        need = 0.0
        if attained < entitled:
            need = 1 - attained / entitled
        if has_s < self._tenant_work_s:
            need = max(need, 1 - has_s / self._tenant_work_s)
        if need > 0:
            self._attained[length] = attained + 1
            self._promised_s[tenant] = self._promised_s.get(tenant, 0.0) + work_s
        return need
