"""The actor's loop against a broker, an engine and a task written by hand."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from actor.engine import Completion, GenerationRequest, Pause
from actor.loop import MAX_FAILURES, Actor
from actor.shadow import PREFIX, StagedWeights
from protocol.config import RolloutConfig
from protocol.delta import encode_delta, encode_snapshot
from protocol.errors import EngineError, RootMismatch, SlipstreamError
from protocol.groups import FULL, STOPPED, Group, check_group, decode_group, encode_group
from protocol.messages import ActorReport, Route, WireTicket
from protocol.safetensors_file import deserialize
from protocol.weights import BlobRef, PolicyVersion, Tensor, Weights, root_hash
from tasks.base import Problem

DEADLINE = 5.0
END = 0
GROUP_SIZE = 3


def make_weights(number: int) -> Weights:
    return {"layer": Tensor("BF16", (2, 2), np.full(4, number, np.uint16))}


def make_version(number: int) -> PolicyVersion:
    return PolicyVersion(number, number, 0, root_hash(make_weights(number)))


class Port:
    """A broker in memory: tickets and versions are what the test puts there. Who holds the version before gets a delta, others a snapshot.

    While `open_from_nothing` is not set, a way from nothing is waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.newest: PolicyVersion | None = None
        self.stopping = ""
        self.tickets: list[WireTicket] = []
        self.held: list[int] = []
        self.groups: list[tuple[Group, int]] = []
        self.failures: list[tuple[WireTicket, str]] = []
        self.reports: list[ActorReport] = []
        self.left = False
        self.report: Callable[[], ActorReport] | None = None
        self.asked: list[tuple[int, bool]] = []
        self.open_from_nothing = asyncio.Event()
        self.open_from_nothing.set()
        self._folder = folder
        self._blobs: dict[str, bytes] = {}
        self._deltas: dict[int, BlobRef] = {}
        self._snapshot: BlobRef | None = None
        self._changed = asyncio.Condition()

    # --- for the test

    async def change(self, action: Callable[[], Any]) -> None:
        action()
        async with self._changed:
            self._changed.notify_all()

    async def publish(self, number: int, *, damaged: bool = False) -> None:
        version = make_version(number)
        self._deltas = {}
        if self.newest is not None:
            old = self.newest.number
            data, _ = encode_delta("run", make_weights(old), make_weights(number), make_version(old), version)
            self._deltas[old] = self._store(data[:-1] if damaged else data)
        self._snapshot = self._store(encode_snapshot("run", make_weights(number), version))
        await self.change(lambda: setattr(self, "newest", version))

    def _store(self, data: bytes) -> BlobRef:
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self._blobs[ref.digest] = data
        return ref

    async def issue(self, *tickets: WireTicket) -> None:
        await self.change(lambda: self.tickets.extend(tickets))

    async def stop(self) -> None:
        await self.change(lambda: setattr(self, "stopping", "enough"))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE), self._changed:
            await self._changed.wait_for(condition)

    # --- for the actor

    def held_tickets(self) -> list[int]:
        return sorted(self.held)

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> Any:
        raise AssertionError("joined already")

    def report_now(self) -> None:
        assert self.report is not None
        self.reports.append(self.report())
        self._wake = asyncio.ensure_future(self.change(lambda: None))

    async def next_ticket(self) -> WireTicket | None:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self.tickets or self.stopping))
        if not self.tickets:
            return None
        ticket = self.tickets.pop(0)
        await self.change(lambda: self.held.append(ticket.number))
        return ticket

    async def new_version(self, held: int) -> PolicyVersion | None:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self.stopping) or (self.newest is not None and self.newest.number != held))
        return None if self.stopping else self.newest

    async def submit(self, group: Group, attempt: int) -> None:
        assert not self.left
        self.held.remove(group.ticket)
        await self.change(lambda: self.groups.append((group, attempt)))

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        assert not self.left
        self.held.remove(ticket.number)
        await self.change(lambda: self.failures.append((ticket, reason)))

    async def route(self, held: int, failed: str = "") -> Route:
        await self.change(lambda: self.asked.append((held, bool(failed))))
        if held in self._deltas:
            return Route(held, self.newest, "held", None, [self._deltas[held]])
        await self.open_from_nothing.wait()
        return Route(held, self.newest, "snapshot", self._snapshot, [])

    async def fetch(self, blob: BlobRef) -> Path:
        path = self._folder / blob.digest
        path.write_bytes(self._blobs[blob.digest])
        return path

    def forget(self, blob: BlobRef) -> None:
        (self._folder / blob.digest).unlink()

    async def leave(self) -> None:
        self.left = True


