"""One live request: what has been emitted, when, and how it ended. A core: told `now`, does nothing itself.

    gated --place--> placed --tokens--> streaming --tokens--> finished
      ^                 |                   |
      +------lost-------+-------lost--------+     and from every state before the end: --fail--> failed

Tokens come from two workers, so they may arrive out of order (the decode worker overtakes the first token) or
doubled; they are put in order by index. Prompt and emitted tokens stay here until the end: they are all that
another pair of workers needs to go on with the answer. What arrived but was not emitted is thrown away with
its placement: the next one sends it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.sequence import RequestKey, StopReason, TokenLogprobs
from router.placement.base import Kind
from router.requests import Delta, Details, Finish, FinishReason, Outcome, Request, Stage
from router.stages import StageClock
from router.stop_strings import StopStrings
from router.text_alignment import ScoredToken, TextAlignment


class Detokenizes(Protocol):
    """Incremental detokenisation of one answer (`engine.tokenizer.Detokenizer`)."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""

    def flush(self) -> str:
        """What was held back of an incomplete character."""


class TokenBatch(NamedTuple):
    """Consecutive tokens of one answer as a worker reports them. One is made for nearly every token, so it is
    what costs least.

    first_index: index of token_ids[0] in the answer. stop_reason: set if the last of them ends the answer.
    stage_times: seconds measured by the worker, by stage; empty where it reports none.
    logprobs: of token_ids, if asked for. prompt_logprobs, cached_tokens: with index 0.
    """

    first_index: int
    token_ids: Sequence[int]
    stop_reason: StopReason | None
    stage_times: Sequence[tuple[Stage, float]] = ()
    kv_bytes: int = 0
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    cached_tokens: int = 0


