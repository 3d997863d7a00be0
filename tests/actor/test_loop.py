"""The actor's loop against a broker, an engine and a task written by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import blake3
import numpy as np
import pytest

from actor.engine import Completion, GenerationRequest
from actor.loop import Actor
from protocol.config import RolloutConfig
from protocol.delta import encode_snapshot
from protocol.errors import EngineError, RootMismatch, WeightsError
from protocol.groups import FULL, STOPPED, Group, check_group, decode_group, encode_group
from protocol.messages import ActorReport, Route, WireTicket
from protocol.weights import BlobRef, PolicyVersion, Tensor, Weights, root_hash
from tasks.base import Problem

DEADLINE = 5.0
END = 0
GROUP_SIZE = 3


def make_weights(number: int) -> Weights:
    return {"layer": Tensor("BF16", (2, 2), np.full(4, number, np.uint16))}


class Port:
    """A broker in memory: tickets and versions are what the test puts there."""

    def __init__(self) -> None:
        self.newest: PolicyVersion | None = None
        self.stopping = ""
        self.tickets: list[WireTicket] = []
        self.held: list[int] = []
        self.groups: list[tuple[Group, int]] = []
        self.failures: list[tuple[WireTicket, str]] = []
        self.reports: list[ActorReport] = []
        self.left = False
        self.report: Callable[[], ActorReport] | None = None
        self._blobs: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    # --- for the test

    async def change(self, action: Callable[[], Any]) -> None:
        action()
        async with self._changed:
            self._changed.notify_all()

    async def publish(self, number: int) -> None:
        weights = make_weights(number)
        version = PolicyVersion(number, number, 0, root_hash(weights))
        data = encode_snapshot("run", weights, version)
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self._blobs[ref.digest] = data
        self._ref = ref
        await self.change(lambda: setattr(self, "newest", version))

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
        self.held.append(ticket.number)
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

    async def route(self, held: int) -> Route:
        return Route(held, self.newest, [self._ref] if self.newest and self.newest.number != held else [])

    async def fetch(self, blob: BlobRef) -> bytes:
        return self._blobs[blob.digest]

    async def leave(self) -> None:
        self.left = True


class CountingEngine:
    """Completion i of a group spells seed + i in digits; `refusals` updates fail first, and prompts with an "x" cannot be generated."""

    name = "counting"
    num_groups_wanted = 2
    busy_seconds = 1.5

    def __init__(self, refusals: int = 0) -> None:
        self.requests: list[GenerationRequest] = []
        self.updates: list[int] = []
        self.closed = False
        self.num_tokens = 0
        self.error: Exception | None = None
        self._refusals = refusals
        self._version: PolicyVersion | None = None

    async def update(self, version: PolicyVersion, weights: Weights) -> None:
        assert root_hash(weights) == version.root
        self.updates.append(version.number)
        if self._refusals:
            self._refusals -= 1
            raise RootMismatch(version.root, "0" * 64, "here")
        self._version = version

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        assert self._version is not None
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
    def __init__(self, refusals: int = 0) -> None:
        self.port, self.engine, self.task = Port(), CountingEngine(refusals), NumberTask()
        self.now = 100.0
        rollout = RolloutConfig(group_size=GROUP_SIZE, groups_per_batch=1, max_tokens=5, temperature=0.7)
        self.actor = Actor("a1", self.port, self.engine, self.task, CharacterTokenizer(), (END,), rollout, lambda: self.now)
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


def ticket(number: int = 4, attempt: int = 1, prompt: int = 8, seed: int = 120) -> WireTicket:
    return WireTicket(number, attempt, prompt, seed)


async def test_a_ticket_becomes_a_whole_group_with_its_rewards_in_order() -> None:
    fixture = Fixture()
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


async def test_the_engine_is_asked_for_what_the_ticket_and_the_rollout_settings_say() -> None:
    fixture = Fixture()
    async with running(fixture):
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert fixture.engine.requests == [GenerationRequest([ord("p"), ord("8")], GROUP_SIZE, 5, 0.7, 120, (END,))]


async def test_every_ticket_is_handed_in_exactly_once() -> None:
    fixture = Fixture()
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
async def test_a_reward_that_is_no_number_is_a_failure_with_its_reason_and_never_a_group(reward: Any, reason: str) -> None:
    fixture = Fixture()
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


async def test_an_engine_that_cannot_generate_is_a_failure_with_its_reason() -> None:
    fixture = Fixture()
    fixture.engine.error = EngineError("out of memory")
    async with running(fixture):
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.failures))
        fixture.engine.error = None
        await fixture.port.issue(ticket(5))
        await fixture.port.until(lambda: bool(fixture.port.groups))
    assert fixture.port.failures == [(ticket(), "out of memory")]
    assert [group.ticket for group, _ in fixture.port.groups] == [5]


async def test_a_prompt_without_tokens_is_a_failure() -> None:
    fixture = Fixture()
    async with running(fixture):
        await fixture.port.issue(ticket(prompt=99))
        await fixture.port.until(lambda: bool(fixture.port.failures))
    assert "no tokens" in fixture.port.failures[0][1]
    assert fixture.engine.requests == []


# --- credit, updates, the end


async def test_there_is_no_credit_before_the_first_verified_weights() -> None:
    fixture = Fixture()
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


async def test_each_version_reaches_the_engine_and_is_reported_at_once() -> None:
    fixture = Fixture()
    async with running(fixture):
        for number in (1, 4):
            await fixture.port.publish(number)
            await fixture.port.until(lambda number=number: fixture.port.reports[-1].version == number)
    assert fixture.engine.updates == [0, 1, 4]
    assert [report.version for report in fixture.port.reports] == [0, 1, 4]


async def test_an_update_that_the_engine_refuses_once_is_tried_again() -> None:
    fixture = Fixture(refusals=1)
    async with running(fixture):
        assert fixture.engine.updates == [0, 0]
        assert fixture.actor.report().version == 0
        await fixture.port.issue(ticket())
        await fixture.port.until(lambda: bool(fixture.port.groups))


async def test_an_update_that_the_engine_refuses_again_ends_the_actor_which_still_leaves_the_port() -> None:
    fixture = Fixture(refusals=9)
    run = asyncio.create_task(fixture.actor.run())
    await fixture.port.publish(0)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ExceptionGroup) as caught:
            await run
    assert caught.group_contains(WeightsError)
    assert fixture.actor.report().num_wanted == 0
    assert fixture.port.left
    assert fixture.engine.closed


async def test_a_stop_ends_the_run_and_leaves_the_port() -> None:
    fixture = Fixture()
    async with running(fixture) as run:
        assert not run.done()
        assert not fixture.port.left
    assert run.done()


async def test_a_stop_before_the_first_weights_ends_the_run_as_well() -> None:
    fixture = Fixture()
    async with running(fixture, version=None):
        pass


async def test_a_cancelled_actor_leaves_the_port() -> None:
    fixture = Fixture()
    run = asyncio.create_task(fixture.actor.run())
    await fixture.port.publish(0)
    await fixture.port.until(lambda: bool(fixture.port.reports))
    run.cancel()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(asyncio.CancelledError):
            await run
    assert fixture.port.left
    assert fixture.engine.closed


async def test_a_failure_nobody_foresaw_ends_the_actor_and_leaves_the_port() -> None:
    fixture = Fixture()
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
