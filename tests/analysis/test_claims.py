"""Each claim is supported on a sweep that obeys it, refuted on one that breaks it, and left open where a sweep cannot tell."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from analysis.cells import Cell
from analysis.claims import ONE_NEAR, ONE_WIDE, Claim, compare, judge, wilson
from analysis.laws import Interval
from learner.stability.drift import drift_exponent
from tests.analysis.synthetic_sweep import make_sweep

PAPER_RATES, PAPER_LAGS = (1e-6, 5e-7, 2e-7, 1e-7), (8, 16, 32)


def claims(cells: list[Cell]) -> dict[str, Claim]:
    return {claim.name: claim for claim in judge(cells, np.random.default_rng(0), drift_exponent)}


def verdicts(cells: list[Cell]) -> dict[str, str]:
    return {name: claim.verdict for name, claim in claims(cells).items()}


def collapsing_at(cells: list[Cell], step: int, *, up_to: float) -> list[Cell]:
    """The same, with the stable runs at small learning rates collapsed at a step."""
    return [
        msgspec.structs.replace(cell, outcome="collapsed", collapse_step=step) if cell.outcome == "stable" and cell.lr <= up_to else cell
        for cell in cells
    ]


def paper_table() -> list[Cell]:
    """Table 2, with one run for each cell."""
    return [
        msgspec.structs.replace(
            cell,
            outcome="stable" if cell.max_lag * cell.lr < 1.7e-6 else "collapsed",
            collapse_step=None if cell.max_lag * cell.lr < 1.7e-6 else round(3.2e-5 / cell.lr),
        )
        for cell in make_sweep(seeds=(0,), lags=PAPER_LAGS, learning_rates=PAPER_RATES, horizon=600, has_rows=False)
    ]


@pytest.mark.parametrize("pipeline", ["cycles", "queue"])
def test_a_sweep_that_obeys_all_laws_supports_all_claims(pipeline: Any) -> None:
    assert verdicts(make_sweep(pipeline=pipeline)) == dict.fromkeys("abcd", "supported")


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        ("a", {"boundary_exponent": 0.0}),
        ("a", {"boundary_exponent": 0.4}),
        ("b", {"escape_lag_exponent": 1.0}),
        ("b", {"escape_lr_exponent": 0.5, "escape": 2e-5}),
        ("c", {"collapsing_cosine": 0.1}),
        ("c", {"stable_cosine": 0.6}),
        ("c", {"stable_drift": 1.0}),
        ("c", {"collapsing_drift": 0.5}),
    ],
)
@pytest.mark.parametrize("rng_seed", [0, 1])
def test_a_sweep_that_breaks_a_law_refutes_its_claim(broken: str, law: dict[str, float], rng_seed: int) -> None:
    assert verdicts(make_sweep(rng_seed=rng_seed, **law))[broken] == "not supported"  # type: ignore[arg-type]


def test_runs_below_the_boundary_that_collapse_late_refute_the_last_claim() -> None:
    assert verdicts(collapsing_at(make_sweep(), 600, up_to=5e-8))["d"] == "not supported"


def test_one_late_collapse_among_many_runs_leaves_the_last_claim_open() -> None:
    cells = make_sweep(seeds=range(4))
    last = max(index for index, cell in enumerate(cells) if cell.lr == 5e-8)
    cells[last] = msgspec.structs.replace(cells[last], outcome="collapsed", collapse_step=700)
    found = claims(cells)["d"]
    assert (found.verdict, found.figures["num_late"]) == ("undecided", 1)


def test_runs_that_were_too_short_to_spend_the_budget_of_a_collapse_do_not_support_the_last_claim() -> None:
    found = claims(make_sweep(learning_rates=(1e-8, 2e-8, 4e-7, 8e-7, 1.6e-6)))["d"]
    assert found.verdict == "undecided"
    assert found.figures["num_late"] == found.figures["num_past_budget"] == 0


def test_longer_runs_are_judged_by_the_boundary_of_the_shorter_ones() -> None:
    longer = make_sweep(horizon=1600, learning_rates=(5e-8, 6e-8), lags=(4, 8), rng_seed=1)
    found = claims([*make_sweep(), *longer])["d"]
    assert (found.figures["window"], found.figures["num_small"], found.verdict) == (800, 8, "supported")


@pytest.mark.parametrize(
    ("unknown", "setting"),
    [
        ("abd", {"lags": (8,)}),
        ("a", {"lags": (4, 32), "noise": 0.0, "learning_rates": [2.5e-8 * 2 ** (step / 4) for step in range(25)]}),
        ("a", {"boundary_exponent": 0.75}),
        ("abcd", {"learning_rates": (1e-9,)}),
        ("abcd", {"learning_rates": (1e-4,)}),
        ("bc", {"learning_rates": (5e-8, 1e-7), "lags": (16,)}),
        ("c", {"learning_rates": (1e-8, 2e-8, 8e-7), "lags": (4,)}),
        ("c", {"has_rows": False}),
    ],
)
def test_a_sweep_that_cannot_tell_leaves_a_claim_open(unknown: str, setting: dict[str, Any]) -> None:
    found = verdicts(make_sweep(**setting))
    assert {name: found[name] for name in unknown} == dict.fromkeys(unknown, "undecided")


def test_no_cells_at_all_leave_every_claim_open() -> None:
    assert verdicts([]) == dict.fromkeys("abcd", "undecided")


def test_a_boundary_set_by_the_horizon_does_not_refute_the_first_claim() -> None:
    found = claims(make_sweep(horizon=100, learning_rates=(5e-8, 1e-7, 2e-7, 4e-7, 8e-7, 1.6e-6)))["a"]
    assert found.verdict == "undecided"
    assert "horizon" in found.reason


def test_a_censored_boundary_that_no_power_law_passes_leaves_the_first_claim_open() -> None:
    cells = make_sweep()
    odd = [msgspec.structs.replace(cell, max_lag=64, outcome="stable", collapse_step=None) for cell in cells if cell.max_lag == 4]
    found = claims([*cells, *odd])["a"]
    assert found.verdict == "undecided"
    assert "censored" in found.reason


def test_the_paper_table_has_too_few_boundaries_for_its_first_claim_and_too_coarse_steps_for_its_second() -> None:
    """t eta is exactly constant as recorded, but a sync every 32 steps hides a dependence on S of a power up to 0.4."""
    found = claims(paper_table())
    assert found["a"].verdict == "undecided"
    assert found["a"].figures["censored"] == [32]
    assert found["b"].figures["recorded_mean"] == pytest.approx(3.2e-5)
    assert found["b"].figures["recorded_variation"] == pytest.approx(0.0, abs=1e-9)
    assert found["b"].figures["num_coarse"] == 1
    assert isinstance(interval := found["b"].figures["lag_interval"], Interval)
    assert interval.contains(0.0)
    assert found["b"].verdict == "undecided"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.7, 1.3), "supported"),
        ((1.02, 1.05), "supported"),
        ((0.6, 1.3), "undecided"),
        ((0.95, 1.5), "undecided"),
        ((0.7, 0.85), "not supported"),
        ((1.2, 9.0), "not supported"),
    ],
)
def test_an_interval_supports_one_refutes_one_or_leaves_it_open(interval: tuple[float, float], verdict: str) -> None:
    assert compare(Interval(*interval), ONE_NEAR, ONE_WIDE) == verdict


def test_the_wilson_interval_of_a_share() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)
    assert wilson(0, 10).upper == pytest.approx(0.278, abs=0.001)
    assert wilson(5, 10).lower == pytest.approx(0.237, abs=0.001)


def test_verdicts_are_the_same_with_the_same_generator_and_can_be_written_as_json() -> None:
    cells = make_sweep(seeds=(0,))
    once = judge(cells, np.random.default_rng(5), drift_exponent)
    assert judge(cells, np.random.default_rng(5), drift_exponent) == once
    read = msgspec.json.decode(msgspec.json.encode(once))
    assert [claim["verdict"] for claim in read] == [claim.verdict for claim in once]
