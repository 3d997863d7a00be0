"""What the broker did not take, counted by channel and reason.

Invariant: every refusal is counted; of each kind at most one in LOG_SECONDS is logged, with how many were left out, so no peer can fill the disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

LOG_SECONDS: Final = 10.0


class TurnedAway:
    """The counts of one process; may be used from any thread."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock, self._lock = log, clock, threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}
        """When a kind was last logged, and how many there had been by then."""

    def count(self, channel: str, reason: str) -> None:
        """Something that happens to honest peers too: only counted."""
        with self._lock:
            self._counts[f"{channel}: {reason}"] += 1

    def refuse(self, channel: str, reason: str, detail: str) -> None:
        """Count, and say so unless it was said just now."""
        kind, now = f"{channel}: {reason}", self._clock()
        with self._lock:
            self._counts[kind] += 1
            logged_at, before = self._logged.get(kind, (float("-inf"), 0))
            if now - logged_at < LOG_SECONDS:
                return
            num_left_out = self._counts[kind] - before - 1
            self._logged[kind] = now, self._counts[kind]
        left_out = f" ({num_left_out} more of these since the last such line)" if num_left_out else ""
        self._log.warning("turned away on %s: %s: %s%s", channel, reason, detail[:512], left_out)

    def counts(self) -> dict[str, int]:
        """Numbers so far, by "channel: reason"."""
        with self._lock:
            return dict(sorted(self._counts.items()))