class CountingEngine:
    """Completion i of a group spells seed + i in digits. `refusals` updates fail first; after one, only everything is accepted.

    `updates` are the versions it was given, and whether as a whole; what it was given was the published weights each time.
    """

    name = "counting"
    num_groups_wanted = 2
    busy_seconds = 1.5

    def __init__(self, refusals: int = 0) -> None:
        self.requests: list[GenerationRequest] = []
        self.updates: list[tuple[int, bool]] = []
        self.closed = False
        self.num_tokens = 0
        self.error: Exception | None = None
        self.refusals: list[SlipstreamError] = [RootMismatch("1" * 64, "0" * 64, "here") for _ in range(refusals)]
        self.may_reload = asyncio.Event()
        self.may_reload.set()
        self.reloading = asyncio.Event()
        self.may_generate = asyncio.Event()
        self.may_generate.set()
        self._version: PolicyVersion | None = None

    async def update(self, staged: StagedWeights) -> Pause:
        version, weights = staged.version, staged.weights
        assert root_hash(weights) == version.root == make_version(version.number).root
        assert root_hash(deserialize(staged.path.read_bytes())[1]) == version.root
        assert staged.changed is None or self._version is not None, "only everything can follow a failure"
        self.updates.append((version.number, staged.changed is None))
        if staged.changed is None:
            self.reloading.set()
            await self.may_reload.wait()
        if self.refusals:
            self._version = None
            raise self.refusals.pop(0)
        self._version = version
        return Pause(0.25, 0.125)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        await self.may_generate.wait()
        if self._version is None:
            raise EngineError("no verified weights")
        completions = []
        for i in range(request.num_completions):
            tokens = [ord(digit) for digit in str(request.seed + i)] + [END]
            finish = STOPPED if len(tokens) < request.max_tokens else FULL
            count = len(tokens)
            completions.append(
                Completion(
                    np.array(tokens, np.int32),
                    np.full(count, -0.5 - i, np.float32),
                    np.full(count, self._version.number, np.int32),
                    finish,
                )
            )
        self.num_tokens += sum(completion.token_ids.size for completion in completions)
        return completions

    async def close(self) -> None:
        self.closed = True


class CharacterTokenizer:
    """One token per character, its code point; END is special."""

    chat_template = None
    eos_token_id = END

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        raise AssertionError("there is no template")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in token_ids if token != END)


class NumberTask:
    """The reward is the number in the completion, or whatever the test puts into `rewards` for that completion."""

    num_train = num_heldout = 100

    def __init__(self) -> None:
        self.rewards: dict[str, Any] = {}

    def train(self, index: int) -> Problem:
        return Problem(index=index, prompt="" if index == 99 else f"p{index}", answer="")

    heldout = train

    def solution(self, problem: Problem) -> str:
        return problem.answer

    def reward(self, problem: Problem, completion: str) -> float:
        reward = self.rewards.get(completion, float(completion))
        if isinstance(reward, Exception):
            raise reward
        return reward  # type: ignore[no-any-return]


class Fixture:
    def __init__(self, folder: Path, refusals: int = 0) -> None:
        self.port, self.engine, self.task = Port(folder), CountingEngine(refusals), NumberTask()
        self.now = 100.0
        rollout = RolloutConfig(group_size=GROUP_SIZE, groups_per_batch=1, max_tokens=5, temperature=0.7)
        self.actor = Actor("a1", self.port, self.engine, self.task, CharacterTokenizer(), (END,), rollout, [], lambda: self.now)
        self.port.report = self.actor.report


