"""The few shapes of query that the panels are made of. Rates are over Grafana's $__rate_interval."""

from __future__ import annotations

from panels import Query


def rate(counter: str, by: str = "", where: str = "") -> str:
    """Events per second, added up but for the labels in `by`. where: label matchers."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({counter}{_matching(where)}[$__rate_interval]))"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    """Of what was observed."""
    return f"{rate(histogram + '_sum', by, where)} / {rate(histogram + '_count', by, where)}"


def quantiles(
    histogram: str, by: str = "", where: str = "", of: tuple[int, ...] = (50, 90, 99)
) -> tuple[Query, ...]:
    """A query for each percentile."""
    grouping = ", ".join(filter(None, (by, "le")))
    name = f" {{{{{by}}}}}" if by else ""
    return tuple(
        Query(
            f"histogram_quantile({percent / 100:g}, {rate(histogram + '_bucket', grouping, where)})",
            f"p{percent}{name}",
        )
        for percent in of
    )


def of_all_routers(gauge: str, by: str, where: str = "") -> str:
    """What several routers see alike, once."""
    return f"max by ({by}) ({gauge}{_matching(where)})"


def _matching(where: str) -> str:
    return f"{{{where}}}" if where else ""
