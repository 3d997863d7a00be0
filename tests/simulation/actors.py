"""A simulated actor: the real session (broker.session), in a shell that does what broker/actor_client.py and actor/loop.py do.

Invariant: what an actor hands in is sampled from the versions that it says, and is kept until it is acknowledged.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from broker.actor_client import CONNECT_SECONDS, GONE_SECONDS, MAX_UNACKED, RESEND_SECONDS
from broker.session import ActorSession, Result
from protocol import codec, messages
from protocol.groups import Group, encode_group
from protocol.messages import HEARTBEAT_SECONDS, PROTOCOL_VERSION, ActorReport, WireTicket
from protocol.weights import BlobRef, PolicyVersion
from tests.simulation.schedule import Loop, Process, ProcessEnded, Sleep
from tests.simulation.weights import BASE_ROOT, decode

if TYPE_CHECKING:
    from tests.simulation.world import World

ATTEMPTS = 5
NEVER = float("inf")


class Refusal(Exception):
    """The way to a version cannot be followed."""


class SimulatedActor(Process):
    """One epoch of one actor."""

    def __init__(self, world: World, name: str, epoch: str) -> None:
        super().__init__(world.schedule, f"{name}/{epoch}")
        self.world, self.actor, self.epoch = world, name, epoch
        self.session = ActorSession()
        random = world.schedule.random
        self.num_slots = random.randint(1, 3)
        self._mean_seconds = world.plan.mean_seconds * random.uniform(0.5, 2.0)
        self.held: PolicyVersion | None = None
        self._root = ""
        self.sampling = -1
        self.acked = 0
        """The highest acknowledgement that arrived."""
        self._serving: dict[int, set[int]] = {}
        """For each ticket being served, the versions sampled from so far."""
        self._heard_at = self._sent_at = self._started = self.clock()
        self._report_wanted = False
        self.spawn(self._join())
        self.spawn(self._heartbeat())
        self.spawn(self._keep_up())
        self._num_workers = self.num_slots
        for _ in range(self.num_slots):
            self.spawn(self._serve())
        self.spawn(self._end())

    # --- messages

    def receive(self, frames: list[bytes]) -> None:
        """A message of the broker."""
        message, _ = codec.to_actor.decode(frames)
        num_unacked = len(self.session.unacked)
        self.session.receive(message)
        self._heard_at = self.clock()
        if isinstance(message, messages.Ack):
            self.acked = max(self.acked, message.seq)
        elif isinstance(message, messages.ActorWelcome):
            self.acked = max(self.acked, message.acked)
        if len(self.session.unacked) < num_unacked:
            self._sent_at = self._heard_at
        if self.session.hello_wanted:
            self.session.hello_wanted = False
            self._hello()
        if isinstance(message, messages.ActorWelcome):
            self._resend()
            self._report_wanted = True

    def _send(self, message: messages.Message, payload: bytes = b"") -> None:
        self.world.from_actor(self, codec.encode(message, payload))

    def _hello(self) -> None:
        held = self.session.held()
        self._send(messages.ActorHello(PROTOCOL_VERSION, self.actor, self.epoch, "simulated", "host", 1, held))

    def _resend(self) -> None:
        self._sent_at = self.clock()
        for result in list(self.session.unacked.values()):
            self._send(result.message, result.payload)

    def _report(self) -> ActorReport:
        wanted = self.num_slots if self.sampling >= 0 else 0
        return ActorReport(self.sampling, wanted, self.session.held(), 0.0, self.clock() - self._started, 0, "")

    # --- loops

    def _join(self) -> Loop:
        self._hello()
        until = self.clock() + CONNECT_SECONDS
        while self.session.welcome is None:
            if self.clock() >= until:
                raise ProcessEnded("no welcome")
            yield until - self.clock()

    def _heartbeat(self) -> Loop:
        while True:
            next_at = self.clock() + HEARTBEAT_SECONDS
            while not self._report_wanted and (rest := next_at - self.clock()) > 1e-9:
                yield rest
            self._report_wanted = False
            self._send(self._report())
            if self.session.unacked and self.clock() - self._sent_at > RESEND_SECONDS:
                self._resend()
            if self.clock() - self._heard_at > GONE_SECONDS:
                raise ProcessEnded("the broker is gone")

    def _keep_up(self) -> Loop:
        session, random = self.session, self.world.schedule.random
        while not session.stopping:
            if session.newest is None or session.newest.number == (self.held.number if self.held else -1):
                yield NEVER
                continue
            found = yield from self._advance()
            if found is None:
                continue
            yield Sleep(random.uniform(0.0, 0.05))
            if random.random() < self.world.plan.engine_refusals:
                self._drop()
                self.sampling = -1
            else:
                self.sampling = found.number
                for versions in self._serving.values():
                    versions.add(found.number)
            self._report_wanted = True
            self.wake()

    def _advance(self) -> Generator[float, None, PolicyVersion | None]:
        failed = ""
        for _ in range(ATTEMPTS):
            try:
                return (yield from self._follow((yield from self._route(failed))))
            except Refusal as error:
                failed = str(error)
                self._drop()
                yield Sleep(self.world.schedule.random.uniform(1.0, 3.0))
        raise ProcessEnded(f"no way to the newest version: {failed}")

    def _route(self, failed: str) -> Generator[float, None, messages.Route]:
        held = self.held.number if self.held else -1
        self.session.route = None
        while self.session.route is None or self.session.route.held != held:
            self._send(messages.GetRoute(held, failed))
            failed = ""
            until = self.clock() + RESEND_SECONDS
            while (self.session.route is None or self.session.route.held != held) and (rest := until - self.clock()) > 1e-9:
                yield rest
        return self.session.route

    def _follow(self, route: messages.Route) -> Generator[float, None, PolicyVersion | None]:
        if route.version is None or (self.held is not None and route.version.number == self.held.number):
            return None
        root = self._root
        if route.start == "base":
            root = BASE_ROOT
        elif route.start == "snapshot":
            assert route.snapshot is not None
            file = decode((yield from self._fetch(route.snapshot)))
            root = file.root
        self.held = None
        for blob in route.deltas:
            file = decode((yield from self._fetch(blob)))
            self.world.checks.require(file.parent == root, f"{self.name} was given a delta from {file.parent!r}, it holds {root!r}")
            root = file.root
        self.world.checks.require(root == route.version.root, f"the way to version {route.version.number} leads to {root!r}")
        self.held, self._root = route.version, root
        return route.version

    def _fetch(self, blob: BlobRef) -> Generator[float, None, bytes]:
        while True:
            yield Sleep(self.world.schedule.random.expovariate(1 / 0.1))
            if self.world.is_reachable(self.actor):
                break
            yield Sleep(1.0)
        data = self.world.read_blob(blob)
        if data is None:
            raise Refusal(f"the store does not have {blob.digest[:16]}")
        return data

    def _drop(self) -> None:
        self.held, self._root = None, ""

    def _serve(self) -> Loop:
        session = self.session
        while True:
            while not (session.tickets or session.stopping):
                yield NEVER
            if session.stopping:
                break
            ticket = session.tickets.popleft()
            while self.sampling < 0:  # the engine has no weights: what it is asked for waits
                if session.stopping:
                    self._num_workers -= 1
                    self.wake()
                    return
                yield NEVER
            yield from self._make(ticket)
            while len(session.unacked) >= MAX_UNACKED:
                yield NEVER
        self._num_workers -= 1
        self.wake()

    def _make(self, ticket: WireTicket) -> Loop:
        random, plan = self.world.schedule.random, self.world.plan
        self._serving[ticket.number] = {self.sampling}
        yield Sleep(min(8 * plan.mean_seconds, random.expovariate(1 / self._mean_seconds)))
        versions = sorted(self._serving.pop(ticket.number))
        if random.random() < plan.engine_failures:
            self._hand_in(self.session.fail(ticket.number, ticket.attempt, "the engine broke"))
            return
        payload = make_payload(self, ticket, versions, plan.group_size)
        if random.random() < plan.invalid_groups:
            payload = payload[: len(payload) // 2]
        result = self.session.finish(ticket.number, ticket.attempt, payload)
        self.world.checks.finished(self.actor, self.epoch, result, versions)
        self._hand_in(result)

    def _hand_in(self, result: Result) -> None:
        if len(self.session.unacked) == 1:
            self._sent_at = self.clock()
        self._send(result.message, result.payload)

    def _end(self) -> Loop:
        """Leave once all workers have ended."""
        while self._num_workers:
            yield NEVER
        until = self.clock() + 2 * RESEND_SECONDS
        while self.session.unacked and (rest := until - self.clock()) > 1e-9:
            yield rest
        self._send(messages.ActorBye())
        raise ProcessEnded("in order")


def make_payload(actor: SimulatedActor, ticket: WireTicket, versions: list[int], num_completions: int) -> bytes:
    """A whole group with one token of every version, at least, in each completion."""
    per_token = np.array(versions * num_completions, np.int32)
    return encode_group(
        Group(
            ticket=ticket.number,
            prompt=ticket.prompt,
            seed=ticket.seed,
            actor=actor.actor,
            engine="simulated",
            prompt_ids=np.zeros(1, np.int32),
            num_tokens=np.full(num_completions, len(versions), np.int32),
            token_ids=np.zeros(per_token.size, np.int32),
            logprobs=np.full(per_token.size, -0.5, np.float32),
            versions=per_token,
            rewards=np.full(num_completions, 0.5, np.float32),
            finish=np.zeros(num_completions, np.uint8),
        )
    )
