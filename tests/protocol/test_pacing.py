from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.pacing import Pacing, smallest_max_lag


def newest_published(step: int, sync_every: int) -> int:
    """The step of the newest version that exists when the learner stands at `step`, found by walking there."""
    newest = 0
    for done in range(1, step + 1):
        if done % sync_every == 0:
            newest = done
    return newest


def reaches_the_end(pacing: Pacing) -> tuple[bool, int]:
    """Walk a run of one ticket per batch: the actor always holds the newest version and serves what it is allowed to.

    Answers whether the learner reached the last step, and the largest lag that any step used.
    """
    sampled_at: dict[int, int] = {}
    largest = newest = 0
    for step in range(pacing.num_steps):
        while len(sampled_at) < pacing.num_batches and newest >= pacing.oldest_step(len(sampled_at)):
            sampled_at[len(sampled_at)] = newest
        batch = step // pacing.reuse
        if batch not in sampled_at:
            return False, largest
        largest = max(largest, step - sampled_at[batch])
        if (step + 1) % pacing.sync_every == 0:
            newest = step + 1
    return True, largest


@pytest.mark.parametrize("reuse", range(1, 9))
@pytest.mark.parametrize("sync_every", range(1, 9))
def test_the_smallest_max_lag_is_the_smallest_at_which_the_learner_never_waits_for_itself(reuse: int, sync_every: int) -> None:
    smallest = next(max_lag for max_lag in range(40) if reaches_the_end(Pacing(max_lag, reuse, sync_every, 1, 6 * reuse * sync_every))[0])
    assert smallest_max_lag(reuse, sync_every) == smallest


@pytest.mark.parametrize("reuse", range(1, 9))
@pytest.mark.parametrize("sync_every", range(1, 9))
def test_the_issue_rule_never_lets_a_lag_exceed_the_bound_and_uses_the_bound_up(reuse: int, sync_every: int) -> None:
    for max_lag in range(smallest_max_lag(reuse, sync_every), 20):
        done, largest = reaches_the_end(Pacing(max_lag, reuse, sync_every, 1, 6 * reuse * sync_every + 3 * max_lag))
        assert done
        assert largest <= max_lag
        assert largest > max_lag - max(reuse, sync_every), "pacing is no stricter than a batch or a publication makes it"


@given(reuse=st.integers(1, 9), max_lag=st.integers(0, 30), batch=st.integers(0, 50), version=st.integers(0, 500))
def test_a_version_is_new_enough_exactly_when_no_use_of_the_batch_is_too_late(reuse: int, max_lag: int, batch: int, version: int) -> None:
    pacing = Pacing(max_lag, reuse, 1, 4, 1000)
    uses = [step for step in range(600) if pacing.batch_of_step(step) == batch]
    assert uses == list(range(pacing.first_use(batch), pacing.last_use(batch) + 1))
    assert (version >= pacing.oldest_step(batch)) == all(step - version <= max_lag for step in uses)


@given(reuse=st.integers(1, 9), steps=st.integers(1, 100))
def test_the_batches_of_a_run_cover_its_steps_and_no_more(reuse: int, steps: int) -> None:
    pacing = Pacing(reuse - 1, reuse, reuse, 4, steps)
    assert {pacing.batch_of_step(step) for step in range(steps)} == set(range(pacing.num_batches))


@given(step=st.integers(0, 100), sync_every=st.integers(1, 9))
def test_the_learner_publishes_every_so_many_steps_and_at_the_start(step: int, sync_every: int) -> None:
    pacing = Pacing(20, 1, sync_every, 4, 200)
    assert pacing.publishes(step) == (newest_published(step, sync_every) == step)


@settings(max_examples=200)
@given(reuse=st.integers(1, 6), sync_every=st.integers(1, 6), spare=st.integers(0, 6), size=st.integers(1, 4), window=st.integers(1, 3))
def test_no_more_groups_are_ever_ahead_than_run_ahead_says(reuse: int, sync_every: int, spare: int, size: int, window: int) -> None:
    pacing = Pacing(smallest_max_lag(reuse, sync_every) + spare, reuse, sync_every, size, 60, window)
    for step in range(60):
        delivered = step // reuse
        for newest in (newest_published(step, sync_every), newest_published(step + 1, sync_every)):
            allowed = sum(1 for batch in range(delivered, 200) if newest >= pacing.oldest_step(batch))
            assert allowed * size <= pacing.run_ahead


def test_the_examples_of_the_design_hold() -> None:
    assert smallest_max_lag(1, 1) == 0, "synchronous"
    assert smallest_max_lag(8, 8) == 7, "the paper's cycle"
    assert smallest_max_lag(1, 4) == 3


def test_pacing_survives_json_and_refuses_fields_it_does_not_know() -> None:
    pacing = Pacing(3, 1, 4, 16, 200, 2)
    assert msgspec.json.decode(msgspec.json.encode(pacing), type=Pacing) == pacing
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.structs.asdict(pacing), "lag": 1}, Pacing)
