"""Quantiles of importance ratios from counts: against sorting them all."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.objective import MAX_LOG_RATIO, TokenBatch, objective
from learner.stability.quantiles import EDGES, LARGEST, NUM_STEPS, SHARES, SMALLEST, quantile, ratio_quantiles
from protocol.config import LossConfig


def count(values: NDArray[np.float64]) -> list[int]:
    """One value at a time: bin i holds those above EDGES[i-1] up to EDGES[i]."""
    counts = [0] * (len(EDGES) + 1)
    for value in values.tolist():
        counts[sum(edge < value for edge in EDGES)] += 1
    return counts


def make_batch(logprobs: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor) -> TokenBatch:
    return TokenBatch(mask, behaviour, torch.ones(logprobs.shape[0]), mask / mask.sum())


def test_edges_ascend_are_symmetric_and_a_tenth_apart() -> None:
    assert list(EDGES) == sorted(EDGES) == [-edge for edge in reversed(EDGES)]
    assert (EDGES[NUM_STEPS - 1], EDGES[NUM_STEPS]) == (-SMALLEST, SMALLEST)
    assert EDGES[-1] == pytest.approx(LARGEST) and LARGEST == MAX_LOG_RATIO
    assert all(1 < later / earlier < 1.11 for earlier, later in pairwise(EDGES[NUM_STEPS:]))


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 6.0])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_quantiles_are_those_of_the_sorted_values_to_a_tenth(scale: float, size: int) -> None:
    rng = np.random.default_rng(size)
    for unbounded in (scale * rng.standard_normal(size), scale * rng.standard_exponential(size), -scale * rng.standard_exponential(size)):
        values, counts = unbounded.clip(-LARGEST, LARGEST), count(unbounded)
        for share in (0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0):
            exact = float(np.quantile(values, share, method="inverted_cdf"))
            assert quantile(counts, share) == pytest.approx(exact, rel=0.11, abs=SMALLEST)


def test_by_interpolation_quantiles_of_many_values_are_nearer_than_a_bin() -> None:
    values = 0.3 * np.random.default_rng(3).standard_normal(20_000)
    counts = count(values)
    for share in (0.01, 0.1, 0.9, 0.99):
        assert quantile(counts, share) == pytest.approx(float(np.quantile(values, share)), rel=0.02)


def test_counts_that_are_added_give_the_quantiles_of_all_values() -> None:
    rng = np.random.default_rng(4)
    parts = [rng.standard_normal(50), 3 + rng.standard_normal(70)]
    total = [sum(counts) for counts in zip(*map(count, parts), strict=True)]
    assert total == count(np.concatenate(parts))


def test_no_tokens_have_a_ratio_of_one() -> None:
    assert quantile([0] * (len(EDGES) + 1), 0.5) == 0.0
    assert ratio_quantiles([0] * (len(EDGES) + 1)) == dict.fromkeys(SHARES, 1.0)


def test_ratios_that_differ_from_one_by_rounding_only_count_as_one() -> None:
    assert ratio_quantiles(count(np.array([0.0, 9e-5, -9e-5, 1e-12]))) == dict.fromkeys(SHARES, 1.0)


@pytest.mark.parametrize(("value", "edge"), [(-1e3, -LARGEST), (1e3, LARGEST), (math.inf, LARGEST), (-math.inf, -LARGEST)])
def test_values_beyond_the_edges_count_as_the_outermost(value: float, edge: float) -> None:
    counts = count(np.array([value] * 5))
    for share in SHARES.values():
        assert quantile(counts, share) == pytest.approx(edge)


def test_quantiles_ascend_with_their_share() -> None:
    counts = np.random.default_rng(5).integers(0, 4, len(EDGES) + 1).tolist()
    found = [quantile(counts, share) for share in np.linspace(0.01, 1, 100).tolist()]
    assert found == sorted(found)
    assert list(ratio_quantiles(counts).values()) == sorted(ratio_quantiles(counts).values())


# --- what the objective counts


def test_the_objective_counts_the_log_ratio_of_every_sampled_token_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, behaviour = torch.randn(5, 8, generator=generator) - 3, torch.randn(5, 8, generator=generator) - 3
    mask = (torch.rand(5, 8, generator=generator) < 0.7).float()
    counts = objective(logprobs, make_batch(logprobs, behaviour, mask), LossConfig()).ratio_counts
    expected = (logprobs - behaviour)[mask > 0].double().numpy()
    assert counts.dtype == torch.int64
    assert counts.tolist() == count(expected)


def test_sequence_ratios_are_counted_at_each_of_their_tokens() -> None:
    logprobs, behaviour = torch.tensor([[0.5, 0.25, 9.0], [-2.0, 0.0, 0.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    counts = objective(logprobs, make_batch(logprobs, behaviour, mask), LossConfig(ratio="sequence")).ratio_counts
    assert counts.tolist() == count(np.array([0.75, 0.75, -2.0, -2.0, -2.0]))


def test_with_an_importance_cap_ratios_are_those_to_the_first_use() -> None:
    logprobs, behaviour, mask = torch.full((1, 4), -1.0), torch.full((1, 4), -9.0), torch.ones(1, 4)
    batch = make_batch(logprobs, behaviour, mask)._replace(proximal=torch.full((1, 4), -1.5))
    counts = objective(logprobs, batch, LossConfig(importance_cap=2.0)).ratio_counts
    assert counts.tolist() == count(np.full(4, 0.5))


def test_ratios_that_are_no_numbers_count_as_the_largest() -> None:
    logprobs = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])
    counts = objective(logprobs, make_batch(logprobs, torch.zeros(1, 4), torch.ones(1, 4)), LossConfig()).ratio_counts
    assert {index: int(counts[index]) for index in counts.nonzero()[:, 0].tolist()} == {0: 1, NUM_STEPS: 1, len(EDGES): 2}
