"""What the learner notes beside a commit: journalled once, and able to stop the run in order."""

from __future__ import annotations

import math

import pytest

from broker import events as ev
from broker.ledger import Ledger
from broker.state import NUM_NOTES
from protocol import codec, facts, messages
from protocol.messages import Note
from tests.broker.test_ledger_scenarios import NUM_PROMPTS, SEED, Run, started

WARNING = Note("warning", "entropy is low", {"entropy": 0.25})
RATE = Note("learning-rate", "lowered", {"lr": 1e-6})
COLLAPSE = Note("collapse", "collapsed: the reward is zero since step 0", {"since": 0.0}, ends_run=True)


def ready(step: int = 0) -> Run:
    """A run whose learner has the batch of `step`."""
    run = started(size=1)
    run.actor("a", 0)
    for done in range(step):
        run.one_step(done)
    run.group("a", step, step)
    run.want(step)
    return run


def commit(run: Run, step: int, *notes: Note, lags: list[int] | None = None) -> list[ev.Effect]:
    return run.do(ev.StepDone(run.session, step, step, [0] if lags is None else lags, {}, list(notes)))


def recorded(effects: list[ev.Effect]) -> list[facts.Fact]:
    return [effect.fact for effect in effects if isinstance(effect, ev.Record)]


def test_notes_are_journalled_behind_their_step_in_their_order() -> None:
    run = ready()
    effects = commit(run, 0, WARNING, RATE)
    assert [type(fact) for fact in recorded(effects)] == [facts.StepCommitted, facts.LearnerNoted, facts.LearnerNoted]
    assert recorded(effects)[1:] == [
        facts.LearnerNoted(0, "warning", "entropy is low", {"entropy": 0.25}),
        facts.LearnerNoted(0, "learning-rate", "lowered", {"lr": 1e-6}),
    ]
    assert run.sent(messages.Committed, effects=effects) == [messages.Committed(0)]


def test_a_commit_that_is_sent_twice_journals_its_notes_once() -> None:
    run = ready()
    commit(run, 0, WARNING)
    again = commit(run, 0, WARNING)
    assert recorded(again) == []
    assert run.sent(messages.Committed, effects=again) == [messages.Committed(0)]
    assert len(run.recorded(facts.LearnerNoted)) == 1


def test_notes_of_a_commit_that_is_refused_or_early_are_not_journalled() -> None:
    run = ready()
    commit(run, 1, WARNING)
    run.do(ev.StepDone(run.session, 0, 5, [0], {}, [WARNING]))
    assert not run.recorded(facts.LearnerNoted)


def test_values_that_are_not_finite_are_journalled_as_unknown() -> None:
    run = ready()
    commit(run, 0, Note("warning", "strange", {"entropy": math.nan, "lr": math.inf, "step": 1.0}))
    assert run.recorded(facts.LearnerNoted)[0].values == {"entropy": None, "lr": None, "step": 1.0}


def test_a_note_that_ends_the_run_stops_it_in_order() -> None:
    run = ready()
    effects = commit(run, 0, WARNING, COLLAPSE)
    kinds = [type(fact) for fact in recorded(effects)]
    assert kinds[:4] == [facts.StepCommitted, facts.LearnerNoted, facts.LearnerNoted, facts.RunStopping]
    assert run.ledger.progress.stopping == COLLAPSE.text
    stop = messages.Stop(COLLAPSE.text)
    assert run.sent(messages.Stop, effects=effects) == [stop, stop], "to the actors and to the learner"
    assert run.sent(messages.Committed, effects=effects) == [messages.Committed(0)], "what was trained is kept"
    assert not run.recorded(facts.RunEnded), "the learner still writes its checkpoint"
    assert run.sent(messages.Stop, effects=run.want(1)) == [stop]
    run.do(ev.LearnerGone(run.session, 1, {}))
    assert [(fact.halted) for fact in run.recorded(facts.RunEnded)] == [""], "a run that was stopped, not one that broke"
    commit(run, 0, WARNING, COLLAPSE)
    assert len(run.recorded(facts.RunStopping)) == 1


def test_a_note_that_does_not_end_the_run_lets_it_go_on() -> None:
    run = ready()
    commit(run, 0, Note("collapse", "collapsed", {}))
    assert not run.ledger.progress.stopping
    run.publish(1)
    run.report("a", 1)
    run.group("a", 1, 1)
    run.want(1)
    commit(run, 1)
    assert run.ledger.progress.step == 2


def test_in_a_run_that_is_halted_nothing_is_noted_after_its_end() -> None:
    run = ready()
    effects = commit(run, 0, WARNING, lags=[3])
    kinds = [type(fact) for fact in recorded(effects)]
    assert facts.LearnerNoted in kinds
    assert kinds[-1] is facts.RunEnded


@pytest.mark.parametrize("ends_run", [False, True])
def test_a_broker_that_recovers_knows_the_last_notes(ends_run: bool) -> None:
    run = ready()
    notes = [Note("warning", f"note {number}") for number in range(NUM_NOTES + 3)]
    commit(run, 0, *notes, *([COLLAPSE] if ends_run else []))
    again = Ledger(run.pacing, SEED, NUM_PROMPTS, 1)
    for effect in run.effects:
        if isinstance(effect, ev.Record):
            again.apply(effect.fact)
    texts = [note.text for note in notes] + [COLLAPSE.text] * ends_run
    assert run.ledger.progress.notes == again.progress.notes == [(0, text) for text in texts[-NUM_NOTES:]]
    assert again.progress.stopping == (COLLAPSE.text if ends_run else "")


def test_a_learner_that_resumes_and_decides_again_has_both_decisions_journalled() -> None:
    run = ready()
    commit(run, 0, WARNING)
    run.learner("again", step=0)
    run.want(0)
    commit(run, 0, WARNING)
    assert len(run.recorded(facts.LearnerNoted)) == len(run.recorded(facts.StepCommitted)) == 2


def test_notes_cross_the_wire_whole_and_commits_without_them_still_do() -> None:
    for notes in ([], [WARNING, COLLAPSE]):
        sent = messages.CommitStep(0, 0, [0], {}, notes)
        assert codec.from_learner.decode([bytes(frame) for frame in codec.encode(sent)])[0] == sent
