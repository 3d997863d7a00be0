"""One ROUTER of the broker, with an eye on who sends how much.

Invariant: every byte that libzmq hands over or is given is entered under the descriptor of its connection. One thread receives and sends; another,
the guard, reads the counts and takes the strikes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import zmq

from broker.accounts import NUM_STRIKES
from broker.limits import Limits
from broker.turned_away import TurnedAway
from protocol.errors import MalformedFrame

NUM_KEPT: Final = 4
CURVE_BYTES: Final = 33
"""What encryption adds to a frame."""
OFTEN_SENT: Final = 16
"""A message of more frames than this is no mistake of a peer's but an attack: it costs all strikes at once."""


class Received(NamedTuple):
    """A message: the sender's routing id, its frames (of more than four only four, which is enough to refuse it), the descriptor of its connection
    and its size in bytes as it was on the wire."""

    identity: bytes
    frames: list[bytes]
    descriptor: int
    num_bytes: int
    num_frames: int


class Door:
    """Receives and sends whole messages, and turns away what is malformed."""

    def __init__(self, name: str, router: zmq.Socket[Any], limits: Limits, turned_away: TurnedAway) -> None:
        self.name, self.socket, self.limits, self.turned_away = name, router, limits, turned_away
        self.delivered: defaultdict[int, int] = defaultdict(int)
        self.sent: defaultdict[int, int] = defaultdict(int)
        """Bytes by descriptor, ever; descriptors are used again, so what counts is the growth since a connection was opened."""
        self.num_drained = 0
        """How often nothing was waiting: whatever came of connections that ended before has been handed over by then."""
        self.strikes: deque[tuple[int, int]] = deque()
        self.replaced: deque[tuple[int, int]] = deque()
        """Connections whose routing id another one has taken, so that libzmq does not read from them any more: the descriptor, and its bytes ever by
        then, which tell them from a later connection of the same number. Those that nobody was heard on are missing; see `Account.verdict`."""
        self._descriptors: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}

    def receive(self) -> Received:
        """The next message. Raises zmq.Again if there is none."""
        try:
            first = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self.num_drained += 1
            raise
        identity, descriptor = first.bytes, int(first.get(zmq.SRCFD))
        frames: list[bytes] = []
        num_bytes = num_frames = 0
        while self.socket.getsockopt(zmq.RCVMORE):
            frame = self.socket.recv()
            num_bytes += wire_bytes(len(frame))
            num_frames += 1
            if len(frames) < NUM_KEPT:
                frames.append(frame)
        self.delivered[descriptor] += num_bytes
        self._remember(identity, descriptor)
        return Received(identity, frames, descriptor, num_bytes, num_frames)

    def wait(self, milliseconds: int) -> bool:
        """Whether a message comes within so long."""
        if self.socket.poll(milliseconds):
            return True
        self.num_drained += 1
        return False

    def send(self, identity: bytes, frames: Sequence[bytes | memoryview]) -> None:
        """Give a message to libzmq, or drop and count it if the peer is gone or takes no more: whoever misses it asks again."""
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.turned_away.count(self.name, "answer to a peer that is gone" if error.errno == zmq.EHOSTUNREACH else "answer not taken")
            return
        descriptor = self._descriptors.get(identity)
        if descriptor is not None:
            self.sent[descriptor] += sum(wire_bytes(len(frame)) for frame in frames)

    def _remember(self, identity: bytes, descriptor: int) -> None:
        """Each descriptor has one identity, so there are never more of these than descriptors."""
        if (other := self._descriptors.get(identity, descriptor)) != descriptor:
            self.replaced.append((other, self.delivered[other]))
        before = self._identities.get(descriptor)
        if before is not None and before != identity and self._descriptors.get(before) == descriptor:
            del self._descriptors[before]
        self._identities[descriptor] = identity
        self._descriptors[identity] = descriptor

    def refuse(self, received: Received, error: MalformedFrame) -> None:
        """A message that nobody who speaks the protocol sends; after three of them the guard cuts the connection."""
        self.turned_away.refuse(self.name, error.reason, f"from {received.identity[:64]!r}: {error}")
        self.strikes.append((received.descriptor, NUM_STRIKES if received.num_frames > OFTEN_SENT else 1))


def wire_bytes(length: int) -> int:
    """The size of a frame on the wire, encrypted."""
    return length + CURVE_BYTES + (2 if length + CURVE_BYTES < 256 else 9)
