"""From recordings to cells: exactly the journal's numbers, each step once, and a report from whatever is left of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.cell_tables import read_cells, write_cells
from analysis.sweep_reading import TABLE, find_sweep, pipeline_of, read_run, read_sweep, report_sweep
from learner.stability.collapse import LEVEL_BATCHES, MIN_REWARDS
from learner.stability.monitor import BatchSeen, Monitor, Moved, Signal
from protocol import facts
from protocol.config import overridden
from protocol.errors import ConfigError, JournalError
from protocol.journal import JOURNAL_NAME
from tests.analysis.recorded import record_eventful
from tests.analysis.recorded_steps import MEASURES, config_of, finished, journal, started, step
from tests.analysis.synthetic_sweep import make_sweep


def test_a_cell_has_exactly_the_journal_s_numbers(tmp_path: Path) -> None:
    recorded = [step(number) for number in range(6)]
    notes = [facts.LearnerNoted(3, "warning", "the reward fell"), facts.LearnerNoted(4, "warning", "still")]
    evaluations = [facts.Evaluated(0, 0.25, 8), facts.Evaluated(6, 0.75, 8)]
    run = journal(tmp_path / "some-run", config_of(), [evaluations[0], *recorded[:4], *notes, *recorded[4:], evaluations[1]])
    cell = read_run(run)
    assert (cell.name, cell.pipeline, cell.surrogate, cell.max_lag, cell.lr, cell.seed, cell.horizon, cell.governor) == (
        *("some-run", "cycles", "min-clip", 2, 2e-3, 4, 6, "warn"),
    )
    assert (cell.outcome, cell.collapse_step, cell.warning_step) == ("stable", None, 3)
    assert cell.validation == [(0, 0.25), (6, 0.75)]
    assert [row.step for row in cell.rows] == list(range(6))
    assert [row.is_first_use for row in cell.rows] == [True, False] * 3
    for row, fact in zip(cell.rows, recorded, strict=True):
        assert row.lag == sum(fact.lags) / 3
        assert row.cosine == (-0.2 if row.is_first_use else 0.7)
        assert {name: getattr(row, name) for name in ("reward", "lr", *MEASURES)} == {
            name: fact.metrics[name] for name in ("reward", "lr", *MEASURES)
        }


def test_what_was_not_measured_or_not_finite_is_none(tmp_path: Path) -> None:
    bare = facts.StepCommitted(1, 0, 0, [2], {"reward": None})
    first, second = read_run(journal(tmp_path / "run", config_of(), [step(0, drift=None), bare])).rows
    assert first.drift is None and first.displacement is not None
    assert (second.reward, second.cosine, second.entropy, second.lag, second.lr) == (None, None, None, 2.0, 0.0)


def test_the_journal_of_a_real_broker_reads_with_its_repeated_step_once(tmp_path: Path) -> None:
    record_eventful(tmp_path / "run", 8)
    cell = read_run(tmp_path / "run")
    assert [row.step for row in cell.rows] == list(range(8))
    assert (cell.pipeline, cell.max_lag, cell.horizon, cell.seed) == ("queue", 2, 8, 5)
    assert all(row.is_first_use for row in cell.rows)
    assert cell.validation == [(8, 0.5)]


def test_where_a_learner_went_back_only_what_it_did_from_there_on_counts(tmp_path: Path) -> None:
    before = [step(number) for number in range(5)]
    told = [facts.Evaluated(2, 0.2, 8), facts.Evaluated(4, 0.4, 8), facts.Evaluated(5, 0.5, 8)]
    again = [step(number, scale=3.0) for number in (2, 3)]
    cell = read_run(journal(tmp_path / "run", config_of(), [*before, *told, *again, facts.Evaluated(4, 0.9, 8)]))
    assert [(row.step, row.g_upd) for row in cell.rows] == [
        (fact.step, pytest.approx(fact.metrics["g_upd"], rel=1e-5)) for fact in (before[0], before[1], again[0], again[1])
    ], "step 4 of the lineage that was left is not a step of this run"
    assert cell.validation == [(2, 0.2), (4, 0.9)]
    not_yet = read_run(journal(tmp_path / "not-yet", config_of(), [*before, *told, *again]))
    assert not_yet.validation == [(2, 0.2)], "weights that were left have no reward in this run"


def falling(num_good: int, num_steps: int) -> list[facts.StepCommitted]:
    """Steps of a run with reward 0.5 before step `num_good`, and none from there on."""
    return [step(number, reward=0.5 if number < num_good else 0.0) for number in range(num_steps)]


def test_a_collapse_is_told_from_first_uses_alone(tmp_path: Path) -> None:
    config = config_of(run={"steps": 24, "seed": 0})
    cell = read_run(journal(tmp_path / "run", config, falling(12, 24)))
    assert (cell.outcome, cell.collapse_step, cell.collapse_sync) == ("collapsed", 12, 6)
    few_batches = read_run(journal(tmp_path / "short", config, falling(12, 12 + 2 * (LEVEL_BATCHES - 1))))
    assert few_batches.outcome == "stable", f"{2 * (LEVEL_BATCHES - 1)} steps at zero, but their level has been there for one batch"


def test_a_batch_has_as_many_completions_as_its_groups_have_together_and_few_of_them_tell_no_collapse(tmp_path: Path) -> None:
    for groups, size, is_clear in ((16, 8, True), (1, 2, False)):
        config = config_of(run={"steps": 24, "seed": 0}, rollout={"groups_per_batch": groups, "group_size": size})
        cell = read_run(journal(tmp_path / f"{groups}-groups", config, falling(12, 24)))
        assert cell.num_completions == groups * size
        assert (cell.outcome == "collapsed") == is_clear == (6 * groups * size * 0.5 >= MIN_REWARDS)
        write_cells([cell], tmp_path / "t.zst")
        assert read_cells(tmp_path / "t.zst") == [cell]


@pytest.mark.parametrize("num_completions", [8, 128])
def test_a_record_tells_the_collapse_that_the_run_itself_told(tmp_path: Path, num_completions: int) -> None:
    config = config_of(run={"steps": 80, "seed": 0}, rollout={"groups_per_batch": num_completions // 2, "group_size": 2})
    found = set()
    for num_steps in range(12, 80, 7):
        recorded, monitor = falling(12, num_steps), Monitor(config, None)
        for fact in recorded:
            seen = BatchSeen(fact.step % 2 == 0, fact.metrics["reward"] or 0.0, num_completions, 2, None, 1.0, 10.0)
            monitor.moved(fact.step, 1e-3, seen, Signal(0.0, 1.0), Moved(0.0, None, 0.0, {}))
        told = [int(note.values["since"]) for note in monitor.take_notes() if note.kind == "collapse"]
        cell = read_run(journal(tmp_path / f"run-{num_steps}", config, recorded))
        assert told == ([] if cell.collapse_step is None else [cell.collapse_step])
        found.add(cell.collapse_step)
    assert found == {None, 12}


@pytest.mark.parametrize(
    ("policy", "pipeline", "max_lag"),
    [
        ({"reuse": 4}, "cycles", 4),
        ({"reuse": 1, "max_lag": 4}, "queue", 4),
        ({"reuse": 1, "max_lag": 0}, "cycles", 0),  # The synchronous run: no weights but those that sampled.
        ({"reuse": 4, "max_lag": 9}, "cycles", 10),
    ],
)
def test_pipeline_and_s_are_counted_as_a_sweep_s_file_has_them(tmp_path: Path, policy: dict[str, Any], pipeline: str, max_lag: int) -> None:
    config = config_of(policy=policy)
    cell = read_run(journal(tmp_path / "run", config, [step(0)]))
    assert (cell.pipeline, cell.max_lag) == (pipeline, max_lag) == (pipeline_of(config), max_lag)
    write_cells([cell], tmp_path / "t.zst")
    assert read_cells(tmp_path / "t.zst") == [cell]


@pytest.mark.parametrize(
    ("stability", "governor"),
    [
        ({"governor": "off"}, "off"),
        ({"governor": "warn"}, "warn"),
        ({"governor": "hold"}, "hold"),
        ({"governor": "hold", "rule": "sqrt-ess"}, "sqrt-ess"),
        ({"governor": "warn", "rule": "sqrt-ess"}, "warn"),
    ],
)
def test_the_governor_is_named_by_what_it_holds(tmp_path: Path, stability: dict[str, Any], governor: str) -> None:
    assert read_run(journal(tmp_path / "run", config_of(stability=stability), [step(0)])).governor == governor


def test_a_learning_rate_that_was_changed_on_the_way_is_told(tmp_path: Path) -> None:
    config = config_of()
    rolled_back = read_run(journal(tmp_path / "rolled", config, [step(0), facts.LearnerNoted(1, "rollback", "back to 0"), step(0)]))
    assert rolled_back.governor == "rollback"
    longer = overridden(config, ["run.steps=9", "learner.threads=2"])
    assert read_run(journal(tmp_path / "longer", config, [step(0), started(longer), step(1)])).governor == "warn"
    cell = read_run(journal(tmp_path / "faster", config, [step(0), started(overridden(config, ["learner.lr=9.0"])), step(1)]))
    assert (cell.governor, cell.lr) == ("by hand", 9.0)


def test_a_run_that_is_resumed_for_more_steps_has_the_new_number(tmp_path: Path) -> None:
    config = config_of()
    cell = read_run(journal(tmp_path / "run", config, [step(0), started(overridden(config, ["run.steps=9"])), step(1)]))
    assert cell.horizon == 9


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of two finished runs of a sweep of three, with its file beside it; the third is in progress."""
    folder = tmp_path / "runs" / "s"
    for seed, reward in ((1, 0.5), (2, 0.0)):
        config = config_of(run={"steps": 24, "seed": seed})
        steps = [step(number, reward=0.5 if number < 8 else reward) for number in range(24)]
        finished(folder / f"cycles-min-clip-S2-lr0.002-seed{seed}", config, steps)
    finished(folder / ".cycles-min-clip-S2-lr0.002-seed3.partial", config_of(), [step(0)])
    journal(folder / "unfinished", config_of(), [step(0)])
    (folder / "sweep.lock").touch()
    (tmp_path / "base.toml").write_text("[run]\nsteps = 24\n")
    (tmp_path / "sweep.toml").write_text(
        f'name = "s"\nconfig = "base.toml"\ndirectory = "{tmp_path / "runs"}"\n'
        '[[grids]]\nsurrogates = ["min-clip"]\nlags = [2]\nlearning_rates = [2e-3]\nseeds = [1, 2, 3]\n'
    )
    return tmp_path


