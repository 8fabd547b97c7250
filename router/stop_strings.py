"""Finding stop strings in text that arrives piece by piece, without ever letting out a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until a stop string is complete.

    The answer ends at the first position where some stop string is complete; if several end there, the
    longest counts. The text is what stands before it. Text that may turn out to be the beginning of a stop
    string is held back. The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: non-empty strings; none means that all text passes at once."""
        self._stops = tuple(stops)
        self._held = ""
        self._longest = max((len(stop) for stop in stops), default=0)

    def push(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """Takes the next piece; returns (text that may go out, whether a stop string was found).

        armed: False lets stop strings that are complete with this piece pass (the answer is still below
        min_tokens). After True was returned nothing more may be pushed.
        """
        if not self._stops or not text:
            return text, False
        window = self._held + text
        if armed and (match := self._first_match(window, already=len(self._held))) is not None:
            self._held = ""
            return window[:match], True
        keep = self._possible_start(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def flush(self) -> str:
        """The text held back, when the answer has ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, already: int) -> int | None:
        """Start of the stop string that ends first, past the `already` characters seen before, or None."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, already - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _possible_start(self, window: str) -> int:
        """Length of the longest end of `window` that is a proper beginning of a stop string."""
        for length in range(min(len(window), self._longest - 1), 0, -1):
            tail = window[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
