"""What the ledger knows beside tickets and versions: who is present, and what the run has come to.

Plain records; only the ledger changes them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from protocol.messages import MAX_TEXT, ActorReport

UNHEARD: Final = "not heard since the broker started"
"""What is known of a peer that was there in an earlier life of the broker."""


@dataclass(slots=True)
class ActorState:
    """An actor that is present. `seen_at` is the ledger's time from which its lease runs, `heard_at` that of its last message to this broker."""

    name: str
    epoch: str
    engine: str
    host: str
    seen_at: float
    version: int = -1
    num_wanted: int = 0
    tickets: set[int] = field(default_factory=set)
    report: ActorReport | None = None
    heard_at: float | None = field(default=None, compare=False)

    def is_heard(self, now: float) -> None:
        """A message of it has come."""
        self.seen_at = self.heard_at = now

    def when_heard(self, now: float) -> str:
        """When it was heard last, in words."""
        return UNHEARD if self.heard_at is None else f"seen {now - self.heard_at:.1f} s ago"


@dataclass(slots=True)
class LearnerState:
    """The learner session, and the step whose batch it waits for, if it waits."""

    session: str
    lineage: int
    step: int
    world_size: int
    waiting_step: int | None = None
    waiting_since: float = 0.0


@dataclass(slots=True)
class Progress:
    """What the run has come to. `step` is the next step to be applied in the present lineage."""

    step: int = 0
    lineage: int = -1
    lags: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    notes: list[tuple[int, str]] = field(default_factory=list)
    """The last NUM_NOTES of the learner: step and text."""
    summary: dict[str, float | None] = field(default_factory=dict)
    stopping: str = ""
    ended: bool = False
    halted: str = ""


NUM_NOTES = 8


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures as a fact can hold them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def brief(text: str) -> str:
    """`text` as long as a message may carry it."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 4]} ..."
