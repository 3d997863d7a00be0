"""Whether a run moves. Pure: it is told what there is to see, and when.

Invariant: a deadlock is called only if nothing moved for DEADLOCK_SECONDS and everything was up all that time.
"""

from __future__ import annotations

from typing import Final

CEASEFIRE_SECONDS: Final = 12.0
"""A run that has not moved for this long is left alone until it does."""
DEADLOCK_SECONDS: Final = 30.0


class Watch:
    """What is known of a run's progress; all times are in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._step = -1
        self._moved_at = now
        self._up_since: float | None = None

    def at_step(self, step: int, now: float) -> None:
        """The learner is at `step`: forwards, or back at a checkpoint from which it goes on."""
        if step != self._step:
            self._step, self._moved_at = step, now

    def up(self, is_up: bool, now: float) -> None:
        """Whether every process is there and none is stopped."""
        if not is_up:
            self._up_since = None
        elif self._up_since is None:
            self._up_since = now

    def still_for(self, now: float) -> float:
        """How long the run has not moved."""
        return now - self._moved_at

    def holds_fire(self, now: float) -> bool:
        """Whether the run needs to be left alone to move again."""
        return self.still_for(now) >= CEASEFIRE_SECONDS

    def is_deadlocked(self, now: float) -> bool:
        """Whether it does not move though nothing is in its way."""
        return self._up_since is not None and min(now - self._up_since, self.still_for(now)) >= DEADLOCK_SECONDS