class RequestRecord:
    """Bookkeeping of one request from arrival to end."""

    def __init__(self, request: Request, detokenizer: Detokenizes) -> None:
        self.request = request
        self.attempt = 0
        self.key = RequestKey(request.request_id, 0)
        """Names the placement in force; what carries another attempt is not about it."""
        self.prefill_worker = ""
        self.decode_worker = ""
        self.placement = ""
        self.token_ids: list[int] = []
        self._detokenizer = detokenizer
        self._stops = StopStrings(request.stop)
        self._stages = StageClock(request.arrived_at)
        # Tokens that came before their predecessors, by index.
        self._early: dict[int, tuple[int, TokenLogprobs | None]] = {}
        self._alignment = None if request.sampling.logprobs is None else TextAlignment()
        # Whether text goes out as it is, and nothing with it.
        self._passes_through = not request.stop and self._alignment is None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._cached_tokens = 0
        # Number of tokens of the whole answer and why it ends there, once a worker has said so.
        self._end: tuple[int, StopReason] | None = None
        self._kv_bytes = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._details: Details | None = None

    def place(
        self, now: float, prefill_worker: str, decode_worker: str, kind: Kind = Kind.DISAGGREGATED
    ) -> RequestKey:
        """The request leaves the gate for its workers, which may be one, as a new attempt."""
        self.attempt += 1
        self.key = RequestKey(self.request.request_id, self.attempt)
        self.prefill_worker = prefill_worker
        self.decode_worker = decode_worker
        self.placement = kind.value
        self._stages.placed(now)
        return self.key

    def reserved(self, now: float) -> None:
        """The decode worker holds blocks for the attempt in force."""
        self._stages.reserved(now)

    def lost(self, now: float) -> None:
        """The placement came to nothing: back to the gate. The next one begins after the emitted tokens."""
        self._stages.lost(now)
        self._early.clear()
        self._end = None
        self._kv_bytes = 0
        if not self.token_ids:
            self._prompt_logprobs = ()
            self._cached_tokens = 0

    def tokens(self, now: float, batch: TokenBatch) -> Delta | None:
        """Takes tokens of the attempt in force; returns what can be emitted because of them, if anything.

        The delta carries `finish` when the answer is complete; nothing is taken after that.
        """
        if self._details is not None:
            return None
        for stage, seconds in batch.stage_times:
            self._stages.report(stage, seconds)
        self._kv_bytes = max(self._kv_bytes, batch.kv_bytes)
        if batch.stop_reason is not None:
            self._end = (batch.first_index + len(batch.token_ids), batch.stop_reason)
        if batch.first_index == 0 and not self.token_ids:
            self._prompt_logprobs = tuple(batch.prompt_logprobs)
            self._cached_tokens = batch.cached_tokens
        logprobs: Sequence[TokenLogprobs | None] = batch.logprobs or [None] * len(batch.token_ids)
        for index, token in enumerate(zip(batch.token_ids, logprobs, strict=True), start=batch.first_index):
            if index >= len(self.token_ids):
                self._early[index] = token
        return self._emit(now)

    def next_token(self, now: float, index: int, token_id: int) -> Delta | None:
        """`tokens` of a single one with which nothing else comes. Nearly all are like that, so it is what
        costs least."""
        token_ids = self.token_ids
        is_plain = (
            self._passes_through
            and index == len(token_ids) > 0
            and not self._early
            and self._end is None
            and self._details is None
        )
        if not is_plain:
            return self.tokens(now, TokenBatch(index, (token_id,), None))
        token_ids.append(token_id)
        self._stages.tokens(now)
        self.last_token_at = now
        return Delta((token_id,), self._detokenizer.push(token_id), None)

    def fail(self, now: float, outcome: Outcome) -> Details:
        """The request ends without a complete answer (outcome: error or cancelled)."""
        return self._close(now, outcome)

    def _emit(self, now: float) -> Delta | None:
        emitted: list[int] = []
        logprobs: list[TokenLogprobs] = []
        scored: list[ScoredToken] = []
        text: list[str] = []
        reason: FinishReason | None = None
        while reason is None and len(self.token_ids) in self._early:
            token_id, token_logprobs = self._early.pop(len(self.token_ids))
            self.token_ids.append(token_id)
            emitted.append(token_id)
            ended_by = self._ended_by()
            # The token that stops an answer (EOS, say) is counted, but is not text.
            piece = "" if ended_by is StopReason.STOP else self._detokenizer.push(token_id)
            if ended_by is not None:
                piece += self._detokenizer.flush()
                reason = FinishReason(ended_by.value)
            armed = len(self.token_ids) > self.request.sampling.min_tokens
            out, stopped = self._stops.push(piece, armed=armed)
            if stopped:
                reason = FinishReason.STOP
            elif reason is not None:
                out += self._stops.flush()
            text.append(out)
            if self._alignment is not None and token_logprobs is not None:
                logprobs.append(token_logprobs)
                if ended_by is not StopReason.STOP:
                    self._alignment.token(token_logprobs)
                self._alignment.text(len(piece), last=ended_by is not None)
                scored += self._alignment.release(len(out))
        if not emitted:
            return None
        of_prompt, self._prompt_logprobs = self._prompt_logprobs, ()
        if self.first_token_at is None:
            self.first_token_at = now
        self._stages.tokens(now)
        self.last_token_at = now
        finish = None if reason is None else self._finish(now, reason)
        return Delta(
            tuple(emitted), "".join(text), finish, tuple(logprobs), tuple(scored), prompt_logprobs=of_prompt
        )

    def _ended_by(self) -> StopReason | None:
        return self._end[1] if self._end is not None and self._end[0] == len(self.token_ids) else None

    def _finish(self, now: float, reason: FinishReason) -> Finish:
        details = self._close(now, None)
        prompt_tokens = len(self.request.prompt_token_ids)
        return Finish(reason, prompt_tokens, len(self.token_ids), details, self._cached_tokens)

    def _close(self, now: float, failed: Outcome | None) -> Details:
        count = len(self.token_ids)
        ttft_s, tpot_s = None, 0.0
        if self.first_token_at is not None and self.last_token_at is not None:
            ttft_s = self.first_token_at - self.request.arrived_at
            tpot_s = (self.last_token_at - self.first_token_at) / max(1, count - 1)
        self._details = Details(
            request_id=self.request.request_id,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            attempt=self.attempt,
            kv_bytes=self._kv_bytes,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            duration_s=now - self.request.arrived_at,
            stages=self._stages.finish(now),
            outcome=self._judge(ttft_s, tpot_s) if failed is None else failed,
            slo_class=self.request.slo.slo_class,
            limits=self.request.slo.limits,
            placement=self.placement,
        )
        return self._details

    def _judge(self, ttft_s: float | None, tpot_s: float) -> Outcome:
        """The goodput rule for a complete answer; both limits are inclusive."""
        limits = self.request.slo.limits
        match (ttft_s is not None and ttft_s <= limits.ttft_s, tpot_s <= limits.tpot_s):
            case (True, True):
                return Outcome.GOOD
            case (False, True):
                return Outcome.TTFT_MISS
            case (True, False):
                return Outcome.TPOT_MISS
            case _:
                return Outcome.BOTH_MISS
