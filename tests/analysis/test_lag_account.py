"""The account of lag and of lengths, from a real broker's journal: the same as what the ledger recorded, and as what `status` showed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from analysis.report import finish_run
from analysis.summary import summarize
from protocol import facts
from protocol.journal import open_read_only, read_facts
from protocol.lag_account import LagAccount, LagParts
from tests.analysis.recorded import start

Inspect = Callable[..., Result]


def recorded_facts(run: Path) -> list[facts.AnyFact]:
    path = run / "journal.sqlite"
    connection = open_read_only(path)
    try:
        return [entry.fact for entry in read_facts(connection, path)]
    finally:
        connection.close()


def test_the_parts_of_every_group_add_up_to_its_recorded_lag_at_every_step(eventful: Path) -> None:
    account, by_group, by_mean = LagAccount(), 0, 0
    for fact in recorded_facts(eventful):
        mean = account.add(fact)
        if not isinstance(fact, facts.StepCommitted):
            continue
        groups = account.groups_at(fact)
        assert [parts.total for parts in groups] == fact.lags
        assert all(min(parts) >= 0 for parts in groups)
        assert mean == tuple(sum(part) / len(groups) for part in zip(*groups, strict=True))
        by_group, by_mean = by_group + len(groups), by_mean + 1
    assert (by_group, by_mean) == (18, 9), "all steps, the one done again among them"


def test_the_summary_has_the_lag_in_parts(eventful: Path) -> None:
    summary = summarize(eventful)
    mean = sum(lag * count for lag, count in summary.lags.items()) / sum(summary.lags.values())
    assert LagParts(**summary.lag_parts).total == pytest.approx(mean)
    assert summary.lag_parts_recent == summary.lag_parts, "a run of fewer steps than are recent"
    assert summary.lag_parts == pytest.approx({"publish": 2 / 18, "in_flight": 0, "queued": 14 / 18, "reuse": 0})


def test_the_summary_tells_it_to_a_person(copy: Path) -> None:
    shown = finish_run(copy).lines
    assert any("lag 0.9 = 0.1 publishing + 0.0 in flight + 0.8 queued + 0.0 reuse" in line for line in shown)
    assert any("3.5 tokens a completion trained on, 3.5 a completion that came back (100.0%)" in line for line in shown)
    assert json.loads((copy / "summary.json").read_text())["lag_parts"]["queued"] == pytest.approx(14 / 18)


def test_batches_are_listed_with_the_parts_of_their_lag(eventful: Path, inspect: Inspect) -> None:
    found = [json.loads(line) for line in inspect("batches", eventful, "--json").stdout.splitlines()]
    assert [sum(row["lag_parts"].values()) for row in found] == [0, 1, 2, 0, 1.5, 2, 0.5, 1]
    assert found[4]["lag_parts"] == {"publish": 0.5, "in_flight": 0.0, "queued": 1.0, "reuse": 0.0}
    assert "0.5+0.0+1.0" in inspect("batches", eventful).stdout


def test_status_shows_the_same_as_the_journal_while_the_run_goes_on(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 5)
    assert run.broker.status(run.now).lag_parts == {}
    for step in range(3):
        run.step(step)
        assert run.broker.status(run.now).lag_parts == summarize(tmp_path / "run").lag_parts_recent
    run.broker.close()
