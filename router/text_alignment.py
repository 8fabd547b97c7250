"""Letting log-probabilities out together with the text of their tokens. A core.

A token's text may come later than the token (half a character), go out later still (it may begin a stop
string), or never (a stop string cut it off); its log-probability does the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.sequence import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token whose text is out. start: the character of the answer's text at which its own begins."""

    logprobs: TokenLogprobs
    start: int


class TextAlignment:
    """Told of every token, of the text they complete, and of the text that goes out."""

    def __init__(self) -> None:
        self._incomplete: list[TokenLogprobs] = []
        # With the end of the token's text in the answer's text.
        self._complete: deque[tuple[ScoredToken, int]] = deque()
        self._num_known = 0
        self._num_out = 0

    def token(self, logprobs: TokenLogprobs) -> None:
        """The next token of the answer."""
        self._incomplete.append(logprobs)

    def text(self, num_chars: int, *, last: bool) -> None:
        """All tokens so far have made so many more characters certain; 0 unless their text is complete.

        last: the answer ends, so their text is complete.
        """
        start = self._num_known
        self._num_known += num_chars
        if num_chars or last:
            self._complete.extend((ScoredToken(one, start), self._num_known) for one in self._incomplete)
            self._incomplete.clear()

    def release(self, num_chars: int) -> list[ScoredToken]:
        """So many more characters go out; the tokens whose whole text is out now."""
        self._num_out += num_chars
        released: list[ScoredToken] = []
        while self._complete and self._complete[0][1] <= self._num_out:
            released.append(self._complete.popleft()[0])
        return released