@asynccontextmanager
async def running(fixture: Fixture, version: int | None = 0) -> AsyncIterator[asyncio.Task[None]]:
    """The actor at work, sampling from `version`; it is stopped at the end, and must then leave in order."""
    run = asyncio.create_task(fixture.actor.run())
    try:
        if version is not None:
            await fixture.port.publish(version)
            await fixture.port.until(lambda: bool(fixture.port.reports))
        yield run
        await fixture.port.stop()
        async with asyncio.timeout(DEADLINE):
            await run
    finally:
        run.cancel()
    assert fixture.port.left
    assert fixture.engine.closed
    assert our_shadows() == []


def our_shadows() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}{os.getpid()}-*"))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Fixture]:
    """An actor and what is around it; the engine refuses the first `refusals` updates."""
    return lambda refusals=0: Fixture(tmp_path, refusals)


def ticket(number: int = 4, attempt: int = 1, prompt: int = 8, seed: int = 120) -> WireTicket:
    return WireTicket(number, attempt, prompt, seed)


async def test_a_ticket_becomes_a_whole_group_with_its_rewards_in_order(make: Any) -> None:
    fixture = make()
    async with running(fixture, version=6):
        await fixture.port.issue(ticket(attempt=2))
        await fixture.port.until(lambda: bool(fixture.port.groups))
    ((group, attempt),) = fixture.port.groups
    assert (group.ticket, attempt, group.prompt, group.seed) == (4, 2, 8, 120)
    assert (group.actor, group.engine) == ("a1", "counting")
    assert group.prompt_ids.tolist() == [ord("p"), ord("8")]
    assert group.num_tokens.tolist() == [4] * GROUP_SIZE
    assert group.rewards.tolist() == [120.0, 121.0, 122.0]
    assert group.logprobs.tolist() == [-0.5] * 4 + [-1.5] * 4 + [-2.5] * 4
    assert group.versions.tolist() == [6] * 12
    assert group.finish.tolist() == [STOPPED] * 3
    assert [chr(token) for token in group.token_ids[:3]] == ["1", "2", "0"]
    check_group(group)
    decode_group(encode_group(group))
    assert fixture.port.failures == []


async def test_the_engine_is_asked_for_what_the_ticket_and_the_rollout_settings_say(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert fixture.engine.requests == [GenerationRequest([ord("p"), ord("8")], GROUP_SIZE, 5, 0.7, 120, (END,))]


async def test_every_ticket_is_handed_in_exactly_once(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        await fixture.port.issue(*(ticket(number, 1, number, 100 + 10 * number) for number in range(20)))
        await fixture.port.until(lambda: len(fixture.port.groups) == 20)
    assert sorted(group.ticket for group, _ in fixture.port.groups) == list(range(20))
    assert all(group.rewards.tolist() == [group.seed + i for i in range(GROUP_SIZE)] for group, _ in fixture.port.groups)
    assert fixture.port.held == []


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (ValueError("no such unit"), "ValueError: no such unit"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (None, "None"),
        ("1.0", "'1.0'"),
        (1e39, "1e+39"),
    ],
)
async def test_a_reward_that_is_no_number_is_a_failure_with_its_reason_and_never_a_group(reward: Any, reason: str, make: Any) -> None:
    fixture = make()
    fixture.task.rewards["121"] = reward
    async with running(fixture):
        given = ticket()
        await fixture.port.issue(given)
        await fixture.port.until(lambda: bool(fixture.port.failures or fixture.port.groups))
        assert fixture.port.groups == []
        assert fixture.port.failures[0][0] == given
        assert reason in fixture.port.failures[0][1]
        # The next ticket is served as if nothing had happened.
        await fixture.port.issue(ticket(5, seed=300))
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert [group.ticket for group, _ in fixture.port.groups] == [5]
    assert len(fixture.port.failures) == 1


async def test_an_engine_that_cannot_generate_is_a_failure_with_its_reason(make: Any) -> None:
    fixture = make()
    fixture.engine.error = EngineError("out of memory")
    async with running(fixture):
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.failures))
        fixture.engine.error = None
        await fixture.port.issue(ticket(5))
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert fixture.port.failures == [(ticket(), "out of memory")]
    assert [group.ticket for group, _ in fixture.port.groups] == [5]


