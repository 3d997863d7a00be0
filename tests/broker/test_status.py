"""What a status says of who was heard when; a broker that was started again claims no more than it has heard itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.core import Broker
from protocol import messages
from protocol.config import parse_config
from protocol.messages import PROTOCOL_VERSION
from tests.analysis.recorded import NUM_PROMPTS, start

HELLO = messages.ActorHello(PROTOCOL_VERSION, "a", "one", "fake", "host", 1, [])
REPORT = messages.ActorReport(-1, 1, [], 0.0, 1.0, 0, "waiting for a ticket")


def make_broker(directory: Path, now: float) -> Broker:
    return Broker(directory, "status", parse_config({}), 5, [], now=now, wall=0.0)


@pytest.fixture
def again(tmp_path: Path) -> Iterator[Broker]:
    """A broker that was started at second 100 on a run with a learner and an actor, and 8 seconds later has heard of neither."""
    broker = make_broker(tmp_path, 0.0)
    broker.learner_message("s", messages.LearnerHello(PROTOCOL_VERSION, "s", 0, 1), 1.0, 0.0)
    broker.actor_message("a", "one", HELLO, b"", 1.0, 0.0)
    broker.flush()
    before = broker.status(2.0)
    assert before.learner is not None
    assert [(peer.was_heard, peer.last_seen, peer.doing) for peer in (before.learner, *before.actors)] == [(True, 1.0, "starting")] * 2
    broker.close()
    broker = make_broker(tmp_path, 100.0)
    yield broker
    broker.close()


def test_whom_a_broker_knows_from_its_journal_alone_it_has_not_heard(again: Broker) -> None:
    found = again.status(108.0)
    assert found.learner is not None
    for peer in (found.learner, *found.actors):
        assert (peer.was_heard, peer.last_seen, peer.doing) == (False, 8.0, "not heard since the broker started")
    assert "everybody waits for the learner, not heard since the broker started, 8 s ago" in found.waits
    assert any("a waits for a ticket (not heard since the broker started)" in wait for wait in found.waits)


def test_from_the_first_message_on_they_are_heard(again: Broker) -> None:
    again.actor_message("a", "one", REPORT, b"", 105.0, 0.0)
    again.learner_message("s", messages.LearnerReport("s", 0, 0.0, 1.0, "training step 0"), 106.0, 0.0)
    again.flush()
    found = again.status(108.0)
    assert found.learner is not None
    assert [(peer.was_heard, peer.last_seen) for peer in (found.learner, *found.actors)] == [(True, 2.0), (True, 3.0)]
    assert not any("not heard" in wait for wait in found.waits)


def test_leases_of_those_who_were_there_run_from_the_broker_s_start_all_the_same(again: Broker) -> None:
    again.tick(100.0 + messages.LEASE_SECONDS - 0.1, 0.0)
    assert list(again.ledger.actors) == ["a"]
    again.tick(100.0 + messages.LEASE_SECONDS + 0.1, 0.0)
    assert not again.ledger.actors


def test_the_parts_of_the_lag_are_those_of_the_steps_so_far_and_come_back_with_the_broker(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 5)
    assert run.broker.status(run.now).lag_parts == {}, "before the first step"
    for step in range(3):
        run.step(step)
    before = run.broker.status(run.now)
    mean = sum(lag * count for lag, count in before.lags.items()) / sum(before.lags.values())
    assert sum(before.lag_parts.values()) == pytest.approx(mean)
    assert mean > 0
    run.broker.close()
    again = Broker(tmp_path / "run", "recorded", run.config, NUM_PROMPTS, [], now=0.0, wall=0.0)
    assert again.status(0.0).lag_parts == before.lag_parts
    again.close()
