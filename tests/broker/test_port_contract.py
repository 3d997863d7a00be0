"""What an actor and a learner may rely on, whatever carries it: one suite over sockets and memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from broker.actor_client import ActorClient
from broker.core import FOLD_HOPS, Broker
from broker.downloads import Sources
from broker.keys import allowed_keys, load_key, make_keys
from broker.learner_client import LearnerClient
from broker.memory import MemoryBroker
from broker.publications import ANCHOR_EVERY
from broker.server import Server, Wakeup
from protocol.base import base_root, base_tensors
from protocol.config import parse_config
from protocol.errors import RequestRefused
from protocol.groups import STOPPED, Group
from protocol.messages import ActorReport, NamedBlob, Publish, Route
from protocol.ports import ActorPort, LearnerPort, ReceivedBatch
from protocol.weights import BlobRef, PolicyVersion, root_hash

CONFIG = {"run": {"steps": 4}, "policy": {"max_lag": 1}, "rollout": {"group_size": 2, "groups_per_batch": 2, "max_tokens": 4}}
DEADLINE_SECONDS = 20


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class Beside:
    """Where a broker does its long work: in a thread of its own, not before it is let go."""

    def __init__(self) -> None:
        self._may_work = threading.Event()
        self._may_work.set()
        self._pool = ThreadPoolExecutor(1)
        self.begun = threading.Event()

    def submit(self, job: Callable[[], None]) -> None:
        self.begun.set()
        self._pool.submit(lambda: self._may_work.wait(DEADLINE_SECONDS) and job())

    def hold(self) -> None:
        """Keep jobs waiting from now on."""
        self._may_work.clear()
        self.begun.clear()

    def let_go(self) -> None:
        self._may_work.set()

    def close(self) -> None:
        self.let_go()
        self._pool.shutdown()


class Disk:
    """The disk that a broker looks at. `fill` takes its room away until it has been looked at so many times."""

    def __init__(self) -> None:
        self.num_looks = 0

    def free(self) -> int:
        self.num_looks = max(0, self.num_looks - 1)
        return 0 if self.num_looks else 1 << 40

    def fill(self, num_looks: int) -> None:
        self.num_looks = num_looks

    @property
    def is_full(self) -> bool:
        return self.num_looks > 0


class Rig:
    """A broker, the ports to it, and a way to call the learner's blocking port beside the actors' event loop.

    `tick` lets the broker's time pass, where nothing else does.
    """

    def __init__(
        self,
        actor: Callable[[str], ActorPort],
        make_learner: Callable[[], LearnerPort],
        call: Callable[..., Any],
        beside: Beside,
        tick: Callable[[], None],
        tree: Any,
        disk: Disk,
        is_memory: bool,
    ) -> None:
        self.disk = disk
        self.actor, self._make_learner, self._call, self.beside, self.tick, self.tree = actor, make_learner, call, beside, tick, tree
        self.learner, self.is_memory = make_learner(), is_memory
        self.version = -1
        self.lineage = 0

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._call(function, *arguments)

    async def join(self, name: str) -> ActorPort:
        port = self.actor(name)
        await port.join("fake", lambda: report(port, self.version))
        return port

    async def resume(self, step: int) -> None:
        """A new learner, from a checkpoint."""
        await self.call(self.learner.close)
        self.learner = await self.call(self._make_learner)
        self.lineage = (await self.call(self.learner.join, step, 1, {})).lineage

    async def publish(self, step: int, data: bytes = b"weights") -> None:
        blob = await self.call(self.learner.put_blob, data)
        version = PolicyVersion(self.version + 1, step, self.lineage, blake3.blake3(data).hexdigest())
        answer = await self.call(self.learner.publish, Publish(version, self.version, None, blob, len(data), len(data)))
        assert answer.number == version.number
        self.version = answer.number

    async def publish_base(self) -> None:
        """The first version of the tree: the policy's own weights."""
        version = self.tree.root()
        answer = await self.call(self.learner.publish, Publish(version, -1, None, None, 600, 600, is_base=True))
        assert answer.number == 0
        self.version = 0

    async def publish_child(self, parent: int | None = None, *, step: int = 0, snapshot: bool = False) -> int:
        """Real weights, a few elements from their parent's, and the files that lead there."""
        parent, number = self.version if parent is None else parent, self.version + 1
        version = self.tree.child(parent, number, step, self.lineage)
        delta = await self.call(self.learner.put_blob, self.tree.delta(parent, number))
        compact = await self.call(self.learner.put_blob, self.tree.delta(parent, number, classes=True))
        whole = await self.call(self.learner.put_blob, self.tree.snapshot(number)) if snapshot else None
        answer = await self.call(self.learner.publish, Publish(version, parent, delta, whole, 600, 10, compact, seconds={"encode": 0.1}))
        assert answer.number == number
        self.version = number
        return number

    async def route(self, port: ActorPort, held: int, failed: str = "") -> Route:
        """The answer of the port, while the broker's time passes."""
        asking = asyncio.ensure_future(port.route(held, failed))
        return await self.answer(asking)

    async def answer(self, asking: asyncio.Future[Route]) -> Route:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (await asyncio.wait([asking], timeout=0.05))[0]:
                self.tick()
        return await asking

    async def fill(self) -> None:
        """Take the disk's room away; returns once the broker knows."""
        self.disk.fill(5)
        await self.until(lambda: self.disk.num_looks <= 3)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the broker's time pass until something holds."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                self.tick()
                await asyncio.sleep(0.05)

    async def leads_to_the_newest(self, port: ActorPort, held: int, route: Route) -> bool:
        """Follow a route with real weights; whether they have the root hash of the newest version."""
        assert route.held == held
        assert route.version == self.tree.versions[self.version]
        start = {"base": self.tree.base, "snapshot": None, "held": self.tree.weights.get(held)}[route.start]
        files = [*([route.snapshot] if route.snapshot is not None else []), *route.deltas]
        data = [(await port.fetch(blob)).read_bytes() for blob in files]
        for blob in files:
            port.forget(blob)
        found: bool = self.tree.follow(start, data) == route.version.root
        return found


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