def test_a_sweep_is_its_finished_runs(sweep: Path) -> None:
    cells, folder = read_sweep(sweep / "runs" / "s")
    assert folder == sweep / "runs" / "s"
    assert [(cell.name, cell.outcome) for cell in cells] == [
        ("cycles-min-clip-S2-lr0.002-seed1", "stable"),
        ("cycles-min-clip-S2-lr0.002-seed2", "collapsed"),
    ]
    assert read_sweep(sweep / "sweep.toml") == (cells, folder)


def test_a_report_is_the_same_from_folder_file_and_table(sweep: Path) -> None:
    folder = sweep / "runs" / "s"
    said = report_sweep([folder], None)
    assert said[0] == "2 runs, 1 of them collapsed"
    assert str(folder / "report" / "index.html") in said
    table = folder / "report" / TABLE
    assert report_sweep([sweep / "sweep.toml"], sweep / "a")[0] == "2 runs, 1 of them collapsed; 1 more are not done yet"
    report_sweep([table], sweep / "b")
    report_sweep([folder / "report"], sweep / "c")  # a folder in which only the table is left
    for name in ("index.html", "tables.md", "cells.csv", TABLE):
        wanted = (folder / "report" / name).read_bytes()
        assert all((sweep / other / name).read_bytes() == wanted for other in ("a", "b", "c")), name
    assert len(read_sweep(folder)[0]) == 2, "the report is no run"


