"""What happens on a collapse: the run goes on, ends in order, or goes back, whoever dies meanwhile; and what was recorded replays."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from analysis.report import finish_run
from analysis.verify import verify
from deploy.prepare import prepare_run
from deploy.rundir import RunDirectory
from deploy.wiring import run_serial
from learner.damage import damage, list_checkpoints, set_aside_after
from learner.rollback import read_rollbacks, recorded_in, roll_back, step_of
from learner.stability.collapse import collapse_step
from learner.stability.monitor import Rollback
from protocol import facts
from protocol.config import parse_config
from protocol.errors import Collapsed
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from tests.learner.conftest import on_ranks  # noqa: F401
from tests.replay.conftest import launch, replay  # noqa: F401
from tests.replay.recording import Session, live
from tests.system.test_survival import power_cut, resume  # noqa: F401

pytestmark = pytest.mark.system
LR = 1e-3
P = 4
"""Groups in a batch."""


FIRST = 4
"""The first batch without a reward. The batch before was the last good one, and weights of step 2 may have sampled it."""


def has_collapsed(num_bad: int) -> bool:
    """Whether so many batches without a reward are a collapse, after FIRST with almost the whole of it."""
    return collapse_step(range(FIRST + num_bad), [0.95] * FIRST + [0.0] * num_bad, P * 4) is not None


BAD = next(num_bad for num_bad in itertools.count() if has_collapsed(num_bad))
END = FIRST + BAD
"""The step after the one that sees the collapse."""


def falling(settings: Callable[..., Any], on_collapse: str, *bad: int, steps: int = END + 5, **learner: Any) -> dict[str, Any]:
    """A run of lag 1 that is given no reward in BAD batches from each of `bad` on, with a checkpoint every other step."""
    ranges = " ".join(f"{P * first}-{P * (first + BAD)}" for first in bad)
    found: dict[str, Any] = settings(
        run={"steps": steps},
        policy={"max_lag": 1},
        rollout={"groups_per_batch": P},
        task={"name": "tests.system.falling_task:Falling", "bad": ranges},
        learner={"lr": LR, "checkpoint_every": 2} | learner,
        stability={"on_collapse": on_collapse},
    )
    return found


def prepared(config: dict[str, Any], directory: Path) -> RunDirectory:
    config["run"] |= {"directory": str(directory.parent)}
    return prepare_run(parse_config(config), directory, lambda text: None)


F = TypeVar("F", bound=facts.Fact)


def found(run: RunDirectory, kind: type[F]) -> list[F]:
    """The facts of a kind, in order."""
    connection = open_read_only(run.path / JOURNAL_NAME)
    try:
        return [entry.fact for entry in read_facts(connection, run.path / JOURNAL_NAME) if isinstance(entry.fact, kind)]
    finally:
        connection.close()


def notes(run: RunDirectory, kind: str) -> list[facts.LearnerNoted]:
    return [note for note in found(run, facts.LearnerNoted) if note.kind == kind]


def lineages(run: RunDirectory) -> list[tuple[int, list[Rollback]]]:
    """Where each learner session began, and the rollbacks that it went by."""
    return [(fact.step, recorded_in(fact.environment)) for fact in found(run, facts.LearnerStarted)]


def check_recording(run: RunDirectory) -> None:
    """The journal verifies; a ticket is in one batch, and a step is done once in each lineage, with the same batch in all."""
    assert [(check.name, check.findings) for check in verify(run.path) if check.num_findings] == []
    assert finish_run(run.path).broken_promises == []
    in_batches = Counter(ticket for batch in found(run, facts.BatchFormed) for ticket in batch.tickets)
    assert set(in_batches.values()) == {1}
    steps = [(done.lineage, done.step) for done in found(run, facts.StepCommitted)]
    assert len(steps) == len(set(steps))
    assert len({(done.step, done.batch) for done in found(run, facts.StepCommitted)}) == len({step for _, step in steps})


def check_learning_rates(run: RunDirectory) -> None:
    """Each step had the learning rate that follows from what its session went by."""
    by_lineage = dict(enumerate(rollbacks for _, rollbacks in lineages(run)))
    for done in found(run, facts.StepCommitted):
        rollbacks = by_lineage[done.lineage]
        again = any(back.start <= done.step < back.until for back in rollbacks)
        scale = next((back.lr_scale for back in reversed(rollbacks) if back.until <= done.step), 1.0)
        assert done.metrics["lr"] == (0.0 if again else LR * scale)


def check_replay(run: RunDirectory, replay: Callable[..., Any]) -> None:  # noqa: F811
    """The recorded learner, over the steps that count, arrives at the recorded roots."""
    replayed, _ = replay(run.path)
    assert all(result.is_exact and result.environment == {} for result in replayed.results)
    assert sum(result.num_compared for result in replayed.results) >= replayed.history.num_steps
    for row in replayed.rows:
        assert row.metrics["lr"] == replayed.history.steps[row.step].metrics["lr"]


def went_back_once(run: RunDirectory) -> Rollback:
    (back,) = read_rollbacks(run.checkpoints)
    assert (back.start, back.until, back.lr_scale) == (2, END, 0.5)
    assert all(note.values == {"start": 2, "until": END, "lr_scale": 0.5, "level": back.level} for note in notes(run, "rollback"))
    assert lineages(run)[-1] == (2, [back])
    assert found(run, facts.RunStopping)[-1].reason == "the last step is done"
    return back


def later_checkpoints() -> list[int]:
    """Those of the bad stretch, when the run has collapsed."""
    return [step for step in range(4, END) if step % 2 == 0][-3:]


# --- in one process


def test_a_run_that_collapses_goes_back_in_a_new_lineage_and_replays(
    settings: Callable[..., Any],
    replay: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    run = prepared(falling(settings, "rollback", FIRST), tmp_path / "run")
    run_serial(run)
    back = went_back_once(run)
    assert lineages(run) == [(0, []), (2, [back])]
    assert "The last good checkpoint is step-00000002" in notes(run, "collapse")[0].text
    aside = sorted(run.checkpoints.glob("collapsed-*"))
    assert [path.name for path in aside] == [f"collapsed-0-step-{step:08d}" for step in later_checkpoints()]
    assert all(damage(path) == "" for path in aside)
    check_recording(run)
    check_learning_rates(run)
    check_replay(run, replay)
    within, _ = replay(run.path, first=END + 3)
    assert within.first > END and all(result.is_exact for result in within.results)
    # Until a batch of new groups comes, the weights are the last good ones.
    (good,) = {version.version.root for version in found(run, facts.VersionPublished) if version.version.step == 2}
    again = [version.version for version in found(run, facts.VersionPublished) if version.version.lineage == 1]
    assert {version.root for version in again if version.step <= END} == {good}
    assert good not in {version.root for version in again if version.step > END}


@pytest.mark.parametrize("newest", [END, FIRST, 2])
def test_a_learner_that_dies_while_it_goes_back_does_so_when_it_starts_again(
    settings: Callable[..., Any],
    on_ranks: Callable[..., Any],  # noqa: F811
    replay: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
    newest: int,
) -> None:
    run = prepared(falling(settings, "rollback", FIRST), tmp_path / "run")
    live(run, Session(dies_after=END - 1), on_ranks)  # its note is in the journal, and nothing else has happened
    assert len(notes(run, "rollback")) == 1
    assert [step_of(path) for path in list_checkpoints(run.checkpoints)] == [2, *later_checkpoints()]
    set_aside_after(run.checkpoints, newest, "collapsed", lambda text: None)
    if newest == 2:  # here it dies once more, on its way back to the collapse, which a replay is not to take for a rollback
        live(run, Session(dies_after=4), on_ranks)
        check_replay(run, replay)
    run_serial(run)
    back = went_back_once(run)
    assert all(rollbacks == [] for _, rollbacks in lineages(run)[:-1])
    assert lineages(run)[-1] == (2, [back]) and len(notes(run, "rollback")) == 2
    assert all(damage(path) == "" for path in run.checkpoints.glob("collapsed-*"))
    check_recording(run)
    check_learning_rates(run)
    check_replay(run, replay)


def test_a_learner_that_dies_after_it_has_gone_back_goes_by_that(
    settings: Callable[..., Any],
    on_ranks: Callable[..., Any],  # noqa: F811
    replay: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    run = prepared(falling(settings, "rollback", FIRST), tmp_path / "run")
    live(run, Session(dies_after=END - 1), on_ranks)
    (note,) = notes(run, "rollback")
    back = Rollback(2, END, 0.5, note.values["level"] or 0.0)
    roll_back(run.checkpoints, [back], lambda text: None)
    for last in (5, END + 1):  # while steps are done again, and after that
        live(run, Session(dies_after=last), on_ranks)
    run_serial(run)
    assert lineages(run) == [(0, []), (2, [back]), (4, [back]), (END + 1 - (END + 1) % 2, [back])]
    assert read_rollbacks(run.checkpoints) == [back] and len(notes(run, "rollback")) == 1
    check_recording(run)
    check_learning_rates(run)
    check_replay(run, replay)


def test_a_reused_batch_is_not_trained_on_in_part_after_a_rollback(settings: Callable[..., Any], tmp_path: Path) -> None:
    config = falling(settings, "rollback", FIRST, steps=2 * END + 4)
    config["policy"] |= {"reuse": 2, "sync_every": 2}
    run = prepared(config, tmp_path / "run")
    run_serial(run)
    (back,) = read_rollbacks(run.checkpoints)
    assert (notes(run, "rollback")[0].step, back.start, back.until) == (2 * END - 2, 6, 2 * END)
    assert lineages(run) == [(0, []), (6, [back])]
    check_recording(run)
    check_learning_rates(run)


def test_after_the_last_rollback_a_collapse_ends_the_run(settings: Callable[..., Any], tmp_path: Path) -> None:
    firsts = [FIRST + time * (BAD + 4) for time in range(4)]
    good = [first - 2 - first % 2 for first in firsts]
    run = prepared(falling(settings, "rollback", *firsts, steps=firsts[-1] + BAD + 4), tmp_path / "run")
    run_serial(run)
    assert [back.lr_scale for back in read_rollbacks(run.checkpoints)] == [0.5, 0.25, 0.125]
    assert [step for step, _ in lineages(run)] == [0, *good[:3]]
    with pytest.raises(Collapsed, match=rf"The last good checkpoint is step-{good[3]:08d}, and the run has gone back 3 times"):
        finish_run(run.path).check()
    assert max(done.step for done in found(run, facts.StepCommitted)) == firsts[-1] + BAD - 1
    check_recording(run)
    check_learning_rates(run)


def test_a_run_that_is_to_go_on_only_tells(settings: Callable[..., Any], tmp_path: Path) -> None:
    run = prepared(falling(settings, "continue", FIRST, checkpoint_every=1), tmp_path / "run")
    run_serial(run)
    (note,) = notes(run, "collapse")
    assert note.step == END - 1 and "last near its best at step 3. The last good checkpoint is step-00000002" in note.text
    finish_run(run.path).check()
    assert lineages(run) == [(0, [])] and len(found(run, facts.StepCommitted)) == END + 5


def test_a_run_that_was_ended_by_a_collapse_does_not_train_on_without_a_word(settings: Callable[..., Any], tmp_path: Path) -> None:
    run = prepared(falling(settings, "stop", FIRST, END, steps=2 * END), tmp_path / "run")
    run_serial(run)
    kept = [step_of(path) for path in list_checkpoints(run.checkpoints)]
    assert len(kept) == 4 and (kept[0], kept[-1]) == (2, END), "the good one is kept beside the newest"
    run_serial(run)
    assert lineages(run) == [(0, []), (END, [])]
    assert [note.step for note in notes(run, "collapse")] == [END - 1, END]
    with pytest.raises(Collapsed):
        finish_run(run.path).check()
    check_recording(run)


# --- with processes


def test_ranks_go_back_together_whoever_is_killed_meanwhile(
    start: Callable[..., Any],
    settings: Callable[..., Any],
    resume: Callable[..., Any],  # noqa: F811
    replay: Callable[..., Any],  # noqa: F811
) -> None:
    up = start(falling(settings, "rollback", FIRST, steps=30, ranks=2))
    up.until(lambda status: any("going back" in text for _, text in status["notes"]))
    up.roles("learner-rank")[1].kill()
    killed = up.status()
    up.until(lambda status: status["lineage"] > (killed["lineage"] if killed else 0))
    past = power_cut(up)
    again = resume(up)
    assert again.wait() == 0, again.output()
    run = RunDirectory(up.directory)
    went_back_once(run)
    assert found(run, facts.Fact)[: len(past)] == past
    check_recording(run)
    check_learning_rates(run)
    check_replay(run, replay)


def test_a_run_of_several_ranks_that_is_ended_by_a_collapse_says_where_to_go_on(
    cli: Callable[..., Any], settings: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = falling(settings, "stop", FIRST, steps=30, ranks=2)
    done = cli("up", str(write_config(config)), "--directory", str(tmp_path / "run"))
    run = RunDirectory(tmp_path / "run")
    assert done.returncode == Collapsed.exit_code == 9, f"{done.stdout}\n{done.stderr}"
    assert "collapsed: the reward is zero since step 4" in done.stderr
    assert "The last good checkpoint is step-00000002; start again from there" in done.stderr
    assert damage(run.checkpoints / "step-00000002") == ""
    assert json.loads((run.path / "summary.json").read_bytes())["outcome"].startswith("collapsed")
    assert max(fact.step for fact in found(run, facts.StepCommitted)) == END - 1
    assert [fact.halted for fact in found(run, facts.RunEnded)] == [""]
    check_recording(run)
