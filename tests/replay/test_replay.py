"""Promise 6, replayable: from the run's directory alone every published root comes out the same, or it is said where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.history import read_history
from protocol.errors import ReplayDiffers
from tests.replay.recording import Session, listing, plant

Replaying = Callable[..., Any]


def test_replayable_every_published_root_of_a_recorded_run_comes_out_the_same(recording: Path, replay: Replaying) -> None:
    before = listing(recording)
    found, said = replay(recording)
    (result,) = found.results
    assert (result.num_compared, result.num_equal, result.num_unrecorded, result.end) == (11, 11, 0, 10)
    assert result.environment == {}
    assert [row.step for row in found.rows] == list(range(10))
    assert said == [f"replaying steps 0 to 9 of run {found.history.run}, from its policy"]
    assert listing(recording) == before


def test_a_replay_has_the_recorded_metrics_and_lags(plain_recording: Path, replay: Replaying) -> None:
    found, _ = replay(plain_recording)
    assert max(lag for row in found.rows for lag in row.lags) > 0
    for row in found.rows:
        recorded = found.history.steps[row.step].metrics
        assert row.metrics.keys() == recorded.keys()
        assert all(row.metrics[name] == value for name, value in recorded.items() if not name.startswith("seconds_"))


@pytest.mark.parametrize("settings_of_run", [{}, {"learner": {"compact_deltas": True}}], ids=["plain", "compact"])
def test_a_planted_difference_is_found_at_the_version_after_its_step_with_tensors_and_elements(
    settings_of_run: dict[str, Any], make_recording: Callable[..., Path], replay: Replaying, tmp_path: Path
) -> None:
    recording = make_recording(run={"steps": 6}, **settings_of_run)
    plant(recording, 3)
    with pytest.raises(ReplayDiffers) as error:
        replay(recording, out=tmp_path / "out")
    assert error.value.exit_code == 6
    text = str(error.value)
    assert "taken at step 4" in text and "of 64 elements" not in text.splitlines()[0]
    assert "elements in" in text and "ulps" in text and "model." in text
    history = read_history(recording / "journal.sqlite")
    assert history.publications.by_number[4].version.root[:16] in text
    # It stops there: the learner may have had the next batch in hand already, and not the one after.
    assert 4 <= len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) <= 5


def test_where_the_recorded_deltas_are_gone_a_difference_still_has_step_and_roots(recording: Path, replay: Replaying) -> None:
    plant(recording, 3)
    history = read_history(recording / "journal.sqlite")
    for publication in history.publications.by_number.values():
        if publication.fact.delta is not None:
            (recording / "blobs" / publication.fact.delta.digest).unlink()
    with pytest.raises(ReplayDiffers, match="taken at step 4") as error:
        replay(recording)
    assert history.publications.by_number[4].version.root[:16] in str(error.value)
    assert "cannot be told" in str(error.value) and "missing" in str(error.value)


def test_a_run_in_parts_is_replayed_with_the_ranks_of_each_and_steps_that_were_done_again_count_once(
    make_recording: Callable[..., Path], replay: Replaying
) -> None:
    recording = make_recording(
        Session(2, dies_after=4),
        Session(1, dies_after=6),
        Session(2),
        run={"steps": 9},
        policy={"max_lag": 2},
        learner={"checkpoint_every": 2},
    )
    found, _ = replay(recording)
    assert [(segment.first, segment.end, segment.world_size) for segment in found.history.segments] == [(0, 4, 2), (4, 6, 1), (6, 9, 2)]
    assert all(result.is_exact and result.environment == {} for result in found.results)
    assert [result.num_unrecorded for result in found.results] == [0, 0, 0]
    assert [row.step for row in found.rows] == list(range(9))


def test_another_number_of_ranks_is_said_and_compared_by_drift(plain_recording: Path, replay: Replaying, capsys: Any) -> None:
    found, _ = replay(plain_recording, num_ranks=2, tolerance=0.5)
    assert found.results[0].environment == {"ranks": ("1", "2")}
    assert "not as in the run: ranks was 1, is 2" in capsys.readouterr().out
    assert found.results[0].largest_drift < 0.5


def test_drift_above_the_tolerance_stops_a_replay_of_other_ranks(recording: Path, replay: Replaying) -> None:
    plant(recording, 3)
    with pytest.raises(ReplayDiffers, match="drift"):
        replay(recording, num_ranks=2, tolerance=1e-6)


def test_a_run_that_was_killed_in_the_middle_of_a_batch_is_replayed_as_far_as_it_went(
    make_recording: Callable[..., Path], replay: Replaying, tmp_path: Path
) -> None:
    policy = {"max_lag": 4, "reuse": 2, "sync_every": 1}
    recording = make_recording(Session(dies_after=4), run={"steps": 8}, policy=policy)
    found, _ = replay(recording, out=tmp_path / "out")
    assert [row.step for row in found.rows] == [0, 1, 2, 3, 4]
    assert found.results[0].is_exact and found.results[0].end == 5
    assert found.results[0].num_unrecorded <= 1
