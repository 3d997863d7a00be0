"""The objective, its gradient and its statistics against plain Python loops in float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from learner.objective import STATISTICS, Objective, TokenBatch, objective, token_weights
from protocol.config import LossConfig

LOW, HIGH = 0.15, 0.3
CAP = 2.0


class Example(NamedTuple):
    """Ragged lists, one entry per completion: what the formulas are written in."""

    logprobs: list[list[float]]
    behaviour: list[list[float]]
    proximal: list[list[float]]
    reference: list[list[float]]
    advantages: list[float]


def every_config() -> list[LossConfig]:
    choices = itertools.product(("clip", "min-clip"), ("token", "sequence"), ("sequence", "token"), (0.0, 0.1), (None, CAP))
    return [
        LossConfig(surrogate=surrogate, ratio=ratio, aggregate=aggregate, kl_coef=kl, importance_cap=cap, clip_low=LOW, clip_high=HIGH)
        for surrogate, ratio, aggregate, kl, cap in choices
    ]


def config_id(config: LossConfig) -> str:
    return f"{config.surrogate}-{config.ratio}-{config.aggregate}-kl{config.kl_coef}-cap{config.importance_cap}"


every = pytest.mark.parametrize("config", every_config(), ids=config_id)


def slow_ratios(config: LossConfig, above: list[float], below: list[float]) -> list[float]:
    """rho of every token of one completion."""
    if config.ratio == "sequence":
        return [math.exp(sum(a - b for a, b in zip(above, below, strict=True)))] * len(above)
    return [math.exp(a - b) for a, b in zip(above, below, strict=True)]


def slow_clip(ratio: float) -> float:
    return max(1 - LOW, min(1 + HIGH, ratio))


def slow_objective(config: LossConfig, example: Example) -> tuple[float, dict[str, float]]:
    """J and the statistics, straight from the formulas."""
    num_completions = len(example.logprobs)
    num_tokens = sum(len(row) for row in example.logprobs)
    total = 0.0
    sums = dict.fromkeys(STATISTICS, 0.0)
    for lp, b, p, r, gain in zip(*example, strict=True):
        start = b if config.importance_cap is None else p
        ratios = slow_ratios(config, lp, start)
        mismatches = slow_ratios(config, p, b)
        for t in range(len(lp)):
            weight = 1 / (num_completions * len(lp)) if config.aggregate == "sequence" else 1 / num_tokens
            rho = ratios[t]
            paper = slow_clip(rho) * gain
            if config.surrogate == "clip":
                surrogate, is_clipped = paper, not (1 - LOW <= rho <= 1 + HIGH)
            else:
                surrogate, is_clipped = min(rho * gain, paper), paper < rho * gain
            importance = 1.0 if config.importance_cap is None else min(mismatches[t], config.importance_cap)
            kl = 0.0 if config.kl_coef == 0 else math.exp(r[t] - lp[t]) - (r[t] - lp[t]) - 1
            total += weight * (importance * surrogate - config.kl_coef * kl)
            drift = lp[t] - b[t]
            sums["num_tokens"] += 1
            sums["num_clipped"] += is_clipped
            sums["ratio"] += rho
            sums["ratio_squared"] += rho**2
            sums["kl_behaviour"] += math.exp(drift) - drift - 1
            sums["kl_reference"] += kl
            sums["importance_weight"] += importance
            sums["num_truncated"] += config.importance_cap is not None and mismatches[t] > config.importance_cap
    return total, sums


def slow_gradient(config: LossConfig, example: Example, step: float = 1e-6) -> list[list[float]]:
    """dJ / dlp by central differences."""
    gradient = []
    for i, row in enumerate(example.logprobs):
        gradient.append([])
        for t in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(other) for other in example.logprobs]
                moved[i][t] += sign * step
                values.append(slow_objective(config, example._replace(logprobs=moved))[0])
            gradient[-1].append((values[0] - values[1]) / (2 * step))
    return gradient


def is_near_a_kink(config: LossConfig, example: Example) -> bool:
    """Whether a ratio is so near to a clip bound or the cap that a difference would straddle it."""
    for lp, b, p, _, _ in zip(*example, strict=True):
        ratios = slow_ratios(config, lp, b if config.importance_cap is None else p)
        if any(abs(rho - edge) < 1e-3 for rho in ratios for edge in (1 - LOW, 1 + HIGH)):
            return True
        if any(abs(mismatch - CAP) < 1e-3 for mismatch in slow_ratios(config, p, b)):
            return True
    return False


def make_example(config: LossConfig, seed: int, completions: int = 6) -> Example:
    """Ratios inside, below and above the clip range, advantages of both signs and one of zero."""
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        lengths = rng.integers(1, 7, completions)
        spread = 0.3 if config.ratio == "token" else 0.2
        behaviour = [rng.uniform(-4, -0.5, count) for count in lengths]
        proximal = [row + 2 * spread * rng.standard_normal(row.size) + 0.2 for row in behaviour]
        start = behaviour if config.importance_cap is None else proximal
        logprobs = [row + spread * rng.standard_normal(row.size) for row in start]
        reference = [row + 0.5 * rng.standard_normal(row.size) for row in logprobs]
        gains = rng.standard_normal(completions)
        gains[0] = 0.0
        rows = [[row.tolist() for row in table] for table in (logprobs, behaviour, proximal, reference)]
        example = Example(rows[0], rows[1], rows[2], rows[3], gains.tolist())
        if not is_near_a_kink(config, example):
            return example
    raise AssertionError("no example away from the kinks")


def padded(rows: list[list[float]], longest: int, padding: float = 0.0) -> torch.Tensor:
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.float64)


def tensors(config: LossConfig, example: Example, rows: list[int], extra: int = 0, padding: float = 0.0) -> tuple[torch.Tensor, TokenBatch]:
    """Rows of the example as one microbatch; `extra` more columns of padding, filled with `padding`."""
    longest = max(len(example.logprobs[i]) for i in rows) + extra
    counts = torch.tensor([len(example.logprobs[i]) for i in rows])
    all_tokens = sum(len(row) for row in example.logprobs)
    weights = token_weights(counts, longest, config.aggregate, len(example.logprobs), all_tokens)

    def table(values: list[list[float]]) -> torch.Tensor:
        return padded([values[i] for i in rows], longest, padding)

    mask = padded([[1.0] * len(example.logprobs[i]) for i in rows], longest)
    gains = torch.tensor([example.advantages[i] for i in rows], dtype=torch.float64)
    batch = TokenBatch(
        mask,
        table(example.behaviour),
        gains,
        weights,
        table(example.proximal) if config.importance_cap is not None else None,
        table(example.reference) if config.kl_coef > 0 else None,
    )
    return table(example.logprobs).requires_grad_(), batch


def value_and_gradient(config: LossConfig, logprobs: torch.Tensor, batch: TokenBatch) -> tuple[Objective, torch.Tensor]:
    result = objective(logprobs, batch, config)
    (gradient,) = torch.autograd.grad(result.value, logprobs)
    return result, gradient


@every
def test_the_value_is_that_of_the_formula(config: LossConfig) -> None:
    for seed in range(5):
        example = make_example(config, seed)
        logprobs, batch = tensors(config, example, list(range(6)))
        assert objective(logprobs, batch, config).value.item() == pytest.approx(slow_objective(config, example)[0], rel=1e-6, abs=1e-7)


@every
def test_the_gradient_is_that_of_the_formula(config: LossConfig) -> None:
    for seed in range(3):
        example = make_example(config, seed)
        logprobs, batch = tensors(config, example, list(range(6)))
        _, gradient = value_and_gradient(config, logprobs, batch)
        expected = padded(slow_gradient(config, example), logprobs.shape[1])
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@every
def test_the_statistics_are_sums_over_tokens(config: LossConfig) -> None:
    for seed in range(5):
        example = make_example(config, seed)
        logprobs, batch = tensors(config, example, list(range(6)))
        found = {name: float(value) for name, value in objective(logprobs, batch, config).statistics.items()}
        assert found == pytest.approx(slow_objective(config, example)[1], rel=1e-9, abs=1e-9)


@every
def test_padding_changes_nothing(config: LossConfig) -> None:
    example = make_example(config, 1)
    plain, gradient = value_and_gradient(config, *tensors(config, example, list(range(6))))
    for padding in (0.0, 50.0, -1e4, math.nan):
        wide, wide_gradient = value_and_gradient(config, *tensors(config, example, list(range(6)), extra=3, padding=padding))
        assert wide.value.item() == pytest.approx(plain.value.item(), rel=1e-12)
        assert {k: float(v) for k, v in wide.statistics.items()} == pytest.approx({k: float(v) for k, v in plain.statistics.items()})
        assert torch.allclose(wide_gradient[:, :-3], gradient, rtol=1e-12)
        assert not wide_gradient[:, -3:].any()


@every
def test_microbatches_sum_to_the_whole_batch(config: LossConfig) -> None:
    example = make_example(config, 2)
    whole, gradient = value_and_gradient(config, *tensors(config, example, list(range(6))))
    value, statistics = 0.0, dict.fromkeys(STATISTICS, 0.0)
    for rows in ([4], [0, 5, 2], [1, 3]):
        part, part_gradient = value_and_gradient(config, *tensors(config, example, rows))
        value += part.value.item()
        for name in STATISTICS:
            statistics[name] += float(part.statistics[name])
        assert torch.allclose(part_gradient, gradient[rows, : part_gradient.shape[1]], rtol=1e-12)
    assert value == pytest.approx(whole.value.item(), rel=1e-12)
    assert statistics == pytest.approx({k: float(v) for k, v in whole.statistics.items()})


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_weights_sum_to_one_over_the_batch_and_are_zero_on_padding(aggregate: str) -> None:
    counts = torch.tensor([1, 4, 2])
    weights = token_weights(counts, 5, aggregate, 3, 7)
    each = [1 / 3, 1 / 12, 1 / 6] if aggregate == "sequence" else [1 / 7] * 3
    expected = [[each[i] if t < count else 0.0 for t in range(5)] for i, count in enumerate(counts.tolist())]
    assert torch.allclose(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("surrogate", ["clip", "min-clip"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_ratio_of_unchanged_weights_is_one_and_nothing_is_clipped(surrogate: str, ratio: str) -> None:
    config = LossConfig(surrogate=surrogate, ratio=ratio)
    example = make_example(config, 3)
    example = example._replace(logprobs=example.behaviour)
    logprobs, batch = tensors(config, example, list(range(6)))
    result = objective(logprobs, batch, config)
    count = float(result.statistics["num_tokens"])
    assert float(result.statistics["ratio"]) == count
    assert float(result.statistics["num_clipped"]) == 0
    assert result.value.item() == pytest.approx(float(np.mean(example.advantages)), rel=1e-6)


@pytest.mark.parametrize(("gain", "log_ratio"), [(1.0, -0.5), (-1.0, 0.5)])
def test_min_clip_lets_a_gradient_through_where_clip_does_not(gain: float, log_ratio: float) -> None:
    """A bad move is undone by min(rho A, clip(rho) A), and left as it is by the paper's clip(rho) A."""
    slopes = {}
    for surrogate in ("clip", "min-clip"):
        config = LossConfig(surrogate=surrogate, clip_low=LOW, clip_high=HIGH)
        example = Example([[-1.0 + log_ratio]], [[-1.0]], [[-1.0]], [[-1.0]], [gain])
        _, gradient = value_and_gradient(config, *tensors(config, example, [0]))
        slopes[surrogate] = gradient.item()
    assert slopes["clip"] == 0
    assert slopes["min-clip"] == pytest.approx(gain * math.exp(log_ratio))


