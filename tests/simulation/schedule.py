"""Time, chance and processes of a simulation, in one thread.

Invariant: everything that happens is an action taken from one heap, and everything random comes from one generator, so a seed fixes the order
of all events. Nothing here knows what is simulated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from random import Random

Loop = Generator[float, None, None]
"""A loop of a process: yields how many seconds it waits at most; a wait that is not a `Sleep` also ends when something changes."""


class Sleep(float):
    """Seconds that nothing cuts short."""


class ProcessEnded(Exception):
    """Raised by a loop: the process ends because of `reason`."""


class Schedule:
    """The heap of what is to happen. `now` is true time in seconds, which no process sees."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.random, self.now = Random(seed), 0.0
        self.trace: list[str] | None = [] if keep_trace else None
        self.num_events = 0
        self._heap: list[tuple[float, float, int, Callable[[], None]]] = []

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let `action` happen; what falls on the same instant happens in an order that is drawn."""
        self.num_events += 1
        heapq.heappush(self._heap, (self.now + seconds, self.random.random(), self.num_events, action))

    def step(self) -> bool:
        """Let the next action happen; False if there is none."""
        if not self._heap:
            return False
        self.now, _, _, action = heapq.heappop(self._heap)
        action()
        return True

    def note(self, *parts: object) -> None:
        """A line of the trace, if one is kept."""
        if self.trace is not None:
            self.trace.append(f"{self.now:12.6f}  " + " ".join(str(part) for part in parts))


class Process:
    """Loops that live and die together, with a clock of their own."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule, self.name = schedule, name
        self.alive, self.frozen = True, False
        self.ended = ""
        self._rate = schedule.random.uniform(0.97, 1.03)
        self._offset = schedule.random.uniform(0.0, 1e6)
        self._turns: dict[Loop, int] = {}
        self._asleep: set[Loop] = set()
        self._missed: list[Callable[[], None]] = []
        self._is_waking = False

    def clock(self) -> float:
        """Monotonic seconds as this process reads them: from anywhere, and a little fast or slow."""
        return self._offset + self.schedule.now / self._rate

    def spawn(self, loop: Loop) -> None:
        """Start a loop."""
        self._turns[loop] = 0
        self.schedule.after(0.0, lambda: self._go(loop, 0))

    def wake(self) -> None:
        """Something has changed: let every loop that waits look."""
        if not self._is_waking:
            self._is_waking = True
            self.schedule.after(0.0, self._look)

    def meet(self, arrival: Callable[[], None]) -> None:
        """Something arrives: now, or when the process goes on again."""
        if self.frozen:
            self._missed.append(arrival)
        elif self.alive:
            arrival()
            self.wake()

    def kill(self, reason: str) -> None:
        """End at once: no loop runs any further."""
        if self.alive:
            self.alive, self.ended = False, reason
            self.schedule.note(self.name, "ends:", reason)
            self._turns.clear()
            self._missed.clear()

    def freeze(self) -> None:
        """Stop without noticing."""
        self.frozen = True

    def thaw(self) -> None:
        """Go on where it stopped, with everything that has come meanwhile."""
        if self.frozen and self.alive:
            self.frozen = False
            missed, self._missed = self._missed, []
            for arrival in missed:
                arrival()
            self.wake()

    def _look(self) -> None:
        self._is_waking = False
        for loop, turn in list(self._turns.items()):
            if loop not in self._asleep:
                self._go(loop, turn)

    def _go(self, loop: Loop, turn: int) -> None:
        if not self.alive or self._turns.get(loop) != turn:
            return
        if self.frozen:
            self._missed.append(lambda: self._go(loop, turn))
            return
        self._turns[loop] = turn + 1
        self._asleep.discard(loop)
        try:
            seconds = next(loop)
        except StopIteration:
            self._turns.pop(loop, None)
            self.wake()
            return
        except ProcessEnded as reason:
            self.kill(str(reason))
            return
        if isinstance(seconds, Sleep):
            self._asleep.add(loop)
        self.schedule.after(seconds * self._rate, lambda: self._go(loop, turn + 1))
