"""What placing a request somewhere would mean: for the request, and for those that are there already.

Two kinds of options: a pair of a prefill worker and a writer, and a mixed worker that reads the prompt
itself. An option does harm if

  - those whose prompts it goes before would be late because of it (`spare_s`);
  - the batch that it joins, as it will be at the time of the hand-off, could not keep the tightest limit of
    those in it:

        t_D(B' + 1, K' + L + m / 2) <= min S_eff

    (by today's batch load would swing: Qin et al. 2024, Mooncake). A worker that will be empty then can harm
    nobody;
  - the answers there, this one too, are expected to outgrow the blocks of KV before some of them have ended,
    so that somebody would be preempted (unless it is late, and its turn at the gate);
  - it is lost, and the batch could not grow to twice its size after it. An answer holds its place for many
    times as long as a TTFT limit, so one that can no longer be good would make several others late: late ones
    leave half of the room free (trunk reservation, as in telephone networks), unless it is their turn at the
    gate;
  - a prefill worker could read it, and it is read beside others' decoding all the same, be it of those who
    decode there now or of those who will have been handed over by then, in steps that have no slack for
    USEFUL_CHUNK tokens of a prompt. The worker itself sees to it that nobody is late because of a prompt, by
    chunks as small as need be (decode_worker/chunk_budget.py); but while it creeps on, those who are handed
    over have no slack to make up for the hand-off, and all are at their limits. Where no prefill worker could
    read it, that is how it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.estimates import DecodeEstimate, Estimates, PrefillEstimate
from router.placement.base import Decision, Expected, Kind
from router.pool_view import WorkerView
from router.requests import Request

USEFUL_CHUNK = 16
"""Tokens of a prompt in a step, below which reading beside others hardly gets on."""


@dataclass(frozen=True, slots=True)
class Option:
    """prefill: None if `writer` reads the prompt itself. wait_s: until it begins to. ttft_s: until the first
    token, from now on. decode: of the writer, when the answer gets there. tpot_s: on the average over the
    answer, the wait for the hand-off included. keeps_tpot: whether the second token of a short answer would
    not come too late because of the hand-off."""

    kind: Kind
    prefill: WorkerView | None
    writer: WorkerView
    wait_s: float
    ttft_s: float
    transfer_s: float
    decode: DecodeEstimate
    tpot_s: float
    does_harm: bool
    keeps_tpot: bool = True

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

    def __init__(
        self,
        estimates: Estimates,
        request: Request,
        now: float,
        *,
        is_lost: bool = False,
        leaves_room: bool = False,
    ) -> None:
        self._estimates = estimates
        self._request = request
        self._now = now
        self._is_lost = is_lost
        self._leaves_room = leaves_room
        self._tpot_s = request.slo.limits.tpot_s
        self._least_tokens, self._usual_tokens, _ = estimates.lengths.quantiles(request)
        idle = None if is_lost else estimates.idle(request)
        self._tpot_counts = not is_lost and (idle is None or idle[1] <= self._tpot_s)
        # A late one whose turn it is goes in all the same, or small ones would pass a large one for ever.
        self._heeds_room = not is_lost or leaves_room
        self._outgrown: dict[str, bool] = {}

    def read(self, worker: WorkerView) -> PrefillEstimate:
        """By a prefill worker."""
        return self._estimates.prefill(worker, self._request, self._now, told=not self._is_lost)

    def pair(self, reader: WorkerView, read: PrefillEstimate, booked_s: float, writer: WorkerView) -> Option:
        """booked_s: work that comes to the reader before this request does."""
        travelling = self._request.num_tokens - self._estimates.cached_tokens(writer, self._request)
        transfer_s = self._estimates.transfer_s(reader, writer, travelling)
        wait_s, ttft_s = booked_s + read.wait_s, booked_s + read.ttft_s
        decode = self._estimates.decode(writer, self._request, ttft_s + transfer_s, self._now)
        does_harm = (
            read.compute_s > read.spare_s
            or self._harms_batch(writer, decode)
            or self._is_held_up(writer, decode, ttft_s, transfer_s)
        )
        second_s = max(transfer_s, self._estimates.transfers.second_token_s)
        keeps_tpot = not self._tpot_counts or second_s <= max(0.0, self._affords_s(decode))
        tpot_s = decode.step_s
        if writer.latency.model.is_known:  # or steps take no time, and load decides
            tpot_s += transfer_s / max(1, self._usual_tokens - 1)
        return Option(
            Kind.DISAGGREGATED,
            reader,
            writer,
            wait_s,
            ttft_s,
            transfer_s,
            decode,
            tpot_s,
            does_harm,
            keeps_tpot,
        )

    def local(self, worker: WorkerView, booked_s: float, *, could_be_handed_over: bool) -> Option:
        """By a mixed worker that reads it itself. could_be_handed_over: a prefill worker could read it."""
        read = self._estimates.local(worker, self._request, self._now, told=not self._is_lost)
        wait_s, ttft_s = booked_s + read.wait_s, booked_s + read.ttft_s
        decode = self._estimates.decode(worker, self._request, ttft_s, self._now)
        does_harm = read.compute_s > read.spare_s or self._harms_batch(worker, decode)
        if could_be_handed_over and not does_harm:
            size = worker.writing.now.size
            does_harm = (
                (size > 0 and read.slack_tokens < USEFUL_CHUNK)
                or not self._has_slack(worker, decode, own=False)
                or (
                    decode.batch - 1 > size == 0
                    and self._stall_s(worker, read.compute_s) > self._affords_s(decode)
                )
            )
        return Option(Kind.LOCAL, None, worker, wait_s, ttft_s, 0.0, decode, decode.step_s, does_harm)

    def _outgrows(self, writer: WorkerView) -> bool:
        """Of the same writer several readers ask."""
        found = self._outgrown.get(writer.worker_id)
        if found is None:
            found = self._outgrown[writer.worker_id] = self._estimates.outgrows(writer, self._request)
        return found

    def _is_held_up(
        self, writer: WorkerView, decode: DecodeEstimate, ttft_s: float, transfer_s: float
    ) -> bool:
        """Whether a writer that will still read prompts of its own is no place to be handed over to."""
        left_s = writer.reading.backlog_s(self._now, 0.0) - ttft_s if len(writer.reading) else 0.0
        if left_s <= 0:
            return False
        stall_s = decode.limit_s if decode.batch > 1 else self._stall_s(writer, left_s)
        return transfer_s + stall_s > self._affords_s(decode) or not self._has_slack(writer, decode, own=True)

    def _stall_s(self, worker: WorkerView, read_s: float) -> float:
        """How long who comes may wait for a step of a worker that reads, and where nobody decodes."""
        latency = worker.latency
        return min(read_s, latency.corrected_s(latency.model.prefill_s(worker.capacity.max_batch_tokens)))

    def _affords_s(self, decode: DecodeEstimate) -> float:
        """How long the second token of a short answer may wait: (m_lo - 1) * (S - t_D)."""
        return max(1, self._least_tokens - 1) * (self._tpot_s - decode.step_s)

    def _has_slack(self, worker: WorkerView, decode: DecodeEstimate, *, own: bool) -> bool:
        """Whether the batch of then keeps its limit with a chunk of a prompt in its steps. own: with this
        request in the batch."""
        size, context = decode.batch, decode.context
        if not own:
            size, context = size - 1, context * (size - 1) // size
        latency = worker.latency
        step_s = latency.model.mixed_s(size, context, USEFUL_CHUNK, self._request.num_tokens)
        return size == 0 or latency.corrected_s(step_s) <= decode.limit_s

    def _has_room_for_as_many(self, writer: WorkerView, decode: DecodeEstimate) -> bool:
        """Whether the batch of then, this request in it, could grow to twice its size."""
        latency = writer.latency
        step_s = latency.corrected_s(latency.model.decode_s(2 * decode.batch, 2 * decode.context))
        return step_s <= _others_limit_s(writer, decode)

    def _harms_batch(self, writer: WorkerView, decode: DecodeEstimate) -> bool:
        if decode.batch > 1 and self._heeds_room and self._outgrows(writer):
            return True
        if self._leaves_room and decode.batch > 1:
            return not self._has_room_for_as_many(writer, decode)
        if decode.is_feasible or decode.batch == 1:
            return False
        if self._tpot_counts or decode.limit_s < self._tpot_s:
            return True
        return decode.step_s > _others_limit_s(writer, decode)


def _others_limit_s(writer: WorkerView, decode: DecodeEstimate) -> float:
    """The tightest limit of those who are there already."""
    latency = writer.latency
    alone_s = latency.corrected_s(latency.model.decode_s(1, decode.context // decode.batch))
    return writer.writing.limit_s(alone_s)
