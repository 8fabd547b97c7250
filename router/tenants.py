"""Who may ask, and how much: tenants with API keys and limits. A core, but for reading the file.

    tenants:
      search:
        keys: [SHA-256 of a key, in hex, ...]
        requests_per_minute: 600      # answers, that is; no limit if it is left out
        tokens_per_minute: 100000     # of prompts and answers
        waiting_tokens: 50000         # of prompts whose answers have not begun

The file has digests, so whoever reads it learns no key. A limit is a bucket that fills evenly and holds one
minute's worth. Whoever has one left is let in, and what it turns out to cost may leave the bucket in
debt, as nobody knows how long an answer will be; then the next has to wait until that is paid. Answers are
paid for when they end, however they do. What waits is limited, too, or a tenant could fill the queue within
its minute; but for a call that is larger than that by itself, which is let in when nothing else waits.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from router.errors import RateLimitedError, SettingsError, UnauthenticatedError
from router.requests import Request

_MINUTE_S = 60.0
_WAITING_RETRY_S = 1.0
_LIMITS = ("requests_per_minute", "tokens_per_minute", "waiting_tokens")
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Account:
    """digests: SHA-256 of the keys. The limits are None where there is none."""

    digests: tuple[bytes, ...]
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    waiting_tokens: float | None = None


@dataclass(slots=True)
class Bucket:
    """Holds up to per_minute, or one if that is more; what it has is as of `at`."""

    per_minute: float
    has: float = field(init=False)
    at: float

    def __post_init__(self) -> None:
        self.has = self._most

    @property
    def _most(self) -> float:
        return max(1.0, self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Whatever there is; it may be in debt afterwards."""
        self._fill(now)
        self.has -= amount

    def wait_s(self, now: float) -> float:
        """How long until there is one; 0 if there is."""
        self._fill(now)
        return max(0.0, 1.0 - self.has) / self.per_minute * _MINUTE_S

    def _fill(self, now: float) -> None:
        filled = (now - self.at) * self.per_minute / _MINUTE_S
        self.has, self.at = min(self._most, self.has + filled), now


