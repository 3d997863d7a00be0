"""What somebody was told to ask again later: said in the log at once, then now and then, and when it is over. Knows no clock."""

from __future__ import annotations

import logging
from typing import Final

SAY_SECONDS: Final = 30.0
ASK_AGAIN_SECONDS: Final = 1.0
"""How long whoever was told "not now" waits before it asks again."""


class PutOff:
    """The requests of one peer. `reason` is why the last one is put off, empty if it is not."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self.reason = log, ""
        self._said_at = float("-inf")

    def told(self, request: str, reason: str, now: float) -> None:
        """The other side said "not now" at `now` (monotonic seconds)."""
        self.reason = reason
        if now - self._said_at >= SAY_SECONDS:
            self._said_at = now
            self._log.warning("%s is put off: %s", request, reason)

    def over(self) -> None:
        """The other side has done as it was asked."""
        if self.reason:
            self._log.info("it goes on")
            self.reason, self._said_at = "", float("-inf")
