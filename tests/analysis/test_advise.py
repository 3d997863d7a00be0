"""Advice from other runs: right where they tell, silent where they do not, and never from runs that are not like the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from analysis.advise import advice_json, advice_lines, advise, calibrate_cells, calibrate_from, check_strict, contrast, fingerprint, record
from analysis.cell_tables import write_cells
from learner.stability.files import calibration_of, read_calibration, with_calibration, write_calibration
from learner.stability.rule import MAX_LAG, UNKNOWN_EXPONENT, Calibration, Measured
from protocol import facts
from protocol.config import Config, load_config, overridden, parse_config
from protocol.errors import ConfigError
from protocol.sweep import load_sweep
from tests.analysis.recorded_steps import config_of, finished, journal, step
from tests.analysis.synthetic_sweep import make_sweep

PRODUCT, ESCAPE, HORIZON = 2.3e-6, 3.2e-5, 800
STRAIGHTNESS = HORIZON**-0.5
"""Of the stable runs of synthetic sweeps, whose displacement grows as the root of the step."""
KNOWN = Calibration(batch=Measured(4e-3, 2e-3, 8e-3), horizon=Measured(1.0, 0.5, 2.0))


def paper_config(max_lag: int, lr: float, steps: int) -> Config:
    return parse_config(
        {"run": {"steps": steps}, "policy": {"reuse": max_lag}, "learner": {"lr": lr}, "loss": {"surrogate": "clip"}, "task": {"digits": 1}}
    )


def text_of(config: Config, calibration: Calibration | None) -> str:
    return "\n".join(advice_lines(advise(config, calibration)))


def stable(folder: Path, config: Config, **changes: Any) -> Path:
    """The folder of a run of the configuration that did not collapse."""
    return finished(folder, config, [step(number, reuse=config.policy.reuse, **changes) for number in range(config.run.steps)])


# --- what advice is worth


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("max_lag", "steps"), [(4, 40), (16, 40), (64, 40), (16, 3200), (16, 12800)])
def test_the_largest_learning_rate_at_other_values_of_s_and_t_is_within_a_factor_two(
    tmp_path: Path, max_lag: int, steps: int, seed: int
) -> None:
    """Calibrated at S = 8 and 32. The truth is that of the rule: product/S or, of a long run, escape/T of the way that such runs go."""
    cells = make_sweep(product=PRODUCT, escape=ESCAPE, lags=(8, 32), horizon=HORIZON, rng_seed=seed, noise=0.1)
    write_cells(cells, tmp_path / "cells.zst")
    config = paper_config(max_lag, 1e-7, steps)
    found = advise(config, calibrate_from([tmp_path / "cells.zst"], config)).largest_lr
    truth = min(PRODUCT / max_lag, ESCAPE / (steps * STRAIGHTNESS))
    assert found is not None
    assert truth / 2 < found.value < 2 * truth
    assert found.lower <= truth <= found.ceiling


def test_the_exponent_of_s_is_the_one_that_is_given_or_the_one_that_is_found_or_the_paper_s() -> None:
    as_root = make_sweep(boundary_exponent=0.5, lags=(4, 64), learning_rates=[1e-8 * 1.3**place for place in range(25)], seeds=range(3))
    found = calibrate_cells(as_root, 0.2, {})
    assert found.lag_exponent.lower <= 0.5 <= found.lag_exponent.ceiling < 1
    given = Measured(0.7, 0.6, 0.8)
    assert calibrate_cells(as_root, 0.2, {}, given).lag_exponent == given
    assert calibrate_cells([cell for cell in as_root if cell.max_lag == 4], 0.2, {}).lag_exponent == UNKNOWN_EXPONENT, (
        "one S tells no exponent"
    )


def test_a_calibration_knows_how_straight_its_stable_runs_went() -> None:
    cells = make_sweep(lags=(8, 32), horizon=HORIZON)
    assert calibrate_cells(cells, 0.2, {}).straightness == pytest.approx(STRAIGHTNESS, rel=0.05)
    collapsed = [cell for cell in cells if cell.outcome == "collapsed"]
    assert calibrate_cells(collapsed, 0.2, {}).straightness == 1.0, "the worst case, where nothing is known"
    assert (calibrate_cells(cells, 0.2, {}).calibrated_steps, calibrate_cells(collapsed, 0.2, {}).calibrated_steps) == (HORIZON, None)


def test_s_is_the_lag_that_runs_reached_and_short_of_half_of_what_was_set_is_said() -> None:
    for cell in make_sweep(lags=(1, 8, 32), seeds=(0,)):
        assert record(cell).max_lag == cell.max_lag, "of cycles, one more than the lag at the last use"
    queue = make_sweep(lags=(16,), pipeline="queue", seeds=(0,))
    assert {record(cell).max_lag for cell in queue} == {16}
    idle = [
        msgspec.structs.replace(cell, rows=[msgspec.structs.replace(row, lag=min(row.lag, 2.25)) for row in cell.rows]) for cell in queue
    ]
    assert {record(cell).max_lag for cell in idle} == {3}
    found = calibrate_cells(idle, 0.2, {})
    assert (found.largest_lag_seen, calibrate_cells(queue, 0.2, {}).largest_lag_seen) == (3, 16)
    assert f"{len(idle)} runs whose lag stayed below half of their S" in found.notes and "3 of 16" in found.notes
    assert "stayed below" not in calibrate_cells(queue, 0.2, {}).notes
    ended = msgspec.structs.replace(idle[0], rows=idle[0].rows[:2])
    assert record(ended).max_lag == 16, "two steps are too few to see a lag of 16"


def test_no_s_is_named_that_is_far_beyond_those_of_the_calibrating_runs() -> None:
    config = overridden(config_of(), ["learner.lr=1.03e-9"])
    known = msgspec.structs.replace(KNOWN, valid_for=fingerprint(config))
    assert "largest S       3883495 [1941747, 7766990] at" in text_of(config, known)
    seen = msgspec.structs.replace(known, largest_lag_seen=5)
    assert "largest S       more than 20 [20, open] at" in text_of(config, seen)
    endless = msgspec.structs.replace(known, lag_exponent=Measured(1e-3, 1e-3, 1e-3))
    text = text_of(config, endless)
    assert f"more than {MAX_LAG}" in text and "open] at" in text


@pytest.mark.parametrize(
    ("lr", "plain", "carried"), [(1e-6, "inside", "unknown"), (1e-3, "cannot tell", "cannot tell"), (0.1, "outside", "cannot tell")]
)
def test_constants_of_other_runs_call_nothing_inside_and_nothing_outside(lr: float, plain: str, carried: str) -> None:
    config = overridden(config_of(), [f"learner.lr={lr}"])
    known = msgspec.structs.replace(KNOWN, valid_for=fingerprint(config))
    own, other = advise(config, known), advise(overridden(config, ["loss.clip_high=0.3"]), known)
    assert (own.verdict, own.where.verdict, other.verdict, other.where.verdict) == (plain, plain, carried, plain)
    headline = advice_lines(other)[0]
    assert ("OUTSIDE" in headline, "inside the safe region" in headline) == (False, False)
    assert (f"by their constants it would be {plain}" in headline) == (plain != carried)
    check_strict(other)
    assert json.loads(advice_json(other))["verdict"] == carried


def test_the_surrogate_of_a_table_is_compared(tmp_path: Path) -> None:
    write_cells(make_sweep(lags=(8, 32)), tmp_path / "cells.zst")
    config = paper_config(8, 1e-9, 100)
    found = calibrate_from([tmp_path / "cells.zst"], config)
    assert "surrogate" not in advise(config, found).strange
    other = overridden(config, ["loss.surrogate=min-clip"])
    assert advise(other, found).strange["surrogate"] == ("clip", "min-clip")
    assert "NOT LIKE THEM   surrogate: min-clip here, clip there" in text_of(other, found)


def test_without_lag_what_would_tell_tells_of_the_horizon() -> None:
    text = text_of(parse_config({"policy": {"max_lag": 0}}), None)
    assert "R_crit is not calibrated (S = 0" in text and "importance ratios" not in text
    assert "lags = [1]  # each batch used once, by the weights that sampled it: S = 0" in text


def test_far_inside_and_far_outside_are_told_apart(tmp_path: Path) -> None:
    write_cells(make_sweep(lags=(8, 32), product=PRODUCT, escape=ESCAPE), tmp_path / "cells.zst")
    for lr, verdict in ((1e-9, "inside"), (1e-4, "outside")):
        config = paper_config(16, lr, 40)
        assert advise(config, calibrate_from([tmp_path / "cells.zst"], config)).where.verdict == verdict


def test_without_a_calibration_nothing_is_claimed_and_the_runs_that_would_tell_are_a_sweep(tmp_path: Path) -> None:
    config = overridden(config_of(), ["policy.reuse=4", "loss.surrogate=clip"])
    advice = advise(config, None)
    assert (advice.where.verdict, advice.largest_lr, advice.largest_lag, advice.strange) == ("unknown", None, None, {})
    text = "\n".join(advice_lines(advice))
    assert "not known" in text and "inside" not in text and "NOT LIKE" not in text
    lines = [line.strip() for line in text.splitlines()]
    grid = lines[lines.index("[[grids]]") : lines.index("seeds = [1, 2]") + 1]
    (tmp_path / "base.toml").touch()
    (tmp_path / "sweep.toml").write_text("\n".join(['name = "tell"', 'config = "base.toml"', *grid]))
    plans = load_sweep(tmp_path / "sweep.toml")[1]
    assert {fingerprint(plan.config)["pipeline"] for plan in plans} == {fingerprint(config)["pipeline"]}
    assert {plan.config.staleness for plan in plans} == {config.staleness}
    rates = {plan.config.learner.lr for plan in plans}
    assert min(rates) < config.learner.lr < max(rates)


@pytest.mark.parametrize("policy", [{"max_lag": 0}, {"max_lag": 3}, {"reuse": 3}])
def test_the_sweep_that_would_tell_is_a_valid_one_for_every_pipeline(policy: dict[str, int], tmp_path: Path) -> None:
    config = parse_config({"policy": policy})
    lines = [line.strip() for line in advice_lines(advise(config, None))]
    grid = lines[lines.index("[[grids]]") : lines.index("seeds = [1, 2]") + 1]
    (tmp_path / "base.toml").touch()
    (tmp_path / "sweep.toml").write_text("\n".join(['name = "tell"', 'config = "base.toml"', *grid]))
    for plan in load_sweep(tmp_path / "sweep.toml")[1]:
        assert (plan.config.policy.lag_bound, plan.config.policy.reuse) == (config.policy.lag_bound, config.policy.reuse)
        assert fingerprint(plan.config) == fingerprint(config)


# --- which runs count


def test_of_a_sweep_the_runs_like_the_configuration_count_and_the_others_are_counted_by_reason(tmp_path: Path) -> None:
    config = config_of()
    for number, changes in enumerate(
        (
            [],
            ["learner.lr=9.0", "run.seed=77", "policy.reuse=3"],
            ["policy.reuse=1", "policy.max_lag=4"],
            ["loss.surrogate=clip"],
            ["loss.surrogate=clip"],
            ["stability.governor=hold"],
        )
    ):
        stable(tmp_path / f"run-{number}", overridden(config, changes))
    finished(tmp_path / "short", config, [step(0)])
    found = calibrate_from([tmp_path], config)
    assert found.runs == ("run-0", "run-1")
    assert found.valid_for == fingerprint(config)
    assert (
        "5 of 7 runs left out: 2 of another loss, 1 of another pipeline, 1 whose learning rate was changed on the way (hold)" in found.notes
    )
    assert "1 neither collapsed nor at their end" in found.notes
    assert "left out" in text_of(config, found)


def test_a_run_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    run = stable(tmp_path / "s" / "run-0", config_of())
    stable(tmp_path / "s" / "run-1", config_of())
    assert calibrate_from([run, tmp_path / "s", run, tmp_path / "s" / ".." / "s"], config_of()).runs == ("run-0", "run-1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("loss.surrogate=clip", "1 of another loss; loss of run: surrogate min-clip, of this configuration: surrogate clip"),
        ("task.digits=9", "1 of another task; task of run: digits None, of this configuration: digits 9"),
        ("policy.path=/p", "1 of another policy; policy of run: {"),
        ("policy.max_lag=9", "of this configuration: each batch 2 times, weights every 2 steps, queued"),
        ("learner.beta2=0.5", "1 of another optimizer"),
        ("learner.schedule=linear", "1 of another optimizer"),
        ("rollout.temperature=0.5", "1 of another rollout"),
        ("supervised.layers=9", "1 of another policy; policy of run: layers 3, of this configuration: layers 9"),
    ],
)
def test_runs_that_differ_in_more_than_s_and_learning_rate_are_refused(tmp_path: Path, change: str, said: str) -> None:
    run = stable(tmp_path / "run", config_of())
    with pytest.raises(ConfigError) as caught:
        calibrate_from([run], overridden(config_of(), [change]))
    assert (caught.value.field, caught.value.value) == ("--from", str(run))
    assert said in str(caught.value) and "S, learning rate, seed and steps only" in caught.value.fix


def test_runs_that_tell_nothing_are_refused_with_the_reason(tmp_path: Path) -> None:
    unfinished = journal(tmp_path / "unfinished", config_of(), [step(0), step(1)])
    held = stable(tmp_path / "held", overridden(config_of(), ["stability.governor=hold"]))
    with pytest.raises(ConfigError, match="1 neither collapsed nor at their end; unfinished has taken 2 of 6 steps"):
        calibrate_from([unfinished], config_of())
    with pytest.raises(ConfigError, match="1 whose learning rate was changed on the way"):
        calibrate_from([held], config_of())
    with pytest.raises(ConfigError, match="there is no"):
        calibrate_from([tmp_path / "nowhere"], config_of())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no finished run"):
        calibrate_from([tmp_path / "empty"], config_of())


def test_a_run_that_collapsed_before_its_end_counts(tmp_path: Path) -> None:
    config = overridden(config_of(), ["run.steps=1000"])
    early = [step(number, reward=0.5 if number < 4 else 0.0) for number in range(14)]
    collapsed = finished(tmp_path / "run", config, [*early, facts.LearnerNoted(14, "collapse", "it collapsed")])
    assert calibrate_from([collapsed], config).runs == ("run",)


def test_of_a_table_what_it_does_not_say_is_said_to_be_unknown(tmp_path: Path) -> None:
    cells = make_sweep(lags=(8, 32)) + make_sweep(lags=(8,), pipeline="queue") + make_sweep(lags=(8,), surrogate="min-clip")
    write_cells(cells, tmp_path / "cells.jsonl.zst")
    config = paper_config(8, 1e-7, 100)
    found = calibrate_from([tmp_path], config)
    assert len(found.runs) == len(make_sweep(lags=(8, 32)))
    assert "28 of 56 runs left out: 28 of another pipeline or surrogate" in found.notes
    assert found.valid_for == {"pipeline": "cycles", "surrogate": "clip"}
    text = text_of(config, found)
    assert "NOT KNOWN       whether they had this loss, optimizer, policy, rollout, task" in text
    assert "NOT LIKE" not in text and " None " not in text
    with pytest.raises(ConfigError, match="is cycles clip, this queue min-clip"):
        calibrate_from([tmp_path], parse_config({"policy": {"max_lag": 4}}))


# --- whether a calibration is for this configuration


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("task.digits=2", "NOT LIKE THEM   task: digits 2 here, digits None there"),
        ("policy.path=/p", "NOT LIKE THEM   policy: /p here"),
        ("rollout.group_size=4", "NOT LIKE THEM   rollout: 16 groups of 4, 64 tokens at 1.0 here, 16 groups of 8"),
        ("loss.clip_high=0.3", "NOT LIKE THEM   loss: clip_high 0.3 here, clip_high 0.2 there"),
        ("policy.reuse=1", "NOT LIKE THEM   pipeline: cycles here, queue there"),
    ],
)
def test_a_calibration_of_other_runs_is_called_out_by_name(tmp_path: Path, change: str, line: str) -> None:
    is_pipeline = change.startswith("policy.reuse")
    there = overridden(config_of(), ["policy.reuse=1", "policy.max_lag=3"]) if is_pipeline else config_of()
    here = config_of() if is_pipeline else overridden(config_of(), [change])
    calibration = calibrate_from([stable(tmp_path / "run", there)], there)
    assert "NOT" not in text_of(there, calibration)
    assert line in text_of(here, calibration)
    assert list(advise(here, calibration).strange) == [line.split()[3].rstrip(":")]


def test_s_learning_rate_seed_steps_and_the_order_of_options_are_no_difference() -> None:
    one = parse_config({"task": {"name": "arithmetic", "digits": 1, "heldout": 9}, "policy": {"reuse": 2}})
    other = parse_config({"task": {"heldout": 9, "digits": 1, "name": "arithmetic"}, "policy": {"reuse": 8}})
    other = overridden(other, ["run.seed=5", "run.steps=9", "learner.lr=1.0", "learner.threads=3", "run.name=x", "actor.num_actors=7"])
    assert fingerprint(one) == fingerprint(other)


def test_a_contrast_shows_what_differs_and_no_more() -> None:
    assert contrast('{"a": 1, "b": 2}', '{"a": 1, "b": 3, "c": 4}') == ("b 2, c None", "b 3, c 4")
    assert contrast("/a", '{"a": 1}') == ("/a", '{"a": 1}')
    assert contrast("1", "2") == ("1", "2")


# --- strict


def test_strict_refuses_what_is_outside_and_nothing_else() -> None:
    for lr, is_refused in ((1e-6, False), (1e-3, False), (1e-1, True)):
        advice = advise(overridden(config_of(), [f"learner.lr={lr}"]), msgspec.structs.replace(KNOWN, valid_for=fingerprint(config_of())))
        if not is_refused:
            check_strict(advice)
            continue
        with pytest.raises(ConfigError) as caught:
            check_strict(advice)
        assert (caught.value.field, caught.value.value) == ("learner.lr", 0.1)
        assert "its edge at S = 2 is 0.002 [0.001, 0.004]" in caught.value.fix and "policy.reuse" in caught.value.fix
    check_strict(advise(config_of(), None))


def test_strict_names_the_steps_where_the_horizon_is_what_breaks_and_no_edge_that_is_unknown() -> None:
    with pytest.raises(ConfigError) as caught:
        known = Calibration(horizon=KNOWN.horizon, valid_for=fingerprint(config_of()))
        check_strict(advise(overridden(config_of(), ["run.steps=1000000"]), known))
    assert caught.value.fix == "lower learner.lr or run.steps, or leave out --strict"


@pytest.mark.system
def test_up_strict_refuses_before_anything_is_made(cli: Any, write_config: Callable[..., Path], settings: Any, tmp_path: Path) -> None:
    stability = {"calibration": str(tmp_path / "known.json")}
    config = write_config(
        settings(run={"directory": str(tmp_path / "runs")}, stability=stability, policy={"max_lag": 2}, learner={"lr": 0.5})
    )
    like = fingerprint(load_config(config))
    write_calibration(msgspec.structs.replace(KNOWN, valid_for=like), tmp_path / "known.json")
    done = cli("up", str(config), "--strict")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "OUTSIDE the safe region" in done.stdout
    assert "learner.lr = 0.5: is outside the safe region" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()
    done = cli("up", "--resume", str(tmp_path), "--strict")
    assert done.returncode == 2 and "nothing but --set" in done.stderr


# --- the command, and the file


@pytest.mark.system
def test_the_command_writes_a_calibration_that_a_configuration_can_name(
    cli: Any, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"run": {"steps": 6}, "policy": {"reuse": 2}, "learner": {"lr": 2e-3}}
    path, run, kept = write_config(config), stable(tmp_path / "run", config_of()), tmp_path / "kept.json"
    nothing = cli("advise", str(path), "--write", str(kept))
    assert nothing.returncode == 2 and "there is nothing to write yet" in nothing.stderr and not kept.exists()
    written = cli("advise", str(path), "--from", str(run), "--write", str(kept))
    assert written.returncode == 0, written.stderr
    assert read_calibration(str(kept)).runs == ("run",)
    again = cli("advise", str(path), "--set", f"stability.calibration={kept}")
    assert again.stdout == written.stdout
    found = json.loads(cli("advise", str(path), "--set", f"stability.calibration={kept}", "--json").stdout)
    assert found["where"]["verdict"] == advise(parse_config(config), read_calibration(str(kept))).where.verdict
    refused = cli("advise", str(path), "--set", "task.digits=9", "--from", str(run))
    assert refused.returncode == 2 and "of another task" in refused.stderr and "Traceback" not in refused.stderr


def test_json_has_every_number_by_its_name() -> None:
    found = json.loads(advice_json(advise(config_of(), KNOWN)))
    assert msgspec.convert(found["calibration"], Calibration) == KNOWN
    assert found["where"]["batch"]["ratio"]["value"] == pytest.approx(1.0)
    assert found["where"]["horizon"]["verdict"] == "inside"
    assert found["largest_lr"] == {"value": 0.002, "lower": 0.001, "upper": 0.004}
    assert found["largest_lag"]["horizon"] == "inside"
    assert json.loads(advice_json(advise(config_of(), None)))["where"]["verdict"] == "unknown"


def test_a_calibration_survives_its_file_and_goes_into_the_run_s_configuration(tmp_path: Path) -> None:
    known = calibrate_from([stable(tmp_path / "run", config_of())], config_of())
    write_calibration(known, tmp_path / "known.json")
    assert read_calibration(str(tmp_path / "known.json")) == known
    config = overridden(config_of(), [f"stability.calibration={tmp_path / 'known.json'}"])
    embedded = with_calibration(config)
    (tmp_path / "known.json").unlink()
    assert calibration_of(embedded) == known
    assert with_calibration(embedded) == embedded
    assert with_calibration(config_of()) == config_of() and calibration_of(config_of()) is None
    with pytest.raises(ConfigError, match="cannot be read"):
        calibration_of(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a calibration"),
        ("[]", "is not a calibration"),
        ('{"batch": 3}', "is not a calibration"),
        ('{"batchh": null}', "batchh"),
        ('{"batch": {"value": 1.0, "lower": 2.0, "upper": 3.0}}', "no positive measured quantity"),
        ('{"batch": {"value": 0.0, "lower": 0.0, "upper": 3.0}}', "no positive measured quantity"),
        ('{"reference_lag": 0}', "reference_lag is 0"),
        ('{"g_upd": -1}', "g_upd is -1"),
        ('{"batch_scatter": -0.5}', "batch_scatter is -0.5"),
        ('{"horizon_scatter": 1e300}', "horizon_scatter is 1e+300"),
        ('{"valid_for": {"task": 3}}', "is not a calibration"),
        ('{"valid_for": ' * 100_000, "is not a calibration"),
    ],
)
def test_a_bad_calibration_is_refused_with_field_and_fix(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    for given in (str(path), *([text] if text.startswith("{") else [])):
        with pytest.raises(ConfigError) as caught:
            read_calibration(given)
        assert caught.value.field == "stability.calibration"
        assert said in str(caught.value) and "--write" in caught.value.fix
        assert len(str(caught.value)) < 1200


def test_a_calibration_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "bytes", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(ConfigError) as caught:
            read_calibration(str(path))
        assert caught.value.field == "stability.calibration"
    with pytest.raises(ConfigError) as caught:
        write_calibration(KNOWN, tmp_path / "no" / "folder")
    assert caught.value.field == "--write"


def test_wide_intervals_of_a_calibration_are_open_rather_than_an_overflow() -> None:
    wide = Calibration(batch=Measured(1.0, 1e-300, 1e300), horizon=Measured(1.0, 1e-300, 1e300), batch_scatter=100.0, horizon_scatter=100.0)
    assert advise(config_of(), wide).where.verdict == "cannot tell"