def test_no_gradient_flows_through_the_importance_weight() -> None:
    config = LossConfig(importance_cap=CAP)
    example = make_example(config, 4)
    logprobs, batch = tensors(config, example, list(range(6)))
    assert batch.proximal is not None
    proximal = batch.proximal.requires_grad_()
    result = objective(logprobs, batch._replace(proximal=proximal), config)
    slow = [[0.0] * len(row) for row in example.proximal]
    for i, row in enumerate(example.proximal):
        for t in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(other) for other in example.proximal]
                moved[i][t] += sign * 1e-6
                # c is held at the unmoved proximal; only rho moves.
                values.append(_value_with_importance_of(config, example, moved))
            slow[i][t] = (values[0] - values[1]) / 2e-6
    (gradient,) = torch.autograd.grad(result.value, proximal)
    assert torch.allclose(gradient, padded(slow, logprobs.shape[1]), rtol=1e-5, atol=1e-7)


def _value_with_importance_of(config: LossConfig, example: Example, proximal: list[list[float]]) -> float:
    total = 0.0
    for lp, b, p, moved, gain in zip(example.logprobs, example.behaviour, example.proximal, proximal, example.advantages, strict=True):
        for t in range(len(lp)):
            rho = math.exp(lp[t] - moved[t])
            importance = min(math.exp(p[t] - b[t]), CAP)
            clipped = max(1 - config.clip_low, min(1 + config.clip_high, rho))
            total += importance * min(rho * gain, clipped * gain) / (len(example.logprobs) * len(lp))
    return total


