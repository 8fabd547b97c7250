"""What the router learns from what workers say and from how requests fare: the other half of the estimates.

    snapshots      loads, and how long steps took   --> the worker's view
    block events   what is in its prefix cache      --> the prefix index
    tokens         how far an answer is             --> the view of who writes it
    hand-offs      how long the tail took           --> the estimates
    finished       how long the answer was          --> the output lengths

What was predicted when a request was placed is compared with what came (`prelay_prediction_error_ratio`).
"""

from __future__ import annotations

from prelay.v1 import worker_pb2

from router import commands
from router.estimates import Estimates
from router.lengths import OutputLengths
from router.live import CommandLink, LiveRequest
from router.metrics import RouterMetrics
from router.pair_table import Pair
from router.pool_view import PoolView
from router.prefix_index import PrefixIndex
from router.requests import Delta, Finish


class Learning:
    """Told of events by the dispatcher."""

    def __init__(
        self,
        pool: PoolView,
        prefixes: PrefixIndex,
        lengths: OutputLengths,
        estimates: Estimates,
        metrics: RouterMetrics,
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._lengths = lengths
        self._estimates = estimates
        self._metrics = metrics

    def snapshot(self, link: CommandLink, snapshot: worker_pb2.Snapshot, now: float) -> None:
        """A worker says how it is."""
        view = self._pool[link.worker_id]
        view.snapshot(commands.load(snapshot), now)
        for step in snapshot.steps:
            view.observe(commands.step_shape(step), step.seconds)

    def blocks(self, link: CommandLink, events: worker_pb2.BlockEvents) -> None:
        """A worker says what came into its prefix cache and what left it."""
        for event in events.events:
            self._prefixes.removed(link.worker_id, event.removed)
            self._prefixes.stored(link.worker_id, event.stored)

    def forget(self, worker_id: str) -> None:
        """The worker is gone: what its cache held is gone with it."""
        self._prefixes.forget(worker_id)

    def tokens(self, live: LiveRequest, delta: Delta, now: float) -> None:
        """More of an answer is out."""
        if live.decode is not None:
            self._pool[live.decode.worker_id].emitted(live.record.key, len(delta.token_ids))
        first_of_placement = len(live.record.token_ids) - len(delta.token_ids) == len(live.request.answered)
        if first_of_placement and live.expected is not None:
            self._metrics.predicted("ttft", live.expected.ttft_s, now - live.placed_at)
        if delta.finish is not None:
            self._finished(live, delta.finish)

    def handed_over(self, live: LiveRequest, times: worker_pb2.StageTimes, now: float) -> None:
        """A decode worker has got a request, and says how long it waited for the last of its KV."""
        record = live.record
        pair = Pair(record.prefill_worker, record.decode_worker)
        self._estimates.transfers.observe(pair, live.travelling_tokens, times.transfer_s)
        if live.expected is not None:
            self._metrics.predicted("transfer", live.expected.transfer_s, times.transfer_s)
            if record.last_token_at is not None:
                step_s = live.expected.tpot_s
                gap_s = now - record.last_token_at - step_s
                self._estimates.transfers.observe_second_token(gap_s, step_s)

    def _finished(self, live: LiveRequest, finish: Finish) -> None:
        self._lengths.observe(live.request, finish.completion_tokens)
        undisturbed = not live.request.answered and finish.completion_tokens > 1
        if undisturbed and live.expected is not None:
            self._metrics.predicted("tpot", live.expected.tpot_s, finish.details.tpot_s)
