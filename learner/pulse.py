"""The ranks' signs of life to one another, beside the training: a rank that waits in a collective knows whether the others still live.

Collectives have no deadline of their own, because rank 0 may rightly wait for hours, for a batch or for room on a disk, while the others wait for
it in one. So every rank shows a pulse instead, from a thread, and how many collectives it has entered and left. A rank whose pulse stops is lost,
and when all are inside the same collective for very long, the network is: then this process ends, and torchrun or whoever supervises it starts
all ranks again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

log = logging.getLogger("learner")
PULSE_SECONDS: Final = 1.0
SAY_SECONDS: Final = 10.0
LOST_SECONDS: Final = 300.0
"""A rank without a pulse for this long is lost; before that a library may hold its interpreter, as in writing a checkpoint."""
START_SECONDS: Final = 1800.0
"""A rank that has shown none yet is still starting, up to this."""
STUCK_SECONDS: Final = 3600.0
"""No collective takes this long once all ranks have entered it."""


class Vitals(NamedTuple):
    """What one rank shows: beats of its pulse, collectives entered and left, and whether it has left in order."""

    beats: int
    entered: int
    left: int
    has_left: bool


@dataclass(slots=True)
class _Seen:
    vitals: Vitals
    at: float


class Watch:
    """What the ranks show, and what follows from it. Pure: it is told the time (monotonic seconds)."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._together: tuple[int, float] | None = None
        """The collective that all ranks are inside of, and since when."""

    def observe(self, vitals: dict[int, Vitals], now: float) -> None:
        """All ranks by number, as they show themselves at `now`."""
        for rank, found in vitals.items():
            seen = self._seen.get(rank)
            if seen is None or found.beats != seen.vitals.beats:
                self._seen[rank] = _Seen(found, now)
            else:
                seen.vitals = found
        inside = {found.entered for found in vitals.values() if found.entered > found.left}
        if len(inside) != 1 or any(found.entered <= found.left for found in vitals.values()):
            self._together = None
        elif self._together is None or self._together[0] not in inside:
            self._together = (inside.pop(), now)

    def silent(self, now: float) -> dict[int, float]:
        """Ranks that have shown no pulse for SAY_SECONDS, and for how many they have not."""
        found = {rank: now - seen.at for rank, seen in self._seen.items() if not seen.vitals.has_left}
        return {rank: seconds for rank, seconds in found.items() if seconds > SAY_SECONDS}

    def lost(self, now: float) -> str:
        """Why waiting on has become useless, in words; empty as long as it has not."""
        for rank, seconds in self.silent(now).items():
            if seconds > (LOST_SECONDS if self._seen[rank].vitals.beats else START_SECONDS):
                return f"rank {rank} has given no sign of life for {seconds:.0f} s"
        if self._together is not None and now - self._together[1] > STUCK_SECONDS:
            return f"all ranks have been inside collective {self._together[0]} for {now - self._together[1]:.0f} s"
        return ""


class Pulse(threading.Thread):
    """Shows this rank's pulse and watches the others'.

    consumes:     what the other ranks show, in torch.distributed's store
      waits for:    the clock
      unblocked by: time, or `stop`
    produces:     this rank's own; a line about a rank that is silent; the end of this process once one is lost
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        monotonic: Callable[[], float] = time.monotonic,
        end: Callable[[], object] = lambda: os._exit(1),
    ) -> None:
        """`store` belongs to this thread. `end` ends the process."""
        super().__init__(name="pulse", daemon=True)
        self._store, self._rank, self._world_size = store, rank, world_size
        self._monotonic, self._end = monotonic, end
        self._watch, self._stopped = Watch(), threading.Event()
        self._said: set[int] = set()
        self._entered = self._left = self._shown_entered = self._shown_left = 0
        self.waits = ""
        """Which ranks are silent, in words; empty if none is."""

    def enter(self) -> None:
        """This rank's training thread enters a collective."""
        self._entered += 1

    def leave(self) -> None:
        """It has left it."""
        self._left += 1

    def run(self) -> None:
        try:
            while not self._stopped.wait(PULSE_SECONDS):
                self.beat()
            self._store.add(f"gone/{self._rank}", 1)
        except RuntimeError as error:
            # The store lives with torchrun. Its end is noticed by whoever supervises it, and on this machine ends this process.
            log.warning("the other ranks' signs of life cannot be seen any more: %s", error)

    def beat(self) -> None:
        """Show the pulse once and look at all."""
        entered, left = self._entered, self._left
        self._store.add(f"beats/{self._rank}", 1)
        self._store.add(f"left/{self._rank}", left - self._shown_left)
        self._store.add(f"entered/{self._rank}", entered - self._shown_entered)
        self._shown_entered, self._shown_left = entered, left
        now = self._monotonic()
        self._watch.observe({rank: self._vitals(rank) for rank in range(self._world_size)}, now)
        silent = self._watch.silent(now)
        self.waits = ", ".join(f"rank {rank} last heard {seconds:.0f} s ago" for rank, seconds in silent.items())
        for rank in silent.keys() - self._said:
            log.warning("rank %d has not been heard for %.0f s; after %.0f s all ranks are started again", rank, silent[rank], LOST_SECONDS)
        self._said = set(silent)
        lost = self._watch.lost(now)
        if lost:
            log.critical("%s: ending this rank, so that all are started again from the newest checkpoint", lost)
            self._end()

    def _vitals(self, rank: int) -> Vitals:
        beats, entered, left, gone = (int(self._store.add(f"{what}/{rank}", 0)) for what in ("beats", "entered", "left", "gone"))
        return Vitals(beats, entered, left, gone > 0)

    def stop(self) -> None:
        """Leave in order."""
        self._stopped.set()
        self.join()
