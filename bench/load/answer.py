"""What comes back of one request, noted as it comes: the clock's half of the rule of goodput.

- TTFT: from sending to the first chunk with a token. A chunk without one (chat begins with such) is none.
- The last token comes with the last chunk that has text, or with the one that has the finish reason: what a
  tokenizer or a stop string keeps back has no text, but was computed.
- An error anywhere in the stream is a failure, whatever the status of the response was.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from cluster.workload.jobs import Job, Row, Status

_GOOD_REASONS = ("stop", "length")


class Answer:
    """The answer to one request. A target tells it what comes, and everything else reads the row."""

    def __init__(self, job: Job, started_at: float, clock: Callable[[], float]) -> None:
        """started_at: of the whole run, by the same clock. The request counts as sent now."""
        self._job = job
        self._clock = clock
        self._sent_at = clock()
        self._started_at = started_at
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._gaps: array[float] = array("d")
        self._num_tokens = 0
        self._told = (0, 0)
        self._reason: str | None = None
        self._failure: tuple[Status, str] | None = None
        self._stages: Mapping[str, float] = {}

    @property
    def has_begun(self) -> bool:
        """A token has come."""
        return self._first_s is not None

    def tokens(self, count: int) -> None:
        """A chunk with `count` tokens has come; 1 where the number is not known."""
        now_s = self._clock() - self._sent_at
        if self._last_s is None:
            self._first_s = now_s
        else:
            self._gaps.append(now_s - self._last_s)
        self._last_s = now_s
        self._num_tokens += count

    def finish(self, reason: str) -> None:
        """The server says why the answer ends."""
        self._reason = reason
        if self._last_s is not None:
            self._last_s = self._clock() - self._sent_at

    def usage(self, prompt_tokens: int, output_tokens: int) -> None:
        """The server says how many tokens there were."""
        self._told = (prompt_tokens, output_tokens)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """The server says where the time went."""
        self._stages = seconds

    def fail(self, message: str, status: Status = Status.FAILED) -> None:
        """The first failure is the one that counts."""
        self._failure = self._failure or (status, message)

    def row(self) -> Row:
        """What there is to say, once nothing more comes."""
        status, error = self._verdict()
        prompt_tokens, output_tokens = self._told
        return Row(
            arrival_s=self._job.arrival_s,
            sent_s=self._sent_at - self._started_at,
            prompt_tokens=prompt_tokens or len(self._job.prompt_token_ids),
            output_tokens=output_tokens or self._num_tokens,
            status=status,
            first_s=self._first_s,
            last_s=self._last_s,
            gaps_s=self._gaps,
            stages=self._stages,
            error=error,
        )

    def _verdict(self) -> tuple[Status, str]:
        if self._failure is not None:
            return self._failure
        if self._reason is None:
            return Status.FAILED, "the stream ended without a finish reason"
        if self._reason not in _GOOD_REASONS:
            return Status.FAILED, f"finish reason {self._reason!r}"
        if self._first_s is None:
            return Status.FAILED, "complete without a token"
        return Status.COMPLETE, ""
