"""What placing a request somewhere would mean: for the request, and for those that are there already.

Two kinds of options: a pair of a prefill worker and a writer, and a mixed worker that reads the prompt
itself. An option does harm if

  - those whose prompts it goes before would be late because of it (`spare_s`);
  - the batch that it joins, as it will be at the time of the hand-off, could not keep the tightest limit of
    those in it:

        t_D(B' + 1, K' + L + m / 2) * exp(q) <= min S_eff

    (by today's batch load would swing: Qin et al. 2024, Mooncake). A worker that will be empty then can harm
    nobody;
  - it is read beside others' decoding, in steps that have no slack for chunks of a prompt (Agrawal et al.
    2024, Sarathi-Serve).
"""

from __future__ import annotations

from dataclasses import dataclass

from router.estimates import MIN_CHUNK, DecodeEstimate, Estimates, PrefillEstimate
from router.placement.base import Decision, Expected, Kind
from router.pool_view import WorkerView
from router.requests import Request


@dataclass(frozen=True, slots=True)
class Option:
    """prefill: None if `writer` reads the prompt itself. wait_s: until it begins to. ttft_s: until the first
    token, from now on. decode: of the writer, when the answer gets there."""

    kind: Kind
    prefill: WorkerView | None
    writer: WorkerView
    wait_s: float
    ttft_s: float
    transfer_s: float
    decode: DecodeEstimate
    does_harm: bool

    @property
    def reader(self) -> WorkerView:
        return self.writer if self.prefill is None else self.prefill

    def decision(self) -> Decision:
        """Placing the request here."""
        prefill = None if self.prefill is None else self.prefill.worker_id
        expected = Expected(self.ttft_s, self.decode.step_s, self.transfer_s)
        return Decision(self.kind, prefill, self.writer.worker_id, expected)


class Options:
    """Of one request at one moment.

    is_lost: it cannot be good any more, so its own limits count for nothing and it goes before nobody. The
    TPOT limit does not count either if no worker could keep it that has nothing else to do.
    """

    def __init__(self, estimates: Estimates, request: Request, now: float, *, is_lost: bool) -> None:
        self._estimates = estimates
        self._request = request
        self._now = now
        self._is_lost = is_lost
        self._tpot_s = request.slo.limits.tpot_s
        idle = None if is_lost else estimates.idle(request)
        self._tpot_counts = not is_lost and (idle is None or idle[1] <= self._tpot_s)

    def read(self, worker: WorkerView) -> PrefillEstimate:
        """By a prefill worker."""
        return self._estimates.prefill(worker, self._request, self._now, told=not self._is_lost)

    def pair(self, reader: WorkerView, read: PrefillEstimate, booked_s: float, writer: WorkerView) -> Option:
        """booked_s: work that comes to the reader before this request does."""
        travelling = self._request.num_tokens - self._estimates.cached_tokens(writer, self._request)
        transfer_s = self._estimates.transfer_s(reader, writer, travelling)
        wait_s, ttft_s = booked_s + read.wait_s, booked_s + read.ttft_s
        decode = self._estimates.decode(writer, self._request, ttft_s + transfer_s, self._now)
        does_harm = read.compute_s > read.spare_s or self._harms_batch(writer, decode)
        if not does_harm and len(writer.reading) and writer.reading.backlog_s(self._now, 0.0) > ttft_s:
            does_harm = not self._has_slack(writer, decode.batch, decode.context, decode.limit_s)
        return Option(Kind.DISAGGREGATED, reader, writer, wait_s, ttft_s, transfer_s, decode, does_harm)

    def local(self, worker: WorkerView, booked_s: float) -> Option:
        """By a mixed worker that reads it itself."""
        read = self._estimates.local(worker, self._request, self._now, told=not self._is_lost)
        wait_s, ttft_s = booked_s + read.wait_s, booked_s + read.ttft_s
        decode = self._estimates.decode(worker, self._request, ttft_s, self._now)
        does_harm = read.compute_s > read.spare_s or self._harms_batch(worker, decode)
        does_harm = does_harm or (read.slack_tokens < MIN_CHUNK and worker.writing.now.size > 0)
        if not does_harm and decode.batch > 1:
            others = decode.context * (decode.batch - 1) // decode.batch
            does_harm = not self._has_slack(worker, decode.batch - 1, others, decode.limit_s)
        return Option(Kind.LOCAL, None, worker, wait_s, ttft_s, 0.0, decode, does_harm)

    def _has_slack(self, worker: WorkerView, batch: int, context: int, limit_s: float) -> bool:
        """Whether a step of the batch still keeps the limit with the least chunk of a prompt in it."""
        latency = worker.latency
        step_s = latency.corrected_s(
            latency.model.mixed_s(batch, context, MIN_CHUNK, self._request.num_tokens)
        )
        return step_s * latency.margin <= limit_s

    def _harms_batch(self, writer: WorkerView, decode: DecodeEstimate) -> bool:
        if decode.is_feasible or decode.batch == 1:
            return False
        if self._tpot_counts or decode.limit_s < self._tpot_s:
            return True
        latency = writer.latency
        alone_s = latency.corrected_s(latency.model.decode_s(1, decode.context // decode.batch))
        return decode.promise_s > writer.writing.limit_s(alone_s)
