"""Facts are written as JSON and must come back from it, whatever a peer put in them."""

from __future__ import annotations

import math
import typing

import msgspec
import pytest

from broker.ledger import finite
from protocol import codec, facts, messages
from protocol.errors import MalformedFrame

KINDS = typing.get_args(facts.AnyFact)


def read_back(fact: facts.AnyFact) -> facts.AnyFact:
    return msgspec.json.decode(msgspec.json.encode(fact), type=facts.AnyFact)


@pytest.mark.parametrize(
    "fact",
    [
        facts.StepCommitted(3, 3, 0, [0, 1], {"loss": 0.5}),
        facts.Evaluated(3, 0.25, 10),
        facts.TicketEnded(1, "expired", "too old"),
        facts.BatchFormed(0, 0, [0, 1]),
        facts.ActorLeft("a", "e", "left", 1.0, 2.0, 3),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_a_fact_survives_json(fact: facts.AnyFact) -> None:
    assert read_back(fact) == fact


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_are_kept_as_none_and_can_be_read_back(value: float) -> None:
    """A diverged run commits such metrics; recovery must not fail on them."""
    for fact in (
        facts.StepCommitted(3, 3, 0, [0], finite({"loss": value, "reward": 0.5})),
        facts.LearnerFinished(3, finite({"busy_seconds": value})),
    ):
        assert read_back(fact) == fact


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_peer_cannot_report_figures_that_no_fact_can_hold(value: float) -> None:
    report = messages.ActorReport(0, 1, [], 1.0, 2.0, 3, "")
    for damaged in (
        msgspec.structs.replace(report, busy_seconds=value),
        msgspec.structs.replace(report, elapsed_seconds=value),
    ):
        with pytest.raises(MalformedFrame):
            codec.from_actor.decode(codec.encode(damaged))
    with pytest.raises(MalformedFrame):
        codec.from_learner.decode(codec.encode(messages.Evaluation(3, value, 10)))


def test_every_fact_is_told_apart_by_its_name() -> None:
    assert len({kind.__struct_config__.tag for kind in KINDS}) == len(KINDS)
