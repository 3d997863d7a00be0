"""A toy actor: the real client and the real weights, and completions that are made up.

The driver's nursery forks it, and it ends with them. By itself: `python -m tests.faults.actor_process`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import blake3
import numpy as np

from actor.weights import HeldWeights
from broker.actor_client import ActorClient
from broker.downloads import Sources
from broker.keys import load_key
from deploy.parent import die_with_parent
from deploy.rundir import RunDirectory
from protocol.groups import Group, encode_group
from protocol.messages import ActorReport, WireTicket
from tests.faults.records import Acknowledged, GivingUp, Log, Submitting, engine_name
from tests.faults.run_directory import RECORDS, TEMPORARY
from tests.faults.tokens import MAX_BODY, Sampled, chain_of, fingerprint, make_group

NUM_WORKERS = 3
CURSED = 37
"""Tickets whose seed is divisible by this are given up by everybody, and so end as failed."""


class ToyActor:
    """One process of an actor.

    Invariant: results are numbered here as the client numbers them, in the order in which they are handed in, each written down before.
    """

    def __init__(self, client: ActorClient, name: str, incarnation: int, log: Log, seed: int) -> None:
        self._client, self._name, self._incarnation, self._log = client, name, incarnation, log
        self._random = np.random.default_rng([seed, incarnation, *name.encode()])
        self._sampling: Sampled | None = None
        self._last_seq = 0
        self._handed_in: asyncio.Queue[int] = asyncio.Queue()

    async def run(self, shadow: Path) -> None:
        """Work until the run ends."""
        welcome = await self._client.join(engine_name(self._incarnation), self._report)
        self._weights = HeldWeights(self._client, welcome.policy_files, [shadow])
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._keep_up()), group.create_task(self._note_acknowledgements())]
            await asyncio.wait([group.create_task(self._serve()) for _ in range(NUM_WORKERS)])
            await self._client.leave()
            for task in beside:
                task.cancel()
        self._weights.drop()

    def _report(self) -> ActorReport:
        version = self._sampling.version if self._sampling else -1
        num_wanted = NUM_WORKERS if self._sampling else 0
        return ActorReport(version, num_wanted, self._client.held_tickets(), 0.0, 0.0, 0, "pretending")

    async def _keep_up(self) -> None:
        """The update loop: consumes announcements, waits for the next; produces verified weights to sample from."""
        while await self._client.new_version(self._weights.number) is not None:
            staged = await self._weights.advance()
            if staged is not None:
                self._sampling = Sampled(staged.version.number, fingerprint(chain_of(dict(staged.weights))))
                self._client.report_now()

    async def _serve(self) -> None:
        """A worker: consumes tickets, waits for the next; produces results, waits for the time that sampling would take."""
        while (ticket := await self._client.next_ticket()) is not None:
            if ticket.seed % CURSED == 0 or self._random.random() < 0.03:
                self._log.write(GivingUp(self._name, self._incarnation, self._number(), ticket.number, ticket.attempt))
                await self._client.fail(ticket, "on purpose")
                continue
            body = await self._sample()
            group = make_group(ticket, self._name, self._incarnation, body, self._random, engine_name(self._incarnation))
            await self._submit(ticket, group)

    async def _sample(self) -> list[Sampled]:
        """Body tokens, each of whatever weights are there at its time."""
        long = self._random.random() < 0.04
        body: list[Sampled] = []
        for _ in range(int(self._random.integers(1, MAX_BODY + 1))):
            assert self._sampling is not None, "a ticket came before there were weights"
            body.append(self._sampling)
            await asyncio.sleep(self._random.uniform(0, 0.4 if long else 0.012))
        return body

    async def _submit(self, ticket: WireTicket, group: Group) -> None:
        digest = blake3.blake3(encode_group(group)).hexdigest()
        versions = np.unique(group.versions).tolist()
        self._log.write(Submitting(self._name, self._incarnation, self._number(), ticket.number, ticket.attempt, digest, versions))
        await self._client.submit(group, ticket.attempt)

    def _number(self) -> int:
        """The number of the result that is handed in next. Nothing is awaited between this and the client's own counting."""
        self._last_seq += 1
        self._handed_in.put_nowait(self._last_seq)
        return self._last_seq

    async def _note_acknowledgements(self) -> None:
        """Consumes numbers of results; waits until the client need not keep them any more, which is when the broker has acknowledged them."""
        while True:
            seq = await self._handed_in.get()
            await self._client._until(self._is_acknowledged(seq), f"the acknowledgement of result {seq}")
            self._log.write(Acknowledged(self._name, self._incarnation, seq))

    def _is_acknowledged(self, seq: int) -> Callable[[], bool]:
        session = self._client._session
        return lambda: session._last_seq >= seq and seq not in session.unacked


def main(arguments: list[str]) -> None:
    """The process."""
    parser = argparse.ArgumentParser()
    for name in ("--run", "--name"):
        parser.add_argument(name, required=True)
    for name in ("--incarnation", "--seed", "--parent"):
        parser.add_argument(name, required=True, type=int)
    parser.add_argument("--broker", help="where to reach the broker. Default: where it listens")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    die_with_parent(given.parent)
    run = RunDirectory(Path(given.run))
    address = given.broker or run.broker_address()
    assert address is not None, "the broker has never run"
    sources = Sources(cache=run.path / TEMPORARY / "cache")
    client = ActorClient(address, load_key(run.keys / "actor.key"), given.name, sources)
    log = Log(run.path / RECORDS / f"{given.name}.{given.incarnation:04d}.jsonl")
    asyncio.run(ToyActor(client, given.name, given.incarnation, log, given.seed).run(run.path / TEMPORARY))


if __name__ == "__main__":
    main(sys.argv[1:])