def test_a_table_s_report_goes_beside_it(tmp_path: Path) -> None:
    write_cells(make_sweep(lags=(4, 8), seeds=(0,)), tmp_path / "table.zst")
    report_sweep([tmp_path / "table.zst"], None)
    assert (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "there is no"),
        ("nowhere.toml", "cannot be read"),
        ("empty", "holds no finished run"),
        ("runs/s/cycles-min-clip-S2-lr0.002-seed1", "is a run, not a sweep"),
        ("runs/s/unfinished", "is a run, not a sweep"),
        ("base.toml", "is missing"),
        ("text.md", "is not what was written"),
        ("later.toml", "there is no"),
    ],
)
def test_what_is_no_sweep_is_named(sweep: Path, name: str, said: str) -> None:
    (sweep / "empty").mkdir()
    (sweep / "text.md").write_text("text")
    (sweep / "later.toml").write_text((sweep / "sweep.toml").read_text().replace('"s"', '"later"'))
    with pytest.raises(ConfigError) as caught:
        report_sweep([sweep / name], None)
    assert said in str(caught.value)


def test_a_run_without_a_journal_and_one_that_is_damaged_are_told(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        read_run(tmp_path / "nowhere")
    bad = sweep / "runs" / "s" / "cycles-min-clip-S2-lr0.002-seed1" / JOURNAL_NAME
    bad.write_bytes(b"no journal" * 1000)
    with pytest.raises(JournalError) as caught:
        read_sweep(sweep / "runs" / "s")
    assert str(bad) in str(caught.value)
    assert find_sweep(sweep / "runs" / "s") == (sweep / "runs" / "s", None)
