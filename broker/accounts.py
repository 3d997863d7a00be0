"""What libzmq holds for each connection, and which ones must go. Pure: no sockets, no clock.

Invariant: `held_in` is never more than what libzmq holds of that connection's bytes by HEARTBEAT_RATE times its age, and never less by more than what
was on its way when the connection was first seen.

The kernel says how many bytes libzmq has read, the broker how many of them it was handed in messages. The difference is what libzmq holds,
and heartbeats, which nobody is handed; those come at a known rate, so the part of the difference that grows no faster is forgiven.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple

HEARTBEAT_RATE: Final = 64.0
"""Bytes a second of ZMTP heartbeats, both sides' (41 by count)."""
GREETED_BYTES: Final = 400
"""Whoever has sent more than a greeting and a HELLO (266 bytes) knows the broker's key and has shown its own."""
STANDING_BYTES: Final = 1 << 16
UNFINISHED_SECONDS: Final = 30.0
UNREAD_SECONDS: Final = 10.0
NUM_STRIKES: Final = 3
STALLED_SECONDS: Final = 1.0
MAX_STEP_SECONDS: Final = 0.5
"""More than this between two looks says that nobody looked, not that libzmq did not read."""
MAX_KNOCKING: Final = 256
"""Connections without a handshake; a proper one takes milliseconds, so by then newer ones are no worse than older ones."""

TOO_MUCH: Final = "held too much"
UNFINISHED: Final = "unfinished message"
UNREAD: Final = "does not read"
REPLACED: Final = "replaced by another of its name"
STRUCK: Final = "malformed again and again"
CROWD: Final = "no room for all"
KNOCKING: Final = "too many without a handshake"
TOO_MANY: Final = "too many connections"


class Counts(NamedTuple):
    """Bytes of one connection since it was opened: taken from the kernel by libzmq and from libzmq by the broker, given to libzmq and
    acknowledged by the peer's kernel; `waiting` are those that have come and that libzmq has not read yet."""

    read: int
    delivered: int
    sent: int
    acked: int
    waiting: int = 0


NOTHING: Final = Counts(0, 0, 0, 0)


@dataclass(slots=True, eq=False)
class Account:
    """One connection. `budget` is what libzmq may hold of it."""

    budget: int
    opened_at: float
    counts: Counts = NOTHING
    num_strikes: int = 0
    cut_for: str = ""
    _forgiven: float = field(default=0.0, init=False)
    _gone: int = field(default=0, init=False)
    _seen_at: float = field(default=-1.0, init=False)
    _in_moved_at: float = field(default=0.0, init=False)
    _out_moved_at: float = field(default=0.0, init=False)
    _stalled_for: float = field(default=0.0, init=False)

    def observe(self, counts: Counts, now: float) -> None:
        """Take in the counts at `now`."""
        is_first, was = self._seen_at < 0, self.counts
        unexplained, unacked = counts.read - counts.delivered, counts.sent - counts.acked
        grown = self._forgiven + HEARTBEAT_RATE * (now - self._seen_at)
        self._forgiven = unexplained if is_first else min(grown, unexplained)
        self._gone = unacked if is_first else min(self._gone, unacked)
        if is_first or (counts.read, counts.delivered) != (was.read, was.delivered):
            self._in_moved_at = now
        if is_first or counts.acked != was.acked or not self.held_out:
            self._out_moved_at = now
        is_stalled = counts.waiting > 0 and was.waiting > 0 and counts.read == was.read
        self._stalled_for = self._stalled_for + min(now - self._seen_at, MAX_STEP_SECONDS) if is_stalled else 0.0
        self.counts, self._seen_at = counts, now

    @property
    def held_in(self) -> int:
        """Bytes read from this peer and not handed over: an unfinished message, and whole ones that wait."""
        return int(self.counts.read - self.counts.delivered - self._forgiven)

    @property
    def held_out(self) -> int:
        """Bytes for this peer that it has not taken yet, those in the kernel included."""
        return self.counts.sent - self.counts.acked - self._gone

    @property
    def has_greeted(self) -> bool:
        """Whether it got through the handshake."""
        return self.counts.read >= GREETED_BYTES

    @property
    def heard_at(self) -> float:
        """When bytes last came."""
        return self._in_moved_at

    def verdict(self) -> str:
        """Why this connection must be cut, whatever the others do; empty if it need not."""
        if self.held_in > self.budget:
            return TOO_MUCH
        if self.num_strikes >= NUM_STRIKES:
            return STRUCK
        if self._stalled_for > STALLED_SECONDS:
            return REPLACED  # without a mark for what comes in, libzmq stops reading for no other reason
        if self.held_in > STANDING_BYTES and self._seen_at - self._in_moved_at > UNFINISHED_SECONDS:
            return UNFINISHED
        if self.held_out > STANDING_BYTES and self._seen_at - self._out_moved_at > UNREAD_SECONDS:
            return UNREAD
        return ""


def verdicts(accounts: Collection[Account], room: int, max_connections: int) -> list[tuple[Account, str]]:
    """The connections that must be cut, each with the reason.

    `room` is what libzmq may hold for all of them: beyond it the connections that hold most go first. Of too many connections those go that were
    silent for longest; of too many that did not get through the handshake, the oldest.
    """
    alive = [account for account in accounts if not account.cut_for]
    found = [(account, reason) for account in alive if (reason := account.verdict())]
    alive = [account for account in alive if not account.verdict()]
    held = sum(account.held_in + account.held_out for account in alive)
    if held > room:
        for account in sorted(alive, key=lambda one: one.held_in + one.held_out, reverse=True):
            if held <= room:
                break
            held -= account.held_in + account.held_out
            found.append((account, CROWD))
    knocking = sorted((account for account in alive if not account.has_greeted), key=lambda one: one.opened_at)
    found += [(account, KNOCKING) for account in knocking[: max(0, len(knocking) - MAX_KNOCKING)]]
    if len(alive) > max_connections:
        found += [(account, TOO_MANY) for account in sorted(alive, key=lambda one: one.heard_at)[: len(alive) - max_connections]]
    return found