@pytest.mark.parametrize("cap", [0.7, 1.3, 2.0, 3.1])
def test_truncated_weights_are_counted_in_single_precision_too(cap: float) -> None:
    config = LossConfig(importance_cap=cap)
    mismatch = [-1.0, 0.1, 0.5, 1.0, 2.0]
    behaviour = [-3.0] * 5
    proximal = [b + m for b, m in zip(behaviour, mismatch, strict=True)]
    example = Example([proximal], [behaviour], [proximal], [proximal], [1.0])
    logprobs, batch = tensors(config, example, [0], extra=2)
    single = TokenBatch(*(None if t is None else t.float() for t in batch))
    found = objective(logprobs.float(), single, config).statistics["num_truncated"]
    assert float(found) == sum(math.exp(m) > cap for m in mismatch)


@pytest.mark.parametrize("surrogate", ["clip", "min-clip"])
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_a_sequence_ratio_beyond_the_range_of_floats_is_clipped_like_any_other(surrogate: str, gain: float) -> None:
    """Log-ratios of long completions add up: 1000 tokens at 0.1 each are a ratio of e^100, which float32 does not hold."""
    config = LossConfig(surrogate=surrogate, ratio="sequence", clip_low=LOW, clip_high=HIGH)
    count = 1000
    behaviour = torch.full((1, count), -2.0)
    logprobs = torch.full((1, count), -1.9, requires_grad=True)
    weights = token_weights(torch.tensor([count]), count, "sequence", 1, count)
    batch = TokenBatch(torch.ones(1, count), behaviour, torch.tensor([gain]), weights)
    result, gradient = value_and_gradient(config, logprobs, batch)
    assert result.value.item() == pytest.approx((1 + HIGH) * gain, rel=1e-5)
    assert not gradient.any()
    assert all(math.isfinite(float(value)) for value in result.statistics.values())
