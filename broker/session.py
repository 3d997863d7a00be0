"""An actor's side of the reliable stream of results. Pure: no sockets, no clock.

Invariant: every result that was handed in is either acknowledged or still here, in order, to be sent again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from protocol import messages
from protocol.errors import IncompatiblePeer, RequestRefused
from protocol.messages import PROTOCOL_VERSION, WireTicket
from protocol.weights import PolicyVersion


class Result(NamedTuple):
    """A group or a failure on its way to the journal."""

    ticket: int
    message: messages.SubmitGroup | messages.TicketFailed
    payload: bytes


class ActorSession:
    """What one epoch of an actor has in hand."""

    def __init__(self) -> None:
        self.tickets: deque[WireTicket] = deque()
        """Received and not yet taken up."""
        self.in_hand: set[int] = set()
        """Numbers of tickets received and not finished."""
        self.unacked: OrderedDict[int, Result] = OrderedDict()
        self.newest: PolicyVersion | None = None
        self.stopping = ""
        self.welcome: messages.ActorWelcome | None = None
        self.route: messages.Route | None = None
        self.hello_wanted = False
        self.put_off = ""
        """Why the broker cannot take this actor in now."""
        self.num_refused = 0
        self._last_seq = 0

    def receive(self, message: messages.ToActor) -> None:
        """Take in a message from the broker. Raises RequestRefused or IncompatiblePeer if the broker will not have this actor."""
        match message:
            case messages.ActorWelcome():
                self.welcome, self.hello_wanted, self.put_off = message, False, ""
                self._acknowledge(message.acked)
                self._announce(message.newest)
            case messages.HelloWanted():
                self.hello_wanted = True
            case messages.IssueTicket(ticket):
                if not self.knows(ticket.number):
                    self.in_hand.add(ticket.number)
                    self.tickets.append(ticket)
            case messages.Ack(seq):
                self._acknowledge(seq)
            case messages.Refused():
                self.num_refused += 1
            case messages.NewVersion(version):
                self._announce(version)
            case messages.Route():
                self.route = message
                self._announce(message.version)
            case messages.NotNow(_, reason):
                self.put_off = reason
            case messages.Stop(reason):
                self.stopping = reason or "the run ends"
            case messages.HelloRefused(reason, protocol):
                if protocol != PROTOCOL_VERSION:
                    raise IncompatiblePeer(PROTOCOL_VERSION, protocol)
                raise RequestRefused("hello", reason)

    def knows(self, ticket: int) -> bool:
        """Whether the ticket is in hand or its result is under way."""
        return ticket in self.in_hand or any(result.ticket == ticket for result in self.unacked.values())

    def held(self) -> list[int]:
        """Tickets in hand or with a result under way, for the report."""
        return sorted(self.in_hand | {result.ticket for result in self.unacked.values()})

    def finish(self, ticket: int, attempt: int, payload: bytes) -> Result:
        """A group for a ticket in hand; the answer is to be sent, now and until it is acknowledged."""
        self._last_seq += 1
        return self._keep(Result(ticket, messages.SubmitGroup(self._last_seq, ticket, attempt), payload))

    def fail(self, ticket: int, attempt: int, reason: str) -> Result:
        """A ticket in hand that cannot be served."""
        self._last_seq += 1
        return self._keep(Result(ticket, messages.TicketFailed(self._last_seq, ticket, attempt, reason[:4096]), b""))

    def _keep(self, result: Result) -> Result:
        self.in_hand.discard(result.ticket)
        self.unacked[self._last_seq] = result
        return result

    def _acknowledge(self, seq: int) -> None:
        while self.unacked and next(iter(self.unacked)) <= seq:
            self.unacked.popitem(last=False)

    def _announce(self, version: PolicyVersion | None) -> None:
        if version is not None and (self.newest is None or version.number > self.newest.number):
            self.newest = version