class Tenants:
    """Without accounts everybody may ask, in whatever name."""

    def __init__(self, accounts: Mapping[str, Account] | None = None) -> None:
        self._accounts = accounts
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._waiting: Counter[str] = Counter()

    @property
    def is_open(self) -> bool:
        return self._accounts is None

    def become(self, accounts: Mapping[str, Account]) -> None:
        """From now on these. Buckets of limits that stay are as full as they were."""
        before, self._accounts = self._accounts or {}, accounts
        kept = {name for name, account in accounts.items() if _limits(account) == _limits(before.get(name))}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key[0] in kept}

    def who(self, authorization: str | None) -> str:
        """The tenant that a header or metadata value `Bearer KEY` is of. Only for when it is not open. Takes
        as long for each key that is wrong. Raises UnauthenticatedError."""
        assert self._accounts is not None
        if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
            raise UnauthenticatedError("an API key is needed here: send it as authorization: Bearer KEY")
        digest = hashlib.sha256(_bytes(authorization[len(_BEARER) :].strip())).digest()
        found = [
            name
            for name, account in self._accounts.items()
            for known in account.digests
            if hmac.compare_digest(known, digest)
        ]
        if not found:
            raise UnauthenticatedError(
                "this API key is not known here: ask who runs this service for another"
            )
        return found[0]

    def admit(self, requests: Sequence[Request], now: float) -> None:
        """The requests of one call. Raises RateLimitedError, and then counts nothing."""
        if self._accounts is None or not requests:
            return
        tenant = requests[0].tenant
        tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._may_wait(tenant, tokens)
        costs = {"requests": len(requests), "tokens": tokens}
        buckets = {what: self._bucket(tenant, what, now) for what in costs}
        waits = {what: bucket.wait_s(now) for what, bucket in buckets.items() if bucket is not None}
        what = max(waits, key=lambda one: waits[one], default=None)
        if what is not None and waits[what] > 0:
            bucket = buckets[what]
            assert bucket is not None
            raise RateLimitedError(
                f"tenant {tenant!r} has used its {bucket.per_minute:g} {what} a minute; come again in "
                f"{waits[what]:.1f} s",
                waits[what],
            )
        for what, bucket in buckets.items():
            if bucket is not None:
                bucket.take(costs[what], now)

    def refused(self, requests: Sequence[Request], now: float) -> None:
        """Those of a call that was admitted here, and refused for another reason: they cost nothing."""
        tokens = sum(len(request.prompt_token_ids) for request in requests)
        for what, cost in (("requests", len(requests)), ("tokens", tokens)):
            bucket = None if self._accounts is None else self._bucket(requests[0].tenant, what, now)
            if bucket is not None:
                bucket.take(-cost, now)

    def waits(self, request: Request) -> None:
        """The request was let in."""
        self._waiting[request.tenant] += len(request.prompt_token_ids)

    def waits_no_more(self, request: Request) -> None:
        """Its answer has begun, or it has ended; to be said once."""
        self._waiting[request.tenant] -= len(request.prompt_token_ids)
        if not self._waiting[request.tenant]:
            del self._waiting[request.tenant]

    def answered(self, tenant: str, tokens: int, now: float) -> None:
        """An answer has ended, or was left."""
        bucket = None if self._accounts is None else self._bucket(tenant, "tokens", now)
        if bucket is not None:
            bucket.take(tokens, now)

    def _may_wait(self, tenant: str, tokens: int) -> None:
        account, waiting = (self._accounts or {}).get(tenant), self._waiting[tenant]
        limit = None if account is None else account.waiting_tokens
        if limit is not None and waiting and waiting + tokens > limit:
            raise RateLimitedError(
                f"tenant {tenant!r} has prompts of {waiting} tokens waiting, {tokens} more would be beyond "
                f"its {limit:g}; come again when an answer to one of these has begun",
                _WAITING_RETRY_S,
            )

    def _bucket(self, tenant: str, what: str, now: float) -> Bucket | None:
        account = (self._accounts or {}).get(tenant)
        if account is None:
            return None
        limit = account.requests_per_minute if what == "requests" else account.tokens_per_minute
        if limit is None:
            return None
        if (tenant, what) not in self._buckets:
            self._buckets[tenant, what] = Bucket(limit, now)
        return self._buckets[tenant, what]


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"{twice[0]!r} is there twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def read_accounts(path: Path) -> dict[str, Account]:
    """Raises SettingsError that says what is wrong, and where."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise SettingsError(f"tenants: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(f"tenants: {path} is not YAML: {' '.join(str(error).split())}") from error
    tenants = raw.get("tenants") if isinstance(raw, dict) else None
    if not isinstance(tenants, dict) or not tenants or set(raw) != {"tenants"}:
        raise SettingsError(
            f"tenants: {path} must be `tenants:` with a name for each; `prelay key NAME` writes an entry"
        )
    accounts = {str(name): _account(f"tenants: {path}: {name}", one) for name, one in tenants.items()}
    digests = [digest for account in accounts.values() for digest in account.digests]
    if len(set(digests)) < len(digests):
        raise SettingsError(f"tenants: {path}: the same key is there twice; each tenant needs its own")
    return accounts


def _account(where: str, raw: Any) -> Account:
    if not isinstance(raw, dict) or not isinstance(raw.get("keys"), list) or set(raw) - {"keys", *_LIMITS}:
        raise SettingsError(f"{where}: give keys (a list), and if you like {', '.join(_LIMITS)}")
    digests = []
    for text in raw["keys"]:
        try:
            digest = bytes.fromhex(text if isinstance(text, str) else "")
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise SettingsError(
                f"{where}: a key must be there as its SHA-256, 64 hexadecimal digits; `prelay key` writes it"
            )
        digests.append(digest)
    limits = []
    for name in _LIMITS:
        limit = raw.get(name)
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1e15
        ):
            raise SettingsError(f"{where}: {name} is {limit!r}: a number above 0 is needed")
        limits.append(None if limit is None else float(limit))
    return Account(tuple(digests), *limits)


def _bytes(text: str) -> bytes:
    """Of a header as it came, whatever it was."""
    return text.encode("utf-8", "surrogateescape")


def _limits(account: Account | None) -> tuple[float | None, float | None] | None:
    return None if account is None else (account.requests_per_minute, account.tokens_per_minute)
