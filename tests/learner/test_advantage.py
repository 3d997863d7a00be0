"""Advantages against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantage import EPSILON, advantages

KINDS = ("z-score", "mean", "leave-one-out")

group_sizes = st.integers(2, 7)
float32s = st.floats(-1e6, 1e6, width=32)


@st.composite
def reward_tables(draw: st.DrawFn) -> list[list[float]]:
    size = draw(group_sizes)
    group = st.lists(st.floats(-100, 100, width=32), min_size=size, max_size=size)
    return draw(st.lists(group, min_size=1, max_size=4))


def slow_z_score(group: list[float]) -> list[float]:
    mean = math.fsum(group) / len(group)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
    return [(r - mean) / std for r in group] if std > EPSILON else [0.0] * len(group)


def slow_mean(group: list[float]) -> list[float]:
    mean = math.fsum(group) / len(group)
    return [r - mean for r in group]


def slow_leave_one_out(group: list[float]) -> list[float]:
    out = []
    for i, reward in enumerate(group):
        others = [r for j, r in enumerate(group) if j != i]
        out.append(reward - math.fsum(others) / len(others))
    return out


SLOW = {"z-score": slow_z_score, "mean": slow_mean, "leave-one-out": slow_leave_one_out}


def std_of(group: list[float]) -> float:
    mean = math.fsum(group) / len(group)
    return math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))


@pytest.mark.parametrize("kind", KINDS)
@given(table=reward_tables())
def test_advantages_are_those_of_the_formula(kind: str, table: list[list[float]]) -> None:
    found = advantages(torch.tensor(table, dtype=torch.float64), kind)
    for group, row in zip(table, found.tolist(), strict=True):
        if kind == "z-score" and std_of(group) < 100 * EPSILON:
            continue  # division by almost nothing; the two sides of the threshold have tests of their own
        assert row == pytest.approx(SLOW[kind](group), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(reward=float32s, size=st.integers(2, 64))
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(kind: str, reward: float, size: int) -> None:
    # Rewards cross the wire as float32; in float64 sums of equal float32 numbers are exact.
    assert advantages(torch.full((1, size), reward, dtype=torch.float64), kind).tolist() == [[0.0] * size]


@pytest.mark.parametrize("kind", KINDS)
@given(table=reward_tables())
def test_the_advantages_of_a_group_sum_to_zero(kind: str, table: list[list[float]]) -> None:
    found = advantages(torch.tensor(table, dtype=torch.float64), kind)
    assert found.sum(dim=1).tolist() == pytest.approx([0.0] * len(table), abs=1e-6)


@given(table=reward_tables(), shift=st.integers(-8, 8), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_z_scores_do_not_depend_on_the_scale_and_origin_of_rewards(table: list[list[float]], shift: int, scale: float) -> None:
    wide = torch.tensor([group if std_of(group) > 1e-2 else range(len(group)) for group in table], dtype=torch.float64)
    found = advantages(shift + scale * wide, "z-score")
    assert torch.allclose(found, advantages(wide, "z-score"), rtol=1e-6, atol=1e-9)


def test_the_z_score_uses_the_population_standard_deviation() -> None:
    assert advantages(torch.tensor([[0.0, 1.0]]), "z-score").tolist() == [[-1.0, 1.0]]
    one_of_four = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), "z-score")[0]
    assert one_of_four.tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])


def test_a_spread_below_the_threshold_gives_z_scores_of_zero_and_one_above_it_does_not() -> None:
    below = torch.tensor([[0.0, EPSILON]], dtype=torch.float64)
    above = torch.tensor([[0.0, 4 * EPSILON]], dtype=torch.float64)
    assert advantages(below, "z-score").tolist() == [[0.0, 0.0]]
    assert advantages(above, "z-score")[0].tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
@given(table=reward_tables())
def test_groups_do_not_influence_one_another(kind: str, table: list[list[float]]) -> None:
    together = advantages(torch.tensor(table, dtype=torch.float64), kind)
    for index, group in enumerate(table):
        alone = advantages(torch.tensor([group], dtype=torch.float64), kind)
        assert together[index].tolist() == pytest.approx(alone[0].tolist(), rel=1e-9, abs=1e-9)
