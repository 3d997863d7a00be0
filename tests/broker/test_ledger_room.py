"""What the ledger does without room on the broker's disk. The names are the rules."""

from __future__ import annotations

import pytest

from broker import events as ev
from broker.room import MIB, Reserves, Room
from protocol import messages
from protocol.messages import LEASE_SECONDS
from tests.broker.test_ledger_scenarios import Run

MARKS = Reserves(credit=80 * MIB, commit=16 * MIB)


def free(run: Run, num_bytes: int) -> list[ev.Effect]:
    """Somebody has looked at the disk."""
    before = run.ledger.room if run.ledger.room.reserves == MARKS else Room(1 << 40, MARKS)
    return run.do(ev.RoomMeasured(before.measured(num_bytes)))


def started(**pacing: int) -> Run:
    """A learner with version 0, and an actor that has its tickets."""
    run = Run(**pacing)
    run.learner()
    run.publish(0)
    run.actor("a", 0)
    return run


def recorded(effects: list[ev.Effect]) -> list[str]:
    return [type(effect.fact).__name__ for effect in effects if isinstance(effect, ev.Record)]


def sent(effects: list[ev.Effect]) -> list[messages.Message]:
    return [effect.message for effect in effects if isinstance(effect, ev.SendActor | ev.SendLearner)]


# --- below the mark of credit


def test_without_room_for_more_no_ticket_is_issued_and_what_is_out_is_still_taken_delivered_and_committed() -> None:
    run = started(max_lag=1)
    issued = run.ledger.tickets.counts.issued
    free(run, 79 * MIB)
    for ticket in range(2):
        assert "GroupAccepted" in recorded(run.group("a", ticket, 0))
    assert "BatchFormed" in recorded(run.want(0))
    assert "StepCommitted" in recorded(run.commit(0))
    assert "VersionPublished" in recorded(run.publish(1))
    run.report("a", 1)
    assert run.ledger.tickets.counts.issued == issued
    assert "TicketIssued" in recorded(free(run, 200 * MIB)), "it goes on by itself"


def test_a_ticket_that_comes_back_is_not_issued_again_without_room() -> None:
    run = started()
    free(run, 79 * MIB)
    assert "TicketIssued" not in recorded(run.give_up("a", 0, 1))
    assert "TicketIssued" in recorded(free(run, 200 * MIB))


def test_whoever_waits_is_told_that_there_is_no_room() -> None:
    run = started()
    run.want(0)
    free(run, 79 * MIB)
    assert "79 MiB free" in run.ledger.why_waiting()
    assert "79 MiB free" in sent(run.want(0))[0].waiting_for
    free(run, 5 * MIB)
    assert "5 MiB free" in sent(run.want(0))[0].waiting_for
    free(run, 200 * MIB)
    assert "MiB free" not in run.ledger.why_waiting()


# --- below the mark of commits


def full(**pacing: int) -> Run:
    run = started(**pacing)
    free(run, 5 * MIB)
    return run


def test_without_room_no_event_leads_to_a_fact() -> None:
    run = started(max_lag=1)
    for ticket in range(2):
        run.group("a", ticket, 0)
    free(run, 5 * MIB)
    num_effects = len(run.effects)
    run.group("a", 2, 0)
    run.give_up("a", 3, 1)
    run.actor("b", 0)
    run.actor("a", 0, epoch="newer")
    run.want(0)
    run.commit(0)
    run.publish(1)
    run.do(ev.EvaluationDone("s", 0, 0.5, 8))
    run.do(ev.AnchorMade(1, 0, run.ledger.versions.by_number[0].fact.snapshot))  # type: ignore[arg-type]
    run.do(ev.LearnerGone("s", 0, {}))
    run.do(ev.LearnerHere("other", 0, 1))
    run.do(ev.ActorsWanted(7))
    run.do(ev.StopWanted("enough"))
    run.do(ev.ActorGone("a", "e"))
    run.now += 10 * LEASE_SECONDS
    run.do(ev.Tick())
    assert recorded(run.effects[num_effects:]) == []
    assert run.ledger.tickets.counts.conserved


def test_without_room_a_group_is_not_acknowledged_and_is_taken_when_it_is_sent_again() -> None:
    run = full()
    group = ev.GroupArrived("a", "e", 1, 0, 1, [0], 4, 0.5)
    assert run.do(group) == []
    assert sent(run.report("a", 0)) == [messages.Ack(0)], "the sign of life goes on"
    free(run, 200 * MIB)
    assert recorded(run.do(group)) == ["GroupAccepted"]


def test_without_room_a_new_actor_is_put_off_and_one_that_is_known_is_welcome() -> None:
    run = full()
    (answer,) = run.do(ev.ActorHere("b", "e", "fake", "here"))
    assert isinstance(answer, ev.SendActor)
    assert isinstance(answer.message, messages.NotNow) and "no room" in answer.message.reason
    (answer,) = run.do(ev.ActorHere("a", "e", "fake", "here"))
    assert isinstance(answer, ev.WelcomeActor)


@pytest.mark.parametrize(
    ("event", "request_name"),
    [
        (ev.LearnerHere("other", 0, 1), "hello"),
        (ev.StepDone("s", 0, 0, [0, 0], {}), "commit"),
        (ev.EvaluationDone("s", 0, 0.5, 8), "evaluation"),
        (ev.LearnerGone("s", 0, {}), "done"),
    ],
)
def test_without_room_a_learner_is_told_not_now(event: ev.Event, request_name: str) -> None:
    run = full()
    (answer,) = sent(run.do(event))
    assert isinstance(answer, messages.NotNow)
    assert (answer.request, answer.reason) == (request_name, run.ledger.room.shortage)


def test_without_room_a_publication_is_told_not_now() -> None:
    run = full()
    (answer,) = sent(run.publish(0))
    assert isinstance(answer, messages.NotNow) and answer.request == "publish"


def test_without_room_a_learner_that_was_replaced_is_refused_all_the_same() -> None:
    run = full()
    (answer,) = sent(run.do(ev.StepDone("before", 0, 0, [0, 0], {})))
    assert isinstance(answer, messages.LearnerRefused)


def test_without_room_a_complete_batch_is_not_formed_and_a_learner_that_waits_gets_it_afterwards() -> None:
    run = started()
    for ticket in range(2):
        run.group("a", ticket, 0)
    free(run, 5 * MIB)
    (answer,) = sent(run.want(0))
    assert isinstance(answer, messages.BatchPending) and "no room" in answer.waiting_for
    after = free(run, 200 * MIB)
    assert "BatchFormed" in recorded(after)
    assert any(isinstance(message, messages.BatchReady) for message in sent(after))


def test_without_room_a_batch_that_was_formed_before_is_given_again() -> None:
    run = started()
    for ticket in range(2):
        run.group("a", ticket, 0)
    run.want(0)
    free(run, 5 * MIB)
    (answer,) = sent(run.want(0))
    assert isinstance(answer, messages.BatchReady)


def test_leases_do_not_end_without_room_and_everybody_has_one_from_when_there_is() -> None:
    run = full()
    run.now += 100 * LEASE_SECONDS
    run.do(ev.Tick())
    free(run, 200 * MIB)
    run.now += LEASE_SECONDS - 0.1
    run.do(ev.Tick())
    assert "a" in run.ledger.actors
    run.now += 0.2
    assert "ActorLeft" in recorded(run.do(ev.Tick()))
