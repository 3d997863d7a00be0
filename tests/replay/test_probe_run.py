"""`probe RUN`: the staleness bias of a recorded run, measured from its directory alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli as command_line
from broker.blobs import BlobStore
from broker.history import History, read_history
from broker.recorded_weights import RecordedWeights
from deploy.probe import Choice, ProbeOptions, ProbeReport, choose_versions, draw_round, drift, probe_run, report_lines
from deploy.rundir import RunDirectory
from protocol.differences import distance
from protocol.errors import ConfigError, WeightsError
from tests.replay.recording import listing

SMALL = ProbeOptions(num_prompts=6, num_rounds=3)


def quietly(text: str) -> None:
    """Nobody listens."""


def probe(run: Path, options: ProbeOptions = SMALL) -> ProbeReport:
    return probe_run(run, options, quietly)


def distance_between(run: Path, first: int, second: int) -> float:
    weights = RecordedWeights(
        read_history(run / "journal.sqlite").publications, BlobStore(run / "blobs"), RunDirectory(run).manifest().policy_files
    )
    ours = {name: tensor._replace(bits=tensor.bits.copy()) for name, tensor in weights.at(first).items()}
    return distance(ours, weights.at(second))


def test_an_archived_run_is_measured_from_its_directory_alone_and_only_read(archived: Path) -> None:
    before = listing(archived)
    done = CliRunner().invoke(command_line.app, ["probe", str(archived), "--prompts", "6", "--rounds", "3", "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    history = read_history(archived / "journal.sqlite")
    assert (found["run"], found["step"]) == (history.run, history.num_steps)
    assert [each["way"]["lag"] for each in found["lags"]] == [lag for lag in (1, 2, 4, 8, 16) if lag <= history.num_steps]
    for each in found["lags"]:
        way, bias = each["way"], each["bias"]
        assert way["distance"] == pytest.approx(distance_between(archived, found["version"], way["version"]))
        assert way["distance"] <= way["path"] * (1 + 1e-6)  # the triangle's inequality over the versions between
        assert bias["squared"]["low"] <= bias["squared"]["value"] <= bias["squared"]["high"]
        assert bias["size"]["value"] == pytest.approx(math.sqrt(max(0.0, bias["squared"]["value"])))
        assert bias["noise_floor"] > 0
    steps = [distance_between(archived, found["version"] - place, found["version"] - place - 1) for place in range(4)]
    assert [each["way"]["path"] for each in found["lags"][:3]] == pytest.approx([sum(steps[:lag]) for lag in (1, 2, 4)])
    assert found["by_distance"]["growth"] in {"linear", "sublinear", "superlinear", "cannot tell (noise)"}
    assert listing(archived) == before


def test_versions_of_the_same_weights_show_no_bias_at_all(make_recording: Callable[..., Path]) -> None:
    """The updates are lost in the rounding to bf16; the same random numbers make the same groups, and nothing is left of the difference."""
    report = probe(make_recording(learner={"lr": 1e-12}))
    for found in report.lags:
        assert found.way.distance < 1e-9  # elements that were zero
        assert (found.bias.squared.value, found.bias.noise_floor, found.is_clear) == (0.0, 0.0, False)
    assert report.fresh.value > 0
    assert (report.by_distance.growth, report.by_lag.growth) == ("cannot tell (noise)", "cannot tell (noise)")


def test_versions_far_apart_show_a_clear_bias(make_recording: Callable[..., Path]) -> None:
    run = make_recording(run={"steps": 6}, learner={"lr": 3e-2})
    report = probe(run, ProbeOptions(num_prompts=16, num_rounds=8, lags=[5]))
    (found,) = report.lags
    assert found.is_clear
    assert found.bias.size.value > 2 * found.bias.noise_floor


def test_the_table_says_what_the_json_says(plain_recording: Path) -> None:
    report = probe(plain_recording, SMALL._replace(step=9, lags=[1, 3, 7]))
    lines = report_lines(report)
    assert f"(step {report.step})" in lines[0]
    assert [line.split()[0] for line in lines[4:7]] == ["1", "3", "7"]
    assert f"C_stale {report.by_distance.slope.value:.3g}" in lines[-2] and report.by_distance.growth in lines[-2]
    assert report.by_lag.growth in lines[-1]


def test_the_same_seed_measures_the_same_and_another_one_something_else(plain_recording: Path) -> None:
    options = SMALL._replace(step=6, lags=[2])
    first, again, other = (probe(plain_recording, options._replace(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.lags[0].bias.squared.value != other.lags[0].bias.squared.value


def test_the_drift_is_the_sum_of_learning_rates_and_update_norms_where_the_metrics_have_them(plain_recording: Path) -> None:
    history = read_history(plain_recording / "journal.sqlite")
    for step, done in history.steps.items():
        done.metrics.pop("g_upd", None)
        done.metrics["lr"] = 0.5
        if step != 2:
            done.metrics["g_upd"] = float(step)
    assert drift(history, 10, 3) == 0.5 * (7 + 8 + 9)
    assert drift(history, 4, 2) is None  # one step does not have it


def test_rounds_have_nothing_in_common_and_prompts_are_drawn_with_replacement() -> None:
    draws = [draw_round(0, place, 5, 40) for place in range(3)]
    assert set(draws[0].problems) == set(range(5))
    assert draws[0] == draw_round(0, 0, 5, 40)
    assert len({seed for draw in draws for seed in draw.seeds}) == 120
    assert draws[0].problems != draws[1].problems


# --- versions that there are not


def steps_of(found: Choice) -> tuple[int, list[int]]:
    return found.theta.step, [phi.step for phi in found.phis.values()]


@pytest.fixture
def history(plain_recording: Path) -> History:
    return read_history(plain_recording / "journal.sqlite")


def test_the_newest_step_whose_versions_can_all_be_built_again_is_taken(history: History) -> None:
    gone = {history.version_at(step) for step in (6, 10)}
    has_files = lambda number: number not in gone  # noqa: E731
    assert steps_of(choose_versions(history, has_files, ProbeOptions())) == (9, [8, 7, 5, 1])
    assert steps_of(choose_versions(history, has_files, ProbeOptions(lags=[3]))) == (8, [5])
    assert steps_of(choose_versions(history, has_files, ProbeOptions(step=8))) == (8, [7, 4, 0])  # without the lag whose files are gone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "11"], "steps 0 to 10"),
        (["--step", "3", "--lags", "1,4"], "steps 0 to 10"),
        (["--lags", "1,11"], "steps 0 to 10"),
        (["--lags", "1,0"], "--lags 1,2,4"),
        (["--lags", "one"], "--lags 1,2,4"),
        (["--rounds", "2"], "at least 3"),
        (["--prompts", "0"], "at least 1"),
    ],
)
def test_what_the_run_does_not_have_is_exit_code_2_and_what_it_has_is_named(
    plain_recording: Path, arguments: list[str], words: str
) -> None:
    done = CliRunner().invoke(command_line.app, ["probe", str(plain_recording), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception) and arguments[0 if len(arguments) == 2 else 2] in str(done.exception)


def test_versions_whose_files_are_gone_are_not_among_those_named(recording: Path) -> None:
    blob = read_history(recording / "journal.sqlite").publications.by_number[4].fact.delta
    assert blob is not None
    (recording / "blobs" / blob.digest).unlink()
    with pytest.raises(ConfigError, match=r"steps 0 to 3(?!\d)"):
        probe(recording, SMALL._replace(step=9, lags=[1]))
    assert probe(recording).step == 3


def test_a_file_that_is_not_what_it_was_is_an_error_of_weights(recording: Path) -> None:
    blob = read_history(recording / "journal.sqlite").publications.by_number[9].fact.delta
    assert blob is not None
    path = recording / "blobs" / blob.digest
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        probe(recording)
