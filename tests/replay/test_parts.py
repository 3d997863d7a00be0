"""Parts of a run, other settings, what is refused, and what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.history import read_history
from deploy.replay_report import side_by_side, summary_lines
from protocol.errors import ConfigError, JournalError
from tests.replay.recording import Session, plant

Replaying = Callable[..., Any]


def test_a_part_is_replayed_from_the_newest_checkpoint_at_or_before_it(plain_recording: Path, replay: Replaying) -> None:
    found, said = replay(plain_recording, first=7, end=8)
    assert said == [f"replaying steps 6 to 7 of run {found.history.run}, from {(plain_recording / 'checkpoints/step-00000006').resolve()}"]
    assert [row.step for row in found.rows] == [6, 7]
    assert (found.results[0].num_compared, found.results[0].num_equal) == (2, 2)


def test_a_part_before_every_checkpoint_begins_at_the_policy(plain_recording: Path, replay: Replaying) -> None:
    found, _ = replay(plain_recording, first=1, end=2)
    assert (found.first, found.results[0].num_equal) == (0, 3)


def test_a_damaged_checkpoint_is_not_begun_at(recording: Path, replay: Replaying) -> None:
    weights = recording / "checkpoints/step-00000009/policy/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found, _ = replay(recording, first=9)
    assert found.first == 6
    assert found.results[0].is_exact


def test_a_checkpoint_of_steps_that_were_done_again_otherwise_is_not_begun_at(
    make_recording: Callable[..., Path], replay: Replaying
) -> None:
    """The second learner has none of the first one's checkpoints, and its batches have another reward in them."""
    recording = make_recording(Session(dies_after=5), run={"steps": 6}, learner={"checkpoint_every": 2})
    aside = recording.parent / "aside"
    (recording / "checkpoints").rename(aside)
    plant(recording, 1)
    record_on(recording)
    history = read_history(recording / "journal.sqlite")
    assert history.publications.by_number[history.version_at(4) or 0].version.lineage == 1
    shutil.rmtree(recording / "checkpoints")
    aside.rename(recording / "checkpoints")
    assert (recording / "checkpoints/step-00000004").exists()
    found, _ = replay(recording, first=5)
    assert found.first == 0
    assert found.results[0].is_exact


def record_on(recording: Path) -> None:
    from deploy.rundir import RunDirectory
    from tests.replay.recording import live

    live(RunDirectory(recording), Session(), lambda count, call: [])


def test_the_checkpoint_may_lie_between_two_versions(make_recording: Callable[..., Path], replay: Replaying) -> None:
    policy = {"max_lag": 5, "sync_every": 3}
    recording = make_recording(run={"steps": 8}, policy=policy, learner={"checkpoint_every": 2})
    found, _ = replay(recording, first=4)
    assert (found.first, found.results[0].num_compared, found.results[0].num_equal) == (4, 1, 1)
    plant(recording, 5)
    with pytest.raises(Exception, match=r"taken at step 6.* elements in"):
        replay(recording, first=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first": 10}, "--from"),
        ({"first": 3, "end": 3}, "--to"),
        ({"end": 11}, "--to"),
        ({"overrides": ["policy.max_lag=1"]}, "policy.max_lag=1"),
        ({"overrides": ["run.steps=3"]}, "run.steps=3"),
        ({"overrides": ["learner.ranks=2"]}, "--ranks"),
        ({"overrides": ["learner.lrr=2"]}, "lrr"),
        ({"overrides": ["learner.lr=fast"]}, "learner.lr"),
        ({"overrides": ["learner"]}, "learner"),
    ],
)
def test_what_cannot_be_replayed_is_named_before_anything_is_made(
    options: dict[str, Any], words: str, plain_recording: Path, replay: Replaying, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        replay(plain_recording, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_part_that_ends_in_the_middle_of_a_batch_is_refused_with_the_steps_that_do_not(
    make_recording: Callable[..., Path], replay: Replaying
) -> None:
    recording = make_recording(run={"steps": 4}, policy={"max_lag": 3, "reuse": 2})
    with pytest.raises(ConfigError, match="2 or 4"):
        replay(recording, end=3)
    found, _ = replay(recording, end=2)
    assert [row.step for row in found.rows] == [0, 1]


def test_a_folder_that_is_no_run_and_one_that_is_not_empty_are_named(plain_recording: Path, replay: Replaying, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json"):
        replay(tmp_path)
    with pytest.raises(ConfigError, match="--out"):
        replay(plain_recording, out=plain_recording)


def test_a_run_without_a_journal_is_named(recording: Path, replay: Replaying) -> None:
    (recording / "journal.sqlite").unlink()
    with pytest.raises(JournalError, match="no journal"):
        replay(recording)


def test_what_if_with_the_recorded_settings_gives_the_recorded_metrics_and_evaluates(
    plain_recording: Path, replay: Replaying, tmp_path: Path
) -> None:
    found, said = replay(plain_recording, overrides=["learner.lr=1e-3"], out=tmp_path / "out")
    assert "off-policy" in said[1]
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))
    assert all(row["off_policy"] for row in rows)
    for row in rows:
        assert {k: v for k, v in row["replayed"].items() if "seconds" not in k} == {
            k: v for k, v in row["recorded"].items() if "seconds" not in k
        }
    assert found.results[0].num_compared == 0
    assert found.results[0].evaluations == found.history.evaluations
    assert sorted(found.results[0].evaluations) == [0, 5, 10]
    assert (tmp_path / "out/steps-00000000/checkpoints/step-00000010/policy/model.safetensors").exists()
    assert any("held-out, step 10" in line for line in side_by_side(found, 0))


def test_what_if_with_other_settings_trains_otherwise_and_compares_nothing(plain_recording: Path, replay: Replaying) -> None:
    found, _ = replay(plain_recording, overrides=["learner.lr=1e-1", "loss.clip_high=0.3"], end=5)
    assert found.rows[4].metrics["lr"] == 0.1
    assert found.rows[4].metrics["ratio"] != found.history.steps[4].metrics["ratio"]
    assert (found.results[0].num_compared, found.results[0].difference) == (0, None)
    assert len(summary_lines(found)) == 1


def test_the_summary_names_the_runs_busy_time_only_for_a_whole_run_of_one_learner(
    plain_recording: Path, replay: Replaying, make_recording: Callable[..., Path]
) -> None:
    assert "times as long" in summary_lines(replay(plain_recording)[0])[0]
    assert "busy" not in summary_lines(replay(plain_recording, end=5)[0])[0]
    recording = make_recording(Session(dies_after=3), Session(), run={"steps": 5})
    assert "busy" not in summary_lines(replay(recording)[0])[0]
