"""What an actor and a learner may rely on, whatever carries it: one suite over sockets and memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from broker.actor_client import ActorClient
from broker.core import Broker
from broker.keys import allowed_keys, load_key, make_keys
from broker.learner_client import LearnerClient
from broker.memory import MemoryBroker
from broker.server import Server
from protocol.config import Config, parse_config
from protocol.errors import RequestRefused
from protocol.groups import STOPPED, Group
from protocol.messages import ActorReport, Publish
from protocol.ports import ActorPort, LearnerPort, ReceivedBatch
from protocol.weights import BlobRef, PolicyVersion

CONFIG = {"run": {"steps": 4}, "policy": {"max_lag": 1}, "rollout": {"group_size": 2, "groups_per_batch": 2, "max_tokens": 4}}
DEADLINE_SECONDS = 20


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class Rig:
    """A broker, the ports to it, and a way to call the learner's blocking port beside the actors' event loop."""

    def __init__(self, actor: Callable[[str], ActorPort], learner: LearnerPort, call: Callable[..., Any], is_memory: bool) -> None:
        self.actor, self.learner, self._call, self.is_memory = actor, learner, call, is_memory
        self.version = -1

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._call(function, *arguments)

    async def join(self, name: str) -> ActorPort:
        port = self.actor(name)
        await port.join("fake", lambda: report(port, self.version))
        return port

    async def publish(self, step: int, data: bytes = b"weights") -> None:
        blob = await self.call(self.learner.put_blob, data)
        version = PolicyVersion(self.version + 1, step, 0, blake3.blake3(data).hexdigest())
        answer = await self.call(self.learner.publish, Publish(version, self.version, None, blob, len(data), len(data)))
        assert answer.number == version.number
        self.version = answer.number


def report(port: ActorPort, version: int) -> ActorReport:
    return ActorReport(version, 2 if version >= 0 else 0, port.held_tickets(), 0.0, 1.0, 0, "testing")


def group_for(ticket: Any, version: int, name: str = "a") -> Group:
    return Group(
        ticket=ticket.number,
        prompt=ticket.prompt,
        seed=ticket.seed,
        actor=name,
        engine="fake",
        prompt_ids=np.array([1], np.int32),
        num_tokens=np.array([1, 2], np.int32),
        token_ids=np.array([ticket.number, 2, 3], np.int32),
        logprobs=np.array([-1.0, -2.0, -0.5], np.float32),
        versions=np.full(3, version, np.int32),
        rewards=np.array([0.0, 1.0], np.float32),
        finish=np.full(2, STOPPED, np.uint8),
    )


def make_core(folder: Path, config: Config) -> Broker:
    return Broker(folder, "contract", config, 16, [], time.monotonic(), time.time())


@pytest.fixture(params=["sockets", "memory"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    config = parse_config(CONFIG)
    if request.param == "memory":
        broker = make_core(tmp_path, config)
        memory = MemoryBroker(broker, SystemClock())

        class Turned:
            """The event loop is turning already here; the learner's wait leaves it to turn by itself."""

            def run_until_complete(self, waiting: Any) -> None:
                waiting.close()

        async def direct(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

        yield Rig(memory.actor_port, memory.learner_port(Turned(), lambda: None), direct, True)  # type: ignore[arg-type]
        broker.close()
        return
    make_keys(tmp_path / "keys")
    key = load_key(tmp_path / "keys" / "broker.key")
    server = Server(make_core(tmp_path, config), "tcp://127.0.0.1:0", key, allowed_keys(tmp_path / "keys"))
    thread = threading.Thread(target=server.serve)
    thread.start()
    learner = await asyncio.to_thread(LearnerClient, server.address, load_key(tmp_path / "keys" / "learner.key"))
    yield Rig(lambda name: ActorClient(server.address, load_key(tmp_path / "keys" / "actor.key"), name), learner, asyncio.to_thread, False)
    await asyncio.to_thread(learner.close)
    server.stop()
    await asyncio.to_thread(thread.join, DEADLINE_SECONDS)
    assert not thread.is_alive()


async def take(port: ActorPort) -> Any:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await port.next_ticket()


async def test_a_welcome_tells_the_run_and_its_configuration(rig: Rig) -> None:
    port = rig.actor("a")
    welcome = await port.join("fake", lambda: report(port, -1))
    assert welcome.run == "contract"
    assert parse_config(__import__("json").loads(welcome.config)) == parse_config(CONFIG)
    await port.leave()


async def test_groups_reach_the_learner_in_ticket_order_and_unchanged(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    port = await rig.join("a")
    first, second = await take(port), await take(port)
    assert [first.number, second.number] == [0, 1]
    await port.submit(group_for(second, 0), second.attempt)
    await port.submit(group_for(first, 0), first.attempt)
    batch: ReceivedBatch = await rig.call(rig.learner.next_batch, 0)
    from protocol.groups import decode_group

    groups = [decode_group(payload) for payload in batch.payloads]
    assert batch.number == 0
    assert batch.version_steps[0] == 0
    assert [group.ticket for group in groups] == [0, 1]
    np.testing.assert_array_equal(groups[0].logprobs, group_for(first, 0).logprobs)
    await port.leave()


async def test_pacing_holds_tickets_back_until_a_newer_version_is_held(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    port = await rig.join("a")
    for _ in range(4):  # max_lag 1: batches 0 and 1 may be sampled from version 0
        ticket = await take(port)
        await port.submit(group_for(ticket, 0), ticket.attempt)
    blocked = asyncio.ensure_future(port.next_ticket())
    await rig.call(rig.learner.next_batch, 0)
    assert not blocked.done()
    await rig.call(rig.learner.commit, 0, 0, [0, 0], {})
    await rig.publish(1, b"newer")
    async with asyncio.timeout(DEADLINE_SECONDS):
        version = await port.new_version(0)
        assert version is not None and version.step == 1
        port.report_now()
        ticket = await blocked
    assert ticket is not None and ticket.number == 4
    await port.leave()


async def test_a_failed_ticket_comes_again_with_the_same_prompt_and_seed(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    port = await rig.join("a")
    ticket = await take(port)
    await port.fail(ticket, "the engine broke")
    seen = [await take(port), await take(port)]
    again = next(found for found in seen if found.number == ticket.number)
    assert (again.prompt, again.seed, again.attempt) == (ticket.prompt, ticket.seed, ticket.attempt + 1)
    await port.leave()


async def test_tickets_of_an_actor_that_leaves_go_to_another(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    one = await rig.join("a")
    mine = await take(one)
    await one.leave()
    other = await rig.join("b")
    numbers = {(await take(other)).number, (await take(other)).number}
    assert mine.number in numbers
    await other.leave()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 5 * (1 << 20) + 3])
async def test_a_blob_comes_back_byte_for_byte(rig: Rig, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    blob = await rig.call(rig.learner.put_blob, data)
    assert blob == BlobRef(blake3.blake3(data).hexdigest(), size)
    port = await rig.join("a")
    assert await port.fetch(blob) == data
    await port.leave()


async def test_a_blob_that_nobody_stored_is_refused(rig: Rig) -> None:
    port = await rig.join("a")
    with pytest.raises(RequestRefused, match="does not have it"):
        await port.fetch(BlobRef("ab" * 32, 10))
    await port.leave()


async def test_a_route_leads_from_nothing_and_from_the_version_held(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    port = await rig.join("a")
    route = await port.route(-1)
    assert route.version is not None and route.version.number == 0
    assert len(route.blobs) == 1
    assert (await port.route(0)).blobs == []
    await port.leave()


async def test_a_publication_whose_blob_is_not_stored_is_refused(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    version = PolicyVersion(0, 0, 0, "ab" * 32)
    with pytest.raises(RequestRefused, match="not in the store"):
        await rig.call(rig.learner.publish, Publish(version, -1, None, BlobRef("ab" * 32, 5), 5, 5))


async def test_the_end_of_the_run_reaches_everybody(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1)
    await rig.publish(0)
    port = await rig.join("a")
    for _ in range(4):
        ticket = await take(port)
        await port.submit(group_for(ticket, 0), ticket.attempt)
    waiting = asyncio.ensure_future(port.next_ticket())
    await rig.call(rig.learner.done, 0, {"busy_seconds": 1.0})
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await waiting is None
        assert await port.new_version(0) is None
    assert port.stopping
    await port.leave()


async def test_a_learner_that_claims_steps_the_journal_does_not_know_is_refused(rig: Rig) -> None:
    with pytest.raises(RequestRefused, match="journal ends at step 0"):
        await rig.call(rig.learner.join, 3, 1)