@pytest.fixture(params=["sockets", "memory"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path, make_tree: Callable[..., Any]) -> AsyncIterator[Rig]:
    config, beside, wakeup, tree, disk = parse_config(CONFIG), Beside(), Wakeup(), make_tree(), Disk()
    policy = [NamedBlob("model.safetensors", BlobRef(blake3.blake3(tree.policy_file).hexdigest(), len(tree.policy_file)))]
    broker = Broker(
        tmp_path, "contract", config, 16, policy, time.monotonic(), time.time(),
        run_beside=beside.submit, wake=wakeup.set, free=disk.free,
    )  # fmt: skip
    broker.blobs.add(tree.policy_file)
    if request.param == "memory":
        memory = MemoryBroker(broker, SystemClock())

        class Turned:
            """The event loop is turning already here; the learner's wait leaves it to turn by itself."""

            def run_until_complete(self, waiting: Any) -> None:
                waiting.close()

        async def direct(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

        def make_port() -> LearnerPort:
            return memory.learner_port(Turned(), lambda: None)  # type: ignore[arg-type]

        yield Rig(memory.actor_port, make_port, direct, beside, lambda: broker.tick(time.monotonic(), time.time()), tree, disk, True)
        beside.close()
        broker.close()
        wakeup.close()
        return
    make_keys(tmp_path / "keys")
    server = Server(broker, "tcp://127.0.0.1:0", load_key(tmp_path / "keys" / "broker.key"), allowed_keys(tmp_path / "keys"), wakeup)
    thread = threading.Thread(target=server.serve)
    thread.start()

    def make_actor(name: str) -> ActorPort:
        sources = Sources(cache=tmp_path / "cache")
        return ActorClient(server.address, load_key(tmp_path / "keys" / "actor.key"), name, sources)

    def make_learner() -> LearnerPort:
        return LearnerClient(server.address, load_key(tmp_path / "keys" / "learner.key"))

    rig = Rig(make_actor, make_learner, asyncio.to_thread, beside, lambda: None, tree, disk, False)
    yield rig
    await asyncio.to_thread(rig.learner.close)
    beside.close()
    server.stop()
    await asyncio.to_thread(thread.join, DEADLINE_SECONDS)
    assert not thread.is_alive()


def nothing() -> None:
    pass


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
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    port = await rig.join("a")
    first, second = await take(port), await take(port)
    assert [first.number, second.number] == [0, 1]
    await port.submit(group_for(second, 0), second.attempt)
    await port.submit(group_for(first, 0), first.attempt)
    batch: ReceivedBatch = await rig.call(rig.learner.next_batch, 0, nothing)
    from protocol.groups import decode_group

    groups = [decode_group(payload) for payload in batch.payloads]
    assert batch.number == 0
    assert batch.version_steps[0] == 0
    assert [group.ticket for group in groups] == [0, 1]
    np.testing.assert_array_equal(groups[0].logprobs, group_for(first, 0).logprobs)
    await port.leave()


async def test_pacing_holds_tickets_back_until_a_newer_version_is_held(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    port = await rig.join("a")
    for _ in range(4):  # max_lag 1: batches 0 and 1 may be sampled from version 0
        ticket = await take(port)
        await port.submit(group_for(ticket, 0), ticket.attempt)
    blocked = asyncio.ensure_future(port.next_ticket())
    await rig.call(rig.learner.next_batch, 0, nothing)
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
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    port = await rig.join("a")
    ticket = await take(port)
    await port.fail(ticket, "the engine broke")
    seen = [await take(port), await take(port)]
    again = next(found for found in seen if found.number == ticket.number)
    assert (again.prompt, again.seed, again.attempt) == (ticket.prompt, ticket.seed, ticket.attempt + 1)
    await port.leave()


async def test_tickets_of_an_actor_that_leaves_go_to_another(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
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
    assert (await port.fetch(blob)).read_bytes() == data
    port.forget(blob)
    assert (await port.fetch(blob)).read_bytes() == data, "what was forgotten can be fetched again"
    await port.leave()


async def test_whatever_is_asked_of_a_full_disk_is_done_when_there_is_room(rig: Rig) -> None:
    await rig.fill()
    await rig.call(rig.learner.join, 0, 1, {})
    assert not rig.disk.is_full, "the welcome takes room"
    data = b"weights"
    blob = await rig.call(rig.learner.put_blob, data)
    await rig.fill()
    version = PolicyVersion(0, 0, 0, blob.digest)
    answer = await rig.call(rig.learner.publish, Publish(version, -1, None, blob, len(data), len(data)))
    assert answer.number == 0 and not rig.disk.is_full, "a publication takes room"


async def test_an_actor_at_a_full_disk_joins_and_hands_its_groups_in_when_there_is_room(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    await rig.fill()
    joining = asyncio.ensure_future(rig.join("a"))
    await rig.until(joining.done)
    assert not rig.disk.is_full, "a new actor takes room"
    port = joining.result()
    tickets = [await take(port), await take(port)]
    await rig.fill()
    for ticket in tickets:
        await port.submit(group_for(ticket, 0), ticket.attempt)
    taking = asyncio.ensure_future(port.next_ticket())
    await rig.until(taking.done)
    assert not rig.disk.is_full, "a group takes room"
    assert taking.result() is not None
    batch = await rig.call(rig.learner.next_batch, 0, nothing)
    assert batch is not None and len(batch.payloads) == 2
    await port.leave()


async def test_a_blob_that_nobody_stored_is_refused(rig: Rig) -> None:
    port = await rig.join("a")
    with pytest.raises(RequestRefused, match="does not have it"):
        await port.fetch(BlobRef("ab" * 32, 10))
    await port.leave()


async def test_a_learner_that_waits_for_a_batch_calls_back_meanwhile_and_an_error_there_ends_the_wait(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    calls = []

    def while_waiting() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a publication failed")

    with pytest.raises(RuntimeError, match="a publication failed"):
        await rig.call(rig.learner.next_batch, 0, while_waiting)
    await rig.publish(0)


async def test_publications_go_on_beside_a_wait_for_a_batch(rig: Rig) -> None:
    if rig.is_memory:
        pytest.skip("the port in memory belongs to one thread")
    await rig.call(rig.learner.join, 0, 1, {})
    waiting = threading.Event()
    batch = asyncio.ensure_future(rig.call(rig.learner.next_batch, 0, waiting.set))
    assert await asyncio.to_thread(waiting.wait, DEADLINE_SECONDS)
    await rig.publish(0)
    port = await rig.join("a")
    for _ in range(2):
        ticket = await take(port)
        await port.submit(group_for(ticket, 0), ticket.attempt)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert len((await batch).payloads) == 2
    await port.leave()


async def test_a_learner_whose_place_another_has_taken_is_refused_its_publications(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    before, lineage = rig.learner, rig.lineage
    rig.learner = await rig.call(rig._make_learner)
    rig.lineage = (await rig.call(rig.learner.join, 0, 1, {})).lineage
    blob = await rig.call(rig.learner.put_blob, b"late")
    late = Publish(PolicyVersion(1, 0, lineage, "ab" * 32), 0, None, blob, 4, 4)
    with pytest.raises(RequestRefused):
        await rig.call(before.publish, late)
    await rig.call(before.close)
    await rig.publish(0, b"on time")


async def test_a_publication_that_is_said_twice_is_one(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    blob = await rig.call(rig.learner.put_blob, b"weights")
    said = Publish(PolicyVersion(0, 0, 0, "ab" * 32), -1, None, blob, 7, 7)
    first, second = await rig.call(rig.learner.publish, said), await rig.call(rig.learner.publish, said)
    assert (first.number, first.next_version) == (second.number, second.next_version) == (0, 1)


async def test_before_anything_is_published_a_route_leads_nowhere(rig: Rig) -> None:
    port = await rig.join("a")
    found = await rig.route(port, -1)
    assert (found.version, found.deltas, found.snapshot) == (None, [], None)
    await port.leave()


async def test_a_route_leads_from_nothing_over_a_snapshot_and_from_the_newest_nowhere(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish(0)
    port = await rig.join("a")
    found = await rig.route(port, -1)
    assert found.version is not None and found.version.number == 0
    assert (found.start, found.deltas) == ("snapshot", [])
    assert found.snapshot is not None
    assert (await port.fetch(found.snapshot)).read_bytes() == b"weights"
    assert (await rig.route(port, 0)).deltas == []
    await port.leave()


@pytest.mark.parametrize("length", [1, 3, FOLD_HOPS + 2])
async def test_a_route_leads_to_the_newest_version_from_wherever_an_actor_is(rig: Rig, length: int) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    for _ in range(length):
        await rig.publish_child()
    port = await rig.join("a")
    for held in (-1, 0, length - 1, length, 999):  # nothing, the first, the one before, the newest, one that nobody knows
        found = await rig.route(port, held)
        assert found.start == ("base" if held in (-1, 999) else "held")
        assert len(found.deltas) <= FOLD_HOPS
        assert await rig.leads_to_the_newest(port, held, found)
    await port.leave()


async def test_a_newcomer_has_the_files_of_the_base_from_the_welcome(rig: Rig) -> None:
    port = rig.actor("a")
    welcome = await port.join("fake", lambda: report(port, -1))
    [file] = welcome.policy_files
    assert file.name == "model.safetensors"
    assert dict(base_tensors([await port.fetch(file.blob)])).keys() == rig.tree.base.keys()
    assert base_root([await port.fetch(file.blob)]) == root_hash(rig.tree.base)
    await port.leave()


async def test_a_route_leads_on_from_an_orphaned_version(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    kept = await rig.publish_child()
    for _ in range(2):
        orphan = await rig.publish_child(step=1)
    await rig.resume(0)
    await rig.publish_child(kept, step=1)
    await rig.publish_child(step=1)
    port = await rig.join("a")
    for held in (orphan, orphan - 1, kept, -1):
        found = await rig.route(port, held)
        assert found.start == ("base" if held < 0 else "held"), "there is a way back from where it is"
        assert await rig.leads_to_the_newest(port, held, found)
    await port.leave()


async def test_a_newcomer_starts_at_the_last_snapshot_and_goes_on_by_deltas(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    await rig.publish_child()
    await rig.publish_child(snapshot=True)
    await rig.publish_child()
    port = await rig.join("a")
    found = await rig.route(port, -1)
    assert found.start == "snapshot"
    assert await rig.leads_to_the_newest(port, -1, found)
    assert (await rig.route(port, 0)).start == "held"
    await port.leave()


async def test_routes_lead_over_anchors(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    for _ in range(2 * ANCHOR_EVERY + 5):
        await rig.publish_child()
        rig.tick()
    port = await rig.join("a")
    for held in (-1, 0, ANCHOR_EVERY, 2 * ANCHOR_EVERY):
        found = await rig.route(port, held)
        assert len(found.deltas) <= FOLD_HOPS
        assert await rig.leads_to_the_newest(port, held, found)
    await port.leave()


@pytest.mark.parametrize("held", [-1, 0])
async def test_an_actor_waits_while_its_way_is_folded_and_nobody_else_does(rig: Rig, held: int) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    for _ in range(FOLD_HOPS + 1):
        await rig.publish_child()
    slow, other = await rig.join("a"), await rig.join("b")
    rig.beside.hold()
    asking = asyncio.ensure_future(slow.route(held))
    assert await asyncio.to_thread(rig.beside.begun.wait, DEADLINE_SECONDS)
    await rig.publish_child()
    ahead = await rig.route(other, rig.version - 1)
    assert await rig.leads_to_the_newest(other, rig.version - 1, ahead)
    assert not asking.done()
    rig.beside.let_go()
    assert await rig.leads_to_the_newest(slow, held, await rig.answer(asking))
    await slow.leave()
    await other.leave()


async def test_an_actor_that_leaves_while_its_way_is_folded_leaves_nothing_behind(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    for _ in range(FOLD_HOPS + 1):
        await rig.publish_child()
    port = await rig.join("a")
    rig.beside.hold()
    asking = asyncio.ensure_future(port.route(0))
    assert await asyncio.to_thread(rig.beside.begun.wait, DEADLINE_SECONDS)
    asking.cancel()
    await port.leave()
    rig.beside.let_go()
    rig.tick()
    again = await rig.join("a")
    asking = asyncio.ensure_future(again.route(0))
    assert await rig.leads_to_the_newest(again, 0, await rig.answer(asking))
    await again.leave()


async def test_a_way_that_did_not_lead_there_makes_the_next_publication_bring_a_snapshot(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    await rig.publish_base()
    await rig.publish_child()
    port = await rig.join("a")
    assert (await rig.route(port, -1, "the root is another one")).start == "base"
    version = rig.tree.child(1, 2)
    delta = await rig.call(rig.learner.put_blob, rig.tree.delta(1, 2))
    assert (await rig.call(rig.learner.publish, Publish(version, 1, delta, None, 600, 10))).snapshot_wanted
    rig.version = 2
    await rig.publish_child(snapshot=True)
    found = await rig.route(port, -1)
    assert found.start == "snapshot"
    assert await rig.leads_to_the_newest(port, -1, found)
    await port.leave()


async def test_a_publication_whose_blob_is_not_stored_is_refused(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
    version = PolicyVersion(0, 0, 0, "ab" * 32)
    with pytest.raises(RequestRefused, match="not in the store"):
        await rig.call(rig.learner.publish, Publish(version, -1, None, BlobRef("ab" * 32, 5), 5, 5))


async def test_the_end_of_the_run_reaches_everybody(rig: Rig) -> None:
    await rig.call(rig.learner.join, 0, 1, {})
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
        await rig.call(rig.learner.join, 3, 1, {})
