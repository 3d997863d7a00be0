"""Whether an engine that has work gives signs of doing it. Pure: it is told the time.

Invariant: only time in which somebody looked counts, so that a machine that slept, or an actor that was stopped, is no hung engine.

How long is too long cannot be known beforehand: a forward pass takes a millisecond or a minute. So an engine is given QUIET_SECONDS, as long as any
peer of this system is waited for, or FACTOR times the longest pause it has made between two tokens, whichever is more. Before its first token,
which may have to wait for compilers, it has FIRST_SECONDS. A hung engine then costs minutes, and a slow one is never ended.
"""

from __future__ import annotations

from typing import Final

LOOK_SECONDS: Final = 1.0
FIRST_SECONDS: Final = 1800.0
QUIET_SECONDS: Final = 300.0
FACTOR: Final = 20.0
_LONGEST_LOOK: Final = 5 * LOOK_SECONDS


class Watchdog:
    """Watches one engine by its count of tokens."""

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._num_tokens: int | None = None
        self._was_busy, self._has_sampled = False, False
        self._longest = 0.0
        self.quiet = 0.0
        """Seconds since the last sign while there was work."""

    @property
    def limit(self) -> float:
        """How long it may be quiet."""
        return max(QUIET_SECONDS, FACTOR * self._longest) if self._has_sampled else FIRST_SECONDS

    @property
    def is_hung(self) -> bool:
        """Whether it has been quiet for longer than it may."""
        return self.quiet > self.limit

    def look(self, num_tokens: int, is_busy: bool, now: float) -> None:
        """It has sampled `num_tokens` so far, and has work or not."""
        passed, self._looked_at = min(now - self._looked_at, _LONGEST_LOOK), now
        if self._num_tokens not in (None, num_tokens):
            if self._has_sampled:
                self._longest = max(self._longest, self.quiet)
            self._has_sampled = True
            self.quiet = 0.0
        elif is_busy and self._was_busy:
            self.quiet += passed
        else:
            self.quiet = 0.0
        self._num_tokens, self._was_busy = num_tokens, is_busy

    def sign(self) -> None:
        """It has finished something other than a token, as an update."""
        self.quiet = 0.0
