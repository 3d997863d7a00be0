"""A recorded run in a broker's place, for one actor and one ticket: the ticket as it was issued, and the weights of the version it was sampled from.

Invariant: the ticket is given once, when the actor reports that version; then the run is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from broker.blobs import BlobStore
from broker.history import History
from broker.publications import Way
from broker.recorded_weights import recorded_file
from protocol.errors import WeightsError
from protocol.fold import Leg, fold
from protocol.groups import Group
from protocol.messages import PROTOCOL_VERSION, ActorReport, ActorWelcome, NamedBlob, Route, WireTicket
from protocol.weights import BlobRef, PolicyVersion


class RecordedActorPort:
    """Implements protocol.ports.ActorPort."""

    def __init__(self, history: History, blobs: BlobStore, made: BlobStore, policy_files: list[NamedBlob], group: Group) -> None:
        """Have `group` generated again. `made` takes a file that has to be made. Raises WeightsError if its version cannot be built again."""
        self._history, self._blobs, self._made, self._files = history, blobs, made, policy_files
        self._ticket = WireTicket(group.ticket, 1, group.prompt, group.seed)
        self.version: PolicyVersion = history.publications.by_number[group.oldest_version].version
        way = history.publications.way_to(self.version.number)
        if way is None:
            raise WeightsError(
                f"version {self.version.number} cannot be built again: the deltas that lead there were dropped to save room."
            )
        self._route = self._as_route(way)
        self._report: Callable[[], ActorReport] | None = None
        self._ready, self._done = asyncio.Event(), asyncio.Event()
        self._given = False
        self.group: Group | None = None
        self.failure = ""

    def _as_route(self, way: Way) -> Route:
        deltas = [hop.delta for hop in way.hops]
        files = [recorded_file(self._blobs, blob) for blob in deltas]
        if way.snapshot is not None:
            recorded_file(self._blobs, way.snapshot)
        if any(hop.inverted for hop in way.hops):
            data, _ = fold([Leg(file.read_bytes(), hop.inverted) for file, hop in zip(files, way.hops, strict=True)])
            deltas = [self._made.add(data)]
        return Route(-1, self.version, way.start, way.snapshot, deltas)

    @property
    def newest(self) -> PolicyVersion | None:
        return self.version

    @property
    def stopping(self) -> str:
        return "the group is done" if self._done.is_set() else ""

    def held_tickets(self) -> list[int]:
        return []

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> ActorWelcome:
        del engine
        self._report = report
        return ActorWelcome(PROTOCOL_VERSION, self._history.run, 0, self._history.config, self._files, self.version)

    def report_now(self) -> None:
        if self._report is not None and self._report().version == self.version.number:
            self._ready.set()

    async def next_ticket(self) -> WireTicket | None:
        await self._ready.wait()
        if self._given:
            await self._done.wait()
            return None
        self._given = True
        return self._ticket

    async def new_version(self, held: int) -> PolicyVersion | None:
        if held != self.version.number:
            return self.version
        await self._done.wait()
        return None

    async def submit(self, group: Group, attempt: int) -> None:
        del attempt
        self.group = group
        self._done.set()

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        del ticket
        self.failure = reason
        self._done.set()

    async def route(self, held: int, failed: str = "") -> Route:
        if failed:
            self.failure = failed
        return msgspec.structs.replace(self._route, held=held)

    async def fetch(self, blob: BlobRef) -> Path:
        if self._made.size(blob.digest) == blob.size:
            return self._made.path(blob.digest)
        return recorded_file(self._blobs, blob)

    def forget(self, blob: BlobRef) -> None:
        pass  # the recording's own file

    async def leave(self) -> None:
        pass