async def test_a_prompt_without_tokens_is_a_failure(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        await fixture.port.issue(ticket(prompt=99))
        await fixture.port.until(lambda: bool(fixture.port.failures))
    assert "no tokens" in fixture.port.failures[0][1]
    assert fixture.engine.requests == []


# --- credit, updates, the end


async def test_there_is_no_credit_before_the_first_verified_weights(make: Any) -> None:
    fixture = make()
    before = fixture.actor.report()
    assert (before.num_wanted, before.version) == (0, -1)
    async with running(fixture, version=None):
        assert fixture.actor.report().num_wanted == 0
        await fixture.port.publish(3)
        await fixture.port.until(lambda: bool(fixture.port.reports))
        assert (fixture.port.reports[0].num_wanted, fixture.port.reports[0].version) == (2, 3)
        fixture.now += 7
        after = fixture.actor.report()
        assert (after.num_wanted, after.version, after.elapsed_seconds, after.busy_seconds) == (2, 3, 7.0, 1.5)


async def test_each_version_reaches_the_engine_and_is_reported_at_once(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        for number in (1, 4):
            await fixture.port.publish(number)
            await fixture.port.until(lambda number=number: fixture.port.reports[-1].version == number)
    assert [number for number, _ in fixture.engine.updates] == [0, 1, 4]
    assert [report.version for report in fixture.port.reports] == [0, 1, 4]


async def test_the_engine_is_told_what_changed_where_it_holds_the_version_before(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        await fixture.port.publish(1)
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
    assert fixture.engine.updates == [(0, True), (1, False)]


async def test_groups_are_generated_from_the_version_before_while_the_next_one_is_fetched_anew(make: Any) -> None:
    """A damaged delta costs a reload and nothing else: the engine is not handed anything, and works on."""
    fixture = make()
    async with running(fixture):
        fixture.port.open_from_nothing.clear()
        await fixture.port.publish(1, damaged=True)
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.groups))
        await fixture.port.until(lambda: (-1, True) in fixture.port.asked)
        await fixture.port.issue(ticket(5))
        await fixture.port.until(lambda: len(fixture.port.groups) == 2)
        report = fixture.actor.report()
        assert (report.version, report.num_wanted) == (0, 2)
        assert fixture.engine.updates == [(0, True)]
        fixture.port.open_from_nothing.set()
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
    assert fixture.engine.updates == [(0, True), (1, True)]
    assert fixture.port.asked == [(-1, False), (0, False), (-1, True)]
    assert {number for group, _ in fixture.port.groups for number in group.versions.tolist()} == {0}


async def test_an_update_that_the_engine_refuses_is_followed_by_one_of_everything(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        fixture.engine.refusals.append(RootMismatch("1" * 64, "0" * 64, "here"))
        await fixture.port.publish(1)
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
        assert fixture.engine.updates == [(0, True), (1, False), (1, True)]
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert fixture.port.asked == [(-1, False), (0, False)]


@pytest.mark.parametrize("error", [RootMismatch("1" * 64, "0" * 64, "here"), EngineError("no memory")], ids=["weights", "engine"])
async def test_when_everything_is_refused_too_there_is_no_credit_and_the_weights_are_fetched_anew(
    error: SlipstreamError, make: Any
) -> None:
    fixture = make()
    async with running(fixture):
        fixture.port.open_from_nothing.clear()
        fixture.engine.refusals += [error, error]
        await fixture.port.publish(1)
        await fixture.port.until(lambda: fixture.port.reports[-1].version != 0)
        assert (fixture.port.reports[-1].version, fixture.port.reports[-1].num_wanted) == (-1, 0)
        assert (fixture.actor.report().version, fixture.actor.report().num_wanted) == (-1, 0)
        assert our_shadows() == []
        fixture.port.open_from_nothing.set()
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
        assert fixture.actor.report().num_wanted == 2
    assert fixture.engine.updates == [(0, True), (1, False), (1, True), (1, True)]
    assert fixture.port.asked == [(-1, False), (0, False), (-1, False)]


async def test_there_is_no_credit_while_everything_is_reloaded_after_a_refusal(make: Any) -> None:
    """The engine generates nothing between a refused update and a good one: tickets taken then would fail."""
    fixture = make()
    async with running(fixture):
        fixture.engine.refusals.append(EngineError("no memory"))
        fixture.engine.reloading.clear()
        fixture.engine.may_reload.clear()
        await fixture.port.publish(1)
        try:
            async with asyncio.timeout(DEADLINE):
                await fixture.engine.reloading.wait()
            assert fixture.engine.updates[-1] == (1, True)
            report = fixture.actor.report()
            assert (report.version, report.num_wanted) == (-1, 0)
        finally:
            fixture.engine.may_reload.set()


async def test_refusals_that_are_not_in_a_row_do_not_add_up(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        for number in range(1, 2 * MAX_FAILURES):
            fixture.engine.refusals += [EngineError("no memory")] * 2
            await fixture.port.publish(number)
            await fixture.port.until(lambda number=number: fixture.port.reports[-1].version == number)
    assert fixture.engine.refusals == []


async def test_an_engine_that_refuses_everything_time_after_time_ends_the_actor_which_still_leaves_the_port(make: Any) -> None:
    fixture = make(refusals=100)
    run = asyncio.create_task(fixture.actor.run())
    await fixture.port.publish(0)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ExceptionGroup) as caught:
            await run
    assert caught.group_contains(EngineError, match=f"{MAX_FAILURES} times")
    assert len(fixture.engine.updates) == 2 * MAX_FAILURES
    assert {report.num_wanted for report in fixture.port.reports} == {0}
    assert fixture.port.left
    assert fixture.engine.closed
    assert our_shadows() == []


async def test_a_ticket_in_hand_while_no_weights_are_verified_is_given_back_and_never_sampled(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        fixture.port.open_from_nothing.clear()
        fixture.engine.may_generate.clear()
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.held))
        fixture.engine.refusals += [EngineError("no memory")] * 2
        await fixture.port.publish(1)
        await fixture.port.until(lambda: fixture.port.reports[-1].version == -1)
        fixture.engine.may_generate.set()
        await fixture.port.until(lambda: bool(fixture.port.failures))
        fixture.port.open_from_nothing.set()
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
    assert fixture.port.groups == []
    assert fixture.port.failures == [(ticket(), "no verified weights")]


async def test_a_lost_shadow_does_not_disturb_the_engine_and_is_made_anew(make: Any) -> None:
    fixture = make()
    async with running(fixture):
        for path in our_shadows():
            path.unlink()
        await fixture.port.publish(1)
        await fixture.port.until(lambda: fixture.port.reports[-1].version == 1)
    assert fixture.engine.updates == [(0, True), (1, True)]
    assert fixture.port.asked == [(-1, False), (0, False), (-1, True)]
    assert {report.num_wanted for report in fixture.port.reports} == {2}


async def test_a_stop_ends_the_run_and_leaves_the_port(make: Any) -> None:
    fixture = make()
    async with running(fixture) as run:
        assert not run.done()
        assert not fixture.port.left
    assert run.done()


async def test_a_stop_before_the_first_weights_ends_the_run_as_well(make: Any) -> None:
    fixture = make()
    async with running(fixture, version=None):
        pass


async def test_a_cancelled_actor_leaves_the_port(make: Any) -> None:
    fixture = make()
    run = asyncio.create_task(fixture.actor.run())
    await fixture.port.publish(0)
    await fixture.port.until(lambda: bool(fixture.port.reports))
    run.cancel()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(asyncio.CancelledError):
            await run
    assert fixture.port.left
    assert fixture.engine.closed


async def test_a_failure_nobody_foresaw_ends_the_actor_and_leaves_the_port(make: Any) -> None:
    fixture = make()
    fixture.engine.error = RuntimeError("a mistake in an engine")
    run = asyncio.create_task(fixture.actor.run())
    await fixture.port.publish(0)
    await fixture.port.until(lambda: bool(fixture.port.reports))
    await fixture.port.issue(ticket())
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ExceptionGroup) as caught:
            await run
    assert caught.group_contains(RuntimeError, match="a mistake")
    assert fixture.port.left
    assert fixture.port.groups == []
