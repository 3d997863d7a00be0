"""Collapse: the level of rewards drops to zero and stays there. One rule per test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from learner.stability.collapse import (
    GOOD_SHARE,
    LEVEL_BATCHES,
    MIN_REWARDS,
    PATIENCE,
    SMALLEST_LEVEL,
    ZERO_SHARE,
    Collapse,
    collapse_step,
)

MANY = 1000
"""Completions of a batch that alone tell whether a level is at zero."""
FALL = math.floor(LEVEL_BATCHES * (1 - ZERO_SHARE) - 1e-9) + 1
"""So many batches without a reward, after a full level of good ones, bring it below ZERO_SHARE of the best."""
SOONEST = FALL + PATIENCE - 1
"""So many of them are a collapse at the least."""
GOOD = [0.5] * (LEVEL_BATCHES + 2)


def fed(rewards: Sequence[float], every: int = 1, num_completions: int = MANY) -> Collapse:
    """One batch every so many steps."""
    collapse = Collapse()
    for index, reward in enumerate(rewards):
        collapse.add(index * every, reward, num_completions)
    return collapse


@pytest.mark.parametrize("every", [1, 8])
def test_a_reward_of_zero_that_stays_is_a_collapse_since_its_first_batch(every: int) -> None:
    for num_low in range(SOONEST + 4):
        collapse = fed([*GOOD, *[0.0] * num_low], every)
        assert collapse.collapsed_at == (len(GOOD) * every if num_low >= SOONEST else None)


def test_a_run_that_never_was_rewarded_cannot_collapse() -> None:
    assert fed([0.0] * 50).collapsed_at is None
    assert fed([SMALLEST_LEVEL / 2] * 10 + [0.0] * 50, num_completions=10**12).collapsed_at is None
    assert collapse_step(list(range(50)), [0.0] * 50, MANY) is None


def test_single_bad_batches_are_no_collapse() -> None:
    collapse = Collapse()
    for step, reward in enumerate(([0.5] * 3 + [0.0]) * 20):
        collapse.add(step, reward, MANY)
        assert collapse.collapsed_at is None
    almost = GOOD + ([0.0] * (SOONEST - 1) + [0.5] * LEVEL_BATCHES) * 10
    for end in range(len(almost)):
        assert fed(almost[:end]).collapsed_at is None


def test_a_run_that_comes_back_has_not_collapsed() -> None:
    collapse = fed([*GOOD, *[0.0] * 10])
    assert collapse.collapsed_at == len(GOOD)
    steps = iter(range(len(GOOD) + 10, 1000))
    for _ in range(LEVEL_BATCHES):
        collapse.add(next(steps), 0.5, MANY)
    assert (collapse.low_since, collapse.num_low, collapse.num_expected) == (-1, 0, 0.0)
    again = len(GOOD) + 10 + LEVEL_BATCHES
    for _ in range(SOONEST):
        assert collapse.collapsed_at is None
        collapse.add(next(steps), 0.0, MANY)
    assert collapse.collapsed_at == again


def test_zero_is_a_share_of_the_best_level() -> None:
    low = ZERO_SHARE * 0.5
    assert fed([*GOOD, *[low] * (LEVEL_BATCHES + PATIENCE)]).collapsed_at == len(GOOD)
    assert fed([*GOOD, *[low + 1e-9] * 50]).collapsed_at is None


def test_it_is_the_level_that_has_to_be_at_zero_and_not_each_batch() -> None:
    lucky = ([ZERO_SHARE * 0.5 * LEVEL_BATCHES] + [0.0] * (LEVEL_BATCHES - 1)) * 3
    collapse = fed([*GOOD, *[0.0] * LEVEL_BATCHES, *lucky])
    assert max(lucky) > ZERO_SHARE * collapse.best, "some batches are above zero by themselves"
    assert collapse.collapsed_at == len(GOOD)


def test_one_lucky_batch_is_no_level() -> None:
    lucky = [0.1] * 8 + [0.9]
    best = (0.9 + 0.1 * (LEVEL_BATCHES - 1)) / LEVEL_BATCHES
    assert fed([*lucky, *[ZERO_SHARE * best * 1.01] * 20]).collapsed_at is None
    assert fed([*lucky, *[ZERO_SHARE * best * 0.99] * 20]).collapsed_at == len(lucky)


@pytest.mark.parametrize("num_completions", [1, 4, 8, 16, 64, MANY])
def test_a_fall_is_believed_once_the_batches_since_would_have_brought_enough_rewards(num_completions: int) -> None:
    needed = max(SOONEST, math.ceil(MIN_REWARDS / (0.5 * num_completions)))
    for num_low in range(needed + 2):
        found = fed([*GOOD, *[0.0] * num_low], num_completions=num_completions).collapsed_at
        assert found == (len(GOOD) if num_low >= needed else None)


def test_the_last_good_step_is_that_of_the_last_batch_near_the_best_level() -> None:
    collapse = fed([0.4] * 10)
    assert collapse.last_good == 9
    for step in range(10, 20):
        collapse.add(step, 0.0, MANY)
    assert collapse.last_good == 9, "at step 10 the level was still near the best, that batch itself was bad"
    collapse.add(20, 0.4, MANY)
    assert collapse.last_good == 9, "one good batch is no level"
    for step in range(21, 21 + LEVEL_BATCHES):
        collapse.add(step, 0.4, MANY)
    assert collapse.last_good == 20 + LEVEL_BATCHES
    collapse.add(50, GOOD_SHARE * 0.4, MANY)
    assert collapse.last_good == 20 + LEVEL_BATCHES, "at that share exactly it is not near"


def test_a_collapse_goes_on_from_json() -> None:
    rng = np.random.default_rng(0)
    rewards = [*rng.uniform(0.2, 0.6, 9).tolist(), *[0.0] * 9, *rng.uniform(0.2, 0.6, 3).tolist()]
    for stop in range(len(rewards)):
        whole, first = fed(rewards), fed(rewards[:stop])
        again = msgspec.json.decode(msgspec.json.encode(first), type=Collapse)
        for step in range(stop, len(rewards)):
            again.add(step, rewards[step], MANY)
        assert again == whole


# --- sparse rewards


NUM_SEEDS = 40


def verdicts(rate: float, num_completions: int, seed: int, num_batches: int = 300) -> list[int | None]:
    """What is said after each batch of a run that is rewarded at the same rate throughout."""
    collapse, rng, found = Collapse(), np.random.default_rng([seed, num_completions]), []
    for step, count in enumerate(rng.binomial(num_completions, rate, num_batches).tolist()):
        collapse.add(step, count / num_completions, num_completions)
        found.append(collapse.collapsed_at)
    return found


@pytest.mark.parametrize(("rate", "most"), [(0.02, 0.03), (0.05, 0.01), (0.1, 0.0)])
def test_a_sparse_but_healthy_run_is_seldom_called_collapsed_in_300_batches(rate: float, most: float) -> None:
    """The best level is the largest of many, so that at the lowest rates chance alone makes a level to fall from: seldom is not never."""
    runs = [verdicts(rate, num_completions, seed) for num_completions in (16, 32, 64) for seed in range(NUM_SEEDS)]
    assert sum(any(step is not None for step in run) for run in runs) <= most * len(runs)
    assert sum(run[-1] is not None for run in runs) <= 1, "where it was wrong it takes it back"


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("num_completions", [16, 32, 64])
def test_a_sparse_run_that_gets_no_reward_any_more_is_called_collapsed(rate: float, num_completions: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng([seed, num_completions])
        counts = [*rng.binomial(num_completions, rate, 100).tolist(), *[0] * 400]
        rewards = [count / num_completions for count in counts]
        found = collapse_step(list(range(500)), rewards, num_completions)
        last = max(step for step, count in enumerate(counts) if count)
        # At the low rates batches without a reward, or with one, came before.
        assert found is not None and last - 60 <= found <= last + 1


# --- recorded runs


def slow_collapse_step(steps: Sequence[int], rewards: Sequence[float], num_completions: int) -> int | None:
    """By the levels of the whole record: the first stretch of levels at zero that is a collapse, since the level was last above GOOD_SHARE."""
    levels = [float(np.mean(rewards[max(0, end - LEVEL_BATCHES) : end])) for end in range(1, len(rewards) + 1)]
    bests = [max(levels[:end]) for end in range(1, len(levels) + 1)]
    is_low = [
        best > SMALLEST_LEVEL and level <= ZERO_SHARE * best + 1e-12 and reward <= GOOD_SHARE * best
        for level, best, reward in zip(levels, bests, rewards, strict=True)
    ]
    come_back = max((index + 1 for index, level in enumerate(levels) if level > GOOD_SHARE * bests[index]), default=0)
    for begin in (index for index in range(come_back, len(is_low)) if is_low[index] and (index == 0 or not is_low[index - 1])):
        end = next((index for index in range(begin, len(is_low)) if not is_low[index]), len(is_low))
        first = begin
        zero = ZERO_SHARE * bests[begin]
        while first > max(0, begin - LEVEL_BATCHES + 1) and all(reward <= zero for reward in rewards[first - 1 : begin + 1]):
            first -= 1
        num_before = begin - first + (rewards[begin] <= zero)
        if end - begin >= PATIENCE and (num_before + end - 1 - begin) * num_completions * bests[begin] >= MIN_REWARDS:
            return steps[first]
    return None


@pytest.mark.parametrize("num_completions", [24, 32, MANY])
def test_t_collapse_of_recorded_runs_is_that_of_the_levels_of_the_whole_record(num_completions: int) -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(500):
        size = int(rng.integers(0, 40))
        end = int(rng.integers(0, 25))
        rewards = [float(rng.uniform(0.05, 0.6)) if index < end else float(rng.choice([0.0, 0.01, 0.2])) for index in range(size)]
        steps = [8 * index for index in range(size)]
        found.append(collapse_step(steps, rewards, num_completions))
        assert found[-1] == slow_collapse_step(steps, rewards, num_completions)
    assert len(set(found)) > 5


def test_a_run_whose_first_batches_are_its_best_collapses_where_they_end() -> None:
    assert collapse_step([32 * index for index in range(10)], [0.3, *[0.0] * 9], MANY) == 32


def test_a_run_that_ends_soon_after_its_first_zero_has_not_collapsed_yet() -> None:
    for num_low in range(2 * SOONEST):
        rewards = [*GOOD, *[0.0] * num_low]
        found = collapse_step(list(range(len(rewards))), rewards, MANY)
        assert found == (len(GOOD) if num_low >= SOONEST else None)


@pytest.mark.parametrize("num_completions", [8, MANY])
def test_a_run_told_live_and_one_read_from_its_record_agree_after_each_batch(num_completions: int) -> None:
    rng, found = np.random.default_rng(2), set()
    for _ in range(50):
        rewards = [
            *rng.uniform(0.3, 0.6, rng.integers(1, 20)).tolist(),
            *[0.0] * int(rng.integers(0, 60)),
            *rng.uniform(0.0, 0.6, rng.integers(0, 8)).tolist(),
            *[0.01] * int(rng.integers(0, 60)),
        ]
        live, steps = Collapse(), [4 * index for index in range(len(rewards))]
        for end, (step, reward) in enumerate(zip(steps, rewards, strict=True), 1):
            live.add(step, reward, num_completions)
            assert live.collapsed_at == collapse_step(steps[:end], rewards[:end], num_completions)
            found.add(live.collapsed_at)
    assert None in found and len(found) > 10
