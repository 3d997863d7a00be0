"""An engine that hangs is told from one that is slow, and its tickets go back to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actor.loop import Actor
from actor.watchdog import FACTOR, FIRST_SECONDS, LOOK_SECONDS, QUIET_SECONDS, Watchdog
from protocol.config import RolloutConfig
from protocol.errors import EngineDied
from tests.actor import test_loop as loop_test

DEADLINE = 20.0


def after(dog: Watchdog, seconds: float, *, begin: float, num_tokens: int = 7, is_busy: bool = True) -> float:
    """Look once a second for so many seconds; the time then."""
    now = begin
    while now < begin + seconds:
        now += LOOK_SECONDS
        dog.look(num_tokens, is_busy, now)
    return now


def test_an_engine_that_stops_in_the_middle_is_hung_after_its_limit() -> None:
    dog = Watchdog(0.0)
    dog.look(0, True, 1.0)
    now = after(dog, 2.0, begin=1.0, num_tokens=5)
    now = after(dog, QUIET_SECONDS - 5, begin=now, num_tokens=5)
    assert not dog.is_hung
    after(dog, 10.0, begin=now, num_tokens=5)
    assert dog.is_hung


def test_the_first_token_may_take_very_long() -> None:
    dog = Watchdog(0.0)
    now = after(dog, FIRST_SECONDS - 5, begin=0.0)
    assert not dog.is_hung
    after(dog, 10.0, begin=now)
    assert dog.is_hung


def test_an_engine_that_was_slow_before_is_given_longer() -> None:
    dog, now = Watchdog(0.0), 0.0
    for num_tokens in range(1, 5):
        now = after(dog, 60.0, begin=now, num_tokens=num_tokens)
    assert dog.limit > FACTOR * 55
    after(dog, 1000.0, begin=now, num_tokens=4)
    assert not dog.is_hung


def test_an_engine_without_work_is_never_hung() -> None:
    dog = Watchdog(0.0)
    now = after(dog, 3.0, begin=0.0, num_tokens=1)
    after(dog, 10 * FIRST_SECONDS, begin=now, num_tokens=1, is_busy=False)
    assert not dog.is_hung


def test_an_update_is_a_sign_of_life() -> None:
    dog, now = Watchdog(0.0), 0.0
    dog.look(1, True, 0.0)
    now = after(dog, 3.0, begin=now, num_tokens=2)
    for _ in range(10):
        now = after(dog, QUIET_SECONDS - 5, begin=now, num_tokens=2)
        assert not dog.is_hung
        dog.sign()


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A machine that slept, an actor that was stopped: the engine was, too, or had nobody to tell."""
    dog = Watchdog(0.0)
    now = after(dog, 3.0, begin=0.0, num_tokens=1)
    dog.look(2, True, now + 1)
    for _ in range(10):
        now += 100_000.0
        dog.look(2, True, now)
    assert not dog.is_hung


class Hanging(loop_test.CountingEngine):
    """Gives one token, then nothing any more."""

    async def generate(self, request: Any) -> Any:
        self.num_tokens += 1
        await asyncio.Event().wait()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    return lambda: loop_test.Fixture(tmp_path)


async def test_a_hung_engine_ends_the_actor_which_first_leaves_the_port(make: Any) -> None:
    fixture = make()
    engine, tick = Hanging(), asyncio.Event()

    async def sleep(_: float) -> None:
        await tick.wait()
        fixture.now += LOOK_SECONDS
        await asyncio.sleep(0)

    rollout = RolloutConfig(group_size=3, groups_per_batch=1, max_tokens=5)
    port = fixture.port
    actor = Actor(
        "a1", port, engine, fixture.task, loop_test.CharacterTokenizer(), (loop_test.END,), rollout, [], lambda: fixture.now, sleep
    )
    port.report = actor.report
    run = asyncio.create_task(actor.run())
    await port.publish(0)
    await port.until(lambda: bool(port.reports))
    tick.set()
    await port.issue(loop_test.ticket())
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ExceptionGroup) as caught:
            await run
    assert caught.group_contains(EngineDied, match="no token")
    assert port.left, "its tickets are issued to others"
    assert port.groups == []
    assert port.failures == [], "nobody's fault"
    assert not engine.closed, "closing what hangs would hang"
    assert "quiet" in actor.report().doing
