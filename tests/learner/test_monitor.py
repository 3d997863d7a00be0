"""The monitor: what it measures, tells once, forecasts where it is calibrated, and decides again after a restart."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from learner.stability.collapse import LEVEL_BATCHES
from learner.stability.governor import MARGIN
from learner.stability.monitor import LOOK_EVERY, WINDOW, BatchSeen, Monitor, Moved, Note, Rollback, Signal, State
from learner.stability.rule import Calibration, Measured
from learner.stability.signs import FAR_NATS
from protocol.config import Config, parse_config

LR = 2.0**-10
"""A notch of the governor."""
STEPS = 1000


def exactly(value: float) -> Measured:
    return Measured(value, value, value)


def make_config(**stability: Any) -> Config:
    return parse_config({"run": {"steps": STEPS}, "policy": {"max_lag": 3}, "stability": {"on_collapse": "continue"} | stability})


LENGTH = 10.0


def seen(reward: float = 0.5, lag: int = 3, is_first_use: bool = True, drift: float | None = 0.1, lag_now: float = 1.0) -> BatchSeen:
    return BatchSeen(is_first_use, reward, 64, lag, drift, lag_now, LENGTH)


def signal(kl_behaviour: float = 0.0, ess: float = 1.0) -> Signal:
    return Signal(kl_behaviour, ess)


DEGENERATE = signal(kl_behaviour=FAR_NATS / LENGTH)


def straight(step: int, norm: float = LR) -> Moved:
    """Updates of one direction and length."""
    lags = [lag for lag in (1, 2, 4, 8, 16, 32) if lag <= step + 1]
    return Moved(norm, 1.0 if step else None, (step + 1) * norm, {lag: lag * norm for lag in lags})


def go(monitor: Monitor, step: int, batch: BatchSeen | None = None, said: Signal | None = None, lr: float = LR) -> dict[str, float]:
    """One step with updates of G_upd 1."""
    batch, said = batch or seen(), said or signal()
    used = monitor.govern(step, lr, batch, said)
    return {"lr": used} | monitor.moved(step, used, batch, said, straight(step, used))


def kinds(notes: list[Note]) -> list[str]:
    return [note.kind for note in notes]


# --- measures


def test_measures_are_those_of_the_step() -> None:
    monitor = Monitor(make_config(), None)
    found = monitor.moved(0, LR, seen(drift=0.25), signal(), Moved(3 * LR, None, 7e-3, {1: 3 * LR}))
    assert found == {"update_norm": 3 * LR, "displacement": 7e-3, "g_upd": pytest.approx(3.0), "g_2": pytest.approx(3.0), "drift": 0.25}
    found = monitor.moved(1, LR / 2, seen(drift=None), signal(), Moved(LR / 2, 0.75, 7e-3, {1: 3 * LR}))
    assert found["g_upd"] == pytest.approx(1.0)
    assert found["g_2"] == pytest.approx(math.sqrt((3.0**2 + 1.0**2) / 2))
    assert found["cosine_new_batch"] == 0.75
    assert "drift" not in found and "cosine_same_batch" not in found


def test_cosines_within_a_reused_batch_and_between_batches_are_told_apart() -> None:
    monitor = Monitor(make_config(), None)
    names = []
    for step in range(6):
        found = monitor.moved(step, LR, seen(is_first_use=step % 3 == 0), signal(), Moved(LR, 0.1 * step, LR, {}))
        names.append([name for name in found if name.startswith("cosine")])
        assert found[names[-1][0]] == 0.1 * step
    assert names == [["cosine_new_batch"], ["cosine_same_batch"], ["cosine_same_batch"]] * 2


def test_g_2_is_taken_over_the_window_only() -> None:
    monitor = Monitor(make_config(), None)
    for step in range(WINDOW):
        monitor.moved(step, LR, seen(), signal(), straight(step, 5 * LR))
    assert monitor.g_2 == pytest.approx(5.0)
    for step in range(WINDOW):
        monitor.moved(step, LR, seen(), signal(), straight(step, LR))
    assert monitor.g_2 == pytest.approx(1.0)


def test_an_update_that_was_skipped_is_no_part_of_g_2() -> None:
    monitor = Monitor(make_config(), None)
    for step in range(10):
        found = monitor.moved(step, LR, seen(), signal(), straight(step, 2 * LR if step % 2 else 0.0))
    assert monitor.state.g_upd == [pytest.approx(2.0)] * 5
    assert found["g_2"] == pytest.approx(2.0)


def test_a_straight_path_has_exponent_one_and_a_random_one_half() -> None:
    rng = np.random.default_rng(0)
    for is_straight, expected in ((True, 1.0), (False, 0.5)):
        monitor, place, found = Monitor(make_config(), None), [np.zeros(4000)], {}
        for step in range(3 * WINDOW):
            place.append(place[-1] + (np.ones(4000) if is_straight else rng.standard_normal(4000)))
            distances = {lag: float(np.linalg.norm(place[-1] - place[-1 - lag])) for lag in (1, 2, 4, 8) if lag <= step + 1}
            found = monitor.moved(step, LR, seen(), signal(), Moved(1.0, None, float(np.linalg.norm(place[-1])), distances))
            assert ("drift_exponent" in found) == (step + 1 >= WINDOW), f"{WINDOW} is a multiple of {LOOK_EVERY}"
        assert found["drift_exponent"] == pytest.approx(expected, abs=0.02)
        assert found["drift_exponent_lower"] <= found["drift_exponent"] <= found["drift_exponent_upper"]


def test_a_step_without_a_learning_rate_divides_by_nothing() -> None:
    monitor = Monitor(make_config(), Calibration(batch=exactly(1.0), horizon=exactly(1.0)))
    assert monitor.moved(0, 0.0, seen(), signal(), Moved(0.0, None, 0.0, {1: 0.0})) == {
        "update_norm": 0.0,
        "displacement": 0.0,
        "drift": 0.1,
    }
    assert monitor.g_2 is None


# --- what is told


def test_without_a_calibration_there_are_no_margins_and_no_forecast_and_hold_follows_the_schedule() -> None:
    monitor = Monitor(make_config(governor="hold"), None)
    for step in range(200):
        scheduled = LR * (1 - step / 400)
        found = go(monitor, step, lr=scheduled)
        assert found["lr"] == scheduled
        assert not {"margin_batch", "margin_horizon", "steps_left"} & found.keys()
    assert monitor.take_notes() == []
    assert monitor.ahead(LR, 3) == (None, None, None, None)


def test_with_a_calibration_there_are_margins_and_the_steps_left() -> None:
    calibration = Calibration(batch=exactly(12 * LR), horizon=exactly(500 * LR))
    monitor = Monitor(make_config(), calibration)
    for step in range(300):
        found = go(monitor, step)
        assert found["margin_batch"] == pytest.approx(12 / 3)
        assert found["margin_horizon"] == pytest.approx(500 / STEPS)
        # On a straight path of G_upd 1, R_crit is reached after 500 steps.
        assert found["steps_left"] == pytest.approx(500 - step - 1, abs=2)


def test_without_lag_only_the_horizon_has_a_margin() -> None:
    monitor = Monitor(make_config(), Calibration(batch=exactly(LR), horizon=exactly(LR)))
    found = go(monitor, 0, seen(lag=0))
    assert "margin_batch" not in found and "margin_horizon" in found


def test_calibrated_constants_are_taken_to_this_run_s_own_updates() -> None:
    calibration = Calibration(batch=exactly(12 * LR), horizon=exactly(500 * LR), g_upd=1.0)
    for factor in (0.5, 1.0, 3.0):
        monitor = Monitor(make_config(), calibration)
        found: dict[str, float] = {}
        for step in range(10):
            found = monitor.moved(step, LR, seen(), signal(), straight(step, factor * LR))
        assert found["margin_batch"] == pytest.approx(4 / factor)
        assert found["margin_horizon"] == pytest.approx(0.5 / factor)
        assert found["steps_left"] == pytest.approx(500 / factor - 10, abs=2)


def test_a_sign_is_told_once_while_it_lasts_and_again_when_it_returns_after_a_while() -> None:
    monitor = Monitor(make_config(), None)
    told = []
    for step in range(4 * WINDOW):
        holds = 10 <= step < 20 or step == 19 + WINDOW or 20 + 2 * WINDOW < step < 3 * WINDOW
        go(monitor, step, said=DEGENERATE if holds else signal())
        told += [(step, note.kind) for note in monitor.take_notes()]
    assert told == [(10, "warning"), (21 + 2 * WINDOW, "warning")], "what held within the last steps is not news"


def test_a_sign_is_looked_for_at_the_lag_of_the_step_and_not_at_that_of_the_last_use() -> None:
    for lag_now, expected in ((1.0, ["warning"]), (2.0, [])):
        monitor = Monitor(make_config(), None)
        go(monitor, 0, seen(lag=16, lag_now=lag_now), DEGENERATE)
        assert kinds(monitor.take_notes()) == expected


def test_a_sign_and_a_broken_constraint_are_told_one_by_one() -> None:
    monitor = Monitor(make_config(), Calibration(batch=exactly(LR)))
    notes: list[Note] = []
    for step in range(30):
        go(monitor, step, said=DEGENERATE if step >= 10 else signal())
        notes += monitor.take_notes()
    assert kinds(notes) == ["region", "warning"]
    assert notes[0].values["margin_batch"] == pytest.approx(1 / 3)
    assert "lag" in notes[0].text and "signal" in notes[1].text


def test_a_governor_that_is_off_tells_neither() -> None:
    monitor = Monitor(make_config(governor="off"), Calibration(batch=exactly(LR)))
    for step in range(30):
        go(monitor, step, said=DEGENERATE)
    assert monitor.take_notes() == []


def test_a_horizon_that_ends_before_the_run_does_is_told() -> None:
    monitor = Monitor(make_config(), Calibration(horizon=exactly(400 * LR)))
    notes: list[Note] = []
    for step in range(200):
        go(monitor, step)
        notes += monitor.take_notes()
    (note,) = notes
    assert note.kind == "region" and "steps left" in note.text
    monitor = Monitor(make_config(), Calibration(horizon=exactly(2 * STEPS * LR)))
    for step in range(200):
        go(monitor, step)
    assert monitor.take_notes() == []


@pytest.mark.parametrize("governor", ["off", "warn", "hold"])
def test_a_collapse_is_told_once_whatever_the_governor(governor: str) -> None:
    monitor = Monitor(make_config(governor=governor), None)
    notes: list[Note] = []
    for step in range(40):
        go(monitor, step, seen(reward=0.5 if step < 10 else 0.0))
        notes += monitor.take_notes()
    (collapse,) = [note for note in notes if note.kind == "collapse"]
    assert collapse.values == {"since": 10, "last_good": 9}
    assert kinds(notes) == ["collapse"]


def test_a_collapse_is_told_at_its_step_without_a_learning_rate_too() -> None:
    told = []
    for lr in (LR, 0.0):
        monitor = Monitor(make_config(), None)
        for step in range(40):
            go(monitor, step, seen(reward=0.5 if step < 10 else 0.0), lr=LR if step < 10 else lr)
            told += [(step, note.values["since"]) for note in monitor.take_notes() if note.kind == "collapse"]
    assert len(told) == 2 and told[0] == told[1]


def test_a_collapse_that_was_none_is_told_again_if_it_happens() -> None:
    monitor = Monitor(make_config(governor="off"), None)
    for step in range(60):
        go(monitor, step, seen(reward=0.0 if 10 <= step < 20 or step >= 40 else 0.5))
    assert [note.values["since"] for note in monitor.take_notes()] == [10, 40]


def test_a_reused_batch_counts_once() -> None:
    monitor = Monitor(make_config(), None)
    for step in range(40):
        go(monitor, step, seen(reward=0.0 if step // 8 == 2 else 0.5, is_first_use=step % 8 == 0))
    assert "collapse" not in kinds(monitor.take_notes())
    assert monitor.state.collapse.steps == [0, 8, 16, 24, 32][-LEVEL_BATCHES:]


# --- the learning rate


@pytest.mark.parametrize("governor", ["off", "warn"])
def test_a_governor_that_does_not_hold_follows_the_schedule(governor: str) -> None:
    monitor = Monitor(make_config(governor=governor), Calibration(batch=exactly(LR / 10), horizon=exactly(LR / 10)))
    assert [go(monitor, step)["lr"] for step in range(20)] == [LR] * 20


def test_hold_keeps_inside_at_the_lag_that_is_measured_and_notes_each_change() -> None:
    monitor = Monitor(make_config(governor="hold"), Calibration(batch=exactly(8 * MARGIN * LR)))
    rates, notes = [], []
    for step in range(200):
        rates.append(go(monitor, step, seen(lag=16 if 50 <= step < 60 else 4))["lr"])
        notes += [(step, note) for note in monitor.take_notes() if note.kind == "learning-rate"]
    assert rates[:50] == [LR] * 50
    assert rates[50:60] == [pytest.approx(LR / 2)] * 10
    assert rates[-1] == LR
    assert [step for step, _ in notes] == [50, 92, 124, 156, 188]
    assert notes[0][1].values == {"lr": pytest.approx(LR / 2), "scheduled": LR, "lag": 16.0}
    assert all(note.text for _, note in notes)


def test_a_horizon_without_a_known_end_does_not_hold_a_run() -> None:
    open_above = Measured(LR, LR, None)
    for batch in (None, exactly(8 * MARGIN * LR)):
        monitor = Monitor(make_config(governor="hold"), Calibration(batch=batch, horizon=open_above))
        assert [go(monitor, number)["lr"] for number in range(50)] == [LR] * 50
        assert "learning-rate" not in kinds(monitor.take_notes())


def test_held_or_not_a_learning_rate_is_never_above_the_schedule() -> None:
    rng = np.random.default_rng(0)
    for rule in ("region", "sqrt-ess"):
        monitor = Monitor(
            make_config(governor="hold", rule=rule), Calibration(batch=exactly(4 * LR), horizon=exactly(STEPS * LR), g_upd=1.0)
        )
        for step in range(300):
            batch, scheduled = seen(lag=int(rng.integers(0, 9))), LR * float(rng.uniform(0.1, 1))
            used = monitor.govern(step, scheduled, batch, signal(ess=float(rng.uniform(0, 1.001))))
            assert 0 < used <= scheduled
            monitor.moved(step, used, batch, signal(), straight(step, used * float(rng.lognormal())))


def test_sqrt_ess_needs_no_calibration() -> None:
    monitor = Monitor(make_config(governor="hold", rule="sqrt-ess"), None)
    assert go(monitor, 0, said=signal(ess=0.25))["lr"] == pytest.approx(LR / 2)
    assert Monitor(make_config(governor="warn", rule="sqrt-ess"), None).govern(0, LR, seen(), signal(ess=0.25)) == LR


def test_after_a_rollback_the_schedule_is_scaled_from_where_it_led_to() -> None:
    rollbacks = [Rollback(20, 30, 0.5), Rollback(10, 40, 0.25)]
    for governor in ("off", "warn", "hold"):
        monitor = Monitor(make_config(governor=governor), None, None, rollbacks)
        found = [go(monitor, step)["lr"] for step in range(60)]
        assert found == [LR] * 10 + [0.0] * 30 + [LR / 4] * 20


def test_rewards_of_a_policy_that_was_given_up_are_not_counted_and_the_level_to_fall_from_is_kept() -> None:
    monitor = Monitor(make_config(), None, None, [Rollback(0, 10, 0.5, level=0.5)])
    for step in range(14):
        go(monitor, step, seen(reward=0.0))
    assert monitor.state.collapse.steps == [10, 11, 12, 13][-LEVEL_BATCHES:]
    assert monitor.state.collapse.best == 0.5
    assert [note.values["since"] for note in monitor.take_notes() if note.kind == "collapse"] == [10]


# --- restarts


def live(monitor: Monitor, begin: int, end: int) -> list[Any]:
    """A run with a governor at work, warnings, and a collapse at its end."""
    found: list[Any] = []
    for step in range(begin, end):
        rng = np.random.default_rng(step)
        batch = seen(
            reward=0.0 if step >= 240 else float(rng.uniform(0.3, 0.6)), lag=12 if step % 100 == 30 else 2, is_first_use=step % 2 == 0
        )
        said = DEGENERATE if step in (40, 50, 200) else signal(ess=0.9)
        used = monitor.govern(step, LR, batch, said)
        norm = used * float(rng.lognormal(0, 0.1))
        distances = {lag: norm * lag**0.7 * float(rng.lognormal(0, 0.05)) for lag in (1, 2, 4, 8, 16, 32)}
        moved = Moved(norm, float(rng.uniform(0, 1)), 1e-3 * (step + 1) ** 0.7, distances)
        measures = monitor.moved(step, used, batch, said, moved)
        found.append((used, measures, monitor.take_notes()))
    return found


@pytest.mark.parametrize("stop", [0, 1, 31, 45, 128, 144, 200, 243, 250])
def test_a_resumed_monitor_decides_and_measures_as_one_that_never_stopped(stop: int) -> None:
    config, calibration = (
        make_config(governor="hold"),
        Calibration(batch=exactly(6 * MARGIN * LR), horizon=Measured(LR * 900, LR * 700, None), g_upd=1.0),
    )
    monitor = Monitor(config, calibration)
    whole = live(monitor, 0, 260)
    assert {kind for _, _, notes in whole for kind in kinds(notes)} == {"learning-rate", "warning", "collapse"}
    first = Monitor(config, calibration)
    live(first, 0, stop)
    state = msgspec.json.decode(msgspec.json.encode(first.state), type=State)
    assert state == first.state
    assert live(Monitor(config, calibration, state), stop, 260) == whole[stop:]
