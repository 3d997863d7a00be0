"""One optimizer step: over ranks, over microbatches, its learning rate, its clipping and AdamW itself."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from learner.ranks import OneRank
from learner.step import Trainer, learning_rate
from protocol.config import LearnerConfig, LossConfig

DEADLINE = 60.0
# With AdamW's usual eps a gradient of 1e-9, which is rounding noise, moves a weight as far as any other: comparisons need a larger one.
SMOOTH = {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 0.5}


class ThreadedRanks:
    """Ranks that are threads of this process; sums are taken in order of rank, so all get the same bits."""

    def __init__(self, rank: int, world_size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self._shared, self._barrier = shared, barrier

    def broadcast(self, data: bytes | None) -> bytes:
        raise AssertionError("a step broadcasts nothing")

    def sum_(self, tensor: torch.Tensor) -> None:
        self._shared[self.rank] = tensor.clone()
        self._barrier.wait(DEADLINE)
        total = torch.stack(self._shared).sum(dim=0)
        self._barrier.wait(DEADLINE)
        tensor.copy_(total)

    def barrier(self) -> None:
        self._barrier.wait(DEADLINE)


def train_on_ranks(
    world_size: int, make_trainer: Callable[[Any], Trainer], batches: list[Any]
) -> list[tuple[Trainer, list[dict[str, float]]]]:
    """Every rank's trainer and metrics after a step on each batch."""
    shared, barrier = [None] * world_size, threading.Barrier(world_size)
    # Built in turn: random initialization draws from one generator for all threads.
    trainers = [make_trainer(ThreadedRanks(rank, world_size, shared, barrier)) for rank in range(world_size)]
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        try:
            trainer = trainers[rank]
            results[rank] = (trainer, [trainer.apply(batch, step) for step, batch in enumerate(batches)])
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def flat_weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)


LOSSES = [
    LossConfig(),
    LossConfig(aggregate="token", ratio="sequence", surrogate="clip", clip_low=0.99, clip_high=50.0),
    LossConfig(importance_cap=2.0, kl_coef=0.1),
]


@pytest.mark.parametrize("loss", LOSSES, ids=["default", "token-sequence", "capped-kl"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_take_the_step_that_one_rank_takes_alone(
    loss: LossConfig, world_size: int, make_llama: Any, make_training_batch: Any
) -> None:
    batches = [make_training_batch(number) for number in range(3)]

    def make_trainer(ranks: Any) -> Trainer:
        reference = make_llama(1) if loss.kl_coef else None
        return Trainer(make_llama(), reference, LearnerConfig(**SMOOTH, tokens_per_microbatch=40), loss, 10, 1.0, ranks)

    ((alone, metrics),) = train_on_ranks(1, make_trainer, batches)
    together = train_on_ranks(world_size, make_trainer, batches)
    for trainer, rank_metrics in together:
        assert torch.allclose(flat_weights(trainer), flat_weights(alone), rtol=1e-4, atol=2e-5)
        for found, expected in zip(rank_metrics, metrics, strict=True):
            assert_same_metrics(found, expected)
        # All ranks apply the same summed gradient: bit for bit the same weights.
        assert torch.equal(flat_weights(trainer), flat_weights(together[0][0]))
    assert not torch.allclose(flat_weights(alone), flat_weights(make_trainer(OneRank())), atol=1e-3)


def test_a_rank_without_sequences_still_takes_the_step(make_llama: Any, make_training_batch: Any) -> None:
    batch = make_training_batch(groups=1, group_size=2)

    def make_trainer(ranks: Any) -> Trainer:
        return Trainer(make_llama(), None, LearnerConfig(**SMOOTH), LossConfig(), 10, 1.0, ranks)

    ((alone, _),) = train_on_ranks(1, make_trainer, [batch])
    for trainer, _ in train_on_ranks(3, make_trainer, [batch]):
        assert torch.allclose(flat_weights(trainer), flat_weights(alone), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=["default", "token-sequence", "capped-kl"])
def test_the_size_of_microbatches_does_not_change_the_step(loss: LossConfig, make_llama: Any, make_training_batch: Any) -> None:
    batches = [make_training_batch(number) for number in range(3)]
    found = {}
    for tokens in (1, 30, 10_000):
        reference = make_llama(1) if loss.kl_coef else None
        trainer = Trainer(make_llama(), reference, LearnerConfig(**SMOOTH, tokens_per_microbatch=tokens), loss, 10, 1.0, OneRank())
        metrics = [trainer.apply(batch, step) for step, batch in enumerate(batches)]
        found[tokens] = flat_weights(trainer), metrics
    for tokens in (1, 30):
        assert torch.allclose(found[tokens][0], found[10_000][0], rtol=1e-4, atol=2e-5)
        for some, others in zip(found[tokens][1], found[10_000][1], strict=True):
            assert_same_metrics(some, others)


# --- the gradient, the statistics and AdamW against slow references


def slow_step_gradient(model: Any, batch: Any, temperature: float, slow_logprobs: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Gradient of J (min-clip, token ratios, mean over sequences) in float64, and a few metrics, one sequence at a time."""
    exact = copy.deepcopy(model).double()
    terms, entropy, ratios, clipped, drifts = [], 0.0, [], 0, 0.0
    for sequence in batch.sequences:
        logprobs, entropies = slow_logprobs(exact, sequence.prompt_ids, sequence.token_ids, temperature)
        entropy += sum(entropies)
        for logprob, behaviour in zip(logprobs, sequence.behaviour.tolist(), strict=True):
            ratio = (logprob - behaviour).exp()
            rho, gain = ratio.item(), sequence.advantage
            bounded = max(0.8, min(1.2, rho))
            # min(rho A, clip(rho) A): the clipped side has no gradient.
            chosen = ratio * gain if rho * gain <= bounded * gain else torch.tensor(bounded * gain, dtype=torch.float64)
            terms.append(chosen / (len(batch.sequences) * len(logprobs)))
            ratios.append(rho)
            clipped += bounded * gain < rho * gain
            drifts += math.exp(math.log(rho)) - math.log(rho) - 1
    value = torch.stack(terms).sum()
    value.backward()
    gradient = np.concatenate([parameter.grad.numpy().ravel() for parameter in exact.parameters()])
    count = len(ratios)
    metrics = {
        "objective": value.item(),
        "entropy": entropy / count,
        "num_tokens": count,
        "clip_fraction": clipped / count,
        "ratio": sum(ratios) / count,
        "effective_sample_size": sum(ratios) ** 2 / (count * sum(r * r for r in ratios)),
        "kl_behaviour": drifts / count,
        "kl_reference": 0.0,
        "importance_weight": 1.0,
        "truncated_share": 0.0,
    }
    return gradient, metrics


def slow_adamw(weights: np.ndarray, gradients: list[np.ndarray], rates: list[float], config: LearnerConfig) -> np.ndarray:
    """AdamW as in Loshchilov and Hutter, Algorithm 2, element by element in float64; gradients point downhill in the loss -J."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        weights = weights * (1 - rate * config.weight_decay)
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        unbiased_first = first / (1 - config.beta1**step)
        unbiased_second = second / (1 - config.beta2**step)
        weights = weights - rate * unbiased_first / (np.sqrt(unbiased_second) + config.eps)
    return weights


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_three_steps_are_those_of_a_slow_adamw_on_slow_clipped_gradients(
    max_grad_norm: float, make_llama: Any, make_training_batch: Any, slow_logprobs: Any
) -> None:
    temperature = 0.9
    config = LearnerConfig(lr=3e-3, eps=1e-3, weight_decay=0.1, max_grad_norm=max_grad_norm, warmup_steps=2, schedule="linear")
    trainer = Trainer(make_llama(), None, config, LossConfig(), 6, temperature, OneRank())
    start = flat_weights(trainer).double().numpy()
    gradients, rates = [], []
    for step in range(3):
        batch = make_training_batch(step, groups=2)
        ascent, expected = slow_step_gradient(trainer.model, batch, temperature, slow_logprobs)
        norm = math.sqrt(float((ascent**2).sum()))
        metrics = trainer.apply(batch, step)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        gradients.append(-ascent * min(1.0, max_grad_norm / norm))
        applied = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).double()
        assert float(applied.norm()) == pytest.approx(min(norm, max_grad_norm), rel=1e-4)
        assert np.allclose(applied.numpy(), gradients[-1], rtol=1e-3, atol=1e-5 * np.abs(gradients[-1]).max())
        rates.append(metrics["lr"])
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3])
    expected_weights = slow_adamw(start, gradients, rates, config)
    assert np.abs(expected_weights - start).max() > 1e-3
    assert np.allclose(flat_weights(trainer).double().numpy(), expected_weights, rtol=1e-5, atol=2e-6)


def test_the_step_makes_the_objective_larger(make_llama: Any, make_training_batch: Any) -> None:
    batch = make_training_batch()
    trainer = Trainer(make_llama(), None, LearnerConfig(lr=1e-4), LossConfig(clip_low=0.99, clip_high=1e6), 10, 1.0, OneRank())
    values = [trainer.apply(batch, step)["objective"] for step in range(5)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_with_advantages_of_zero_nothing_moves(make_llama: Any, make_training_batch: Any) -> None:
    batch = make_training_batch()
    batch = batch._replace(sequences=[sequence._replace(advantage=0.0) for sequence in batch.sequences])
    trainer = Trainer(make_llama(), None, LearnerConfig(lr=1e-2), LossConfig(), 10, 1.0, OneRank())
    before = flat_weights(trainer)
    metrics = trainer.apply(batch, 0)
    assert metrics["grad_norm"] == 0
    assert torch.equal(flat_weights(trainer), before)


# --- reuse


def test_a_reused_batch_keeps_the_proximal_log_probabilities_of_its_first_use(make_llama: Any, make_training_batch: Any) -> None:
    loss = LossConfig(importance_cap=2.0)
    trainer = Trainer(make_llama(), None, LearnerConfig(lr=1e-2), loss, 10, 1.0, OneRank())
    batch = make_training_batch(0)
    first, second = trainer.apply(batch, 0), trainer.apply(batch, 1)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(second["ratio"] - 1) > 1e-3
    assert second["importance_weight"] == first["importance_weight"]
    other = trainer.apply(make_training_batch(1), 2)
    assert other["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_the_kl_to_the_reference_is_zero_at_the_start_and_grows(make_llama: Any, make_training_batch: Any) -> None:
    trainer = Trainer(make_llama(), make_llama(), LearnerConfig(lr=1e-2), LossConfig(kl_coef=0.1), 10, 1.0, OneRank())
    batch = make_training_batch()
    first, second = trainer.apply(batch, 0), trainer.apply(batch, 1)
    assert first["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert second["kl_reference"] > 1e-4


# --- the learning rate


def slow_learning_rate(config: LearnerConfig, step: int, num_steps: int) -> float:
    """The curve as it is described: up in a straight line to lr, which the last warm-up step has, then from lr to zero at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share_left = (num_steps - step) / (num_steps - config.warmup_steps)
    return {
        "constant": config.lr,
        "linear": config.lr * share_left,
        "cosine": config.lr * math.cos(math.pi / 2 * (1 - share_left)) ** 2,
    }[config.schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_the_learning_rate_follows_its_schedule(schedule: str, warmup: int) -> None:
    config = LearnerConfig(lr=2e-5, schedule=schedule, warmup_steps=warmup)
    for step in range(20):
        assert learning_rate(config, step, 20) == pytest.approx(slow_learning_rate(config, step, 20), rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10, 50])
def test_no_step_of_a_run_has_a_learning_rate_of_zero_or_above_the_configured_one(schedule: str, warmup: int) -> None:
    config = LearnerConfig(lr=2e-5, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert all(0 < rate <= config.lr * (1 + 1e-12) for rate in rates)


def test_the_step_applies_and_reports_the_scheduled_learning_rate(make_llama: Any, make_training_batch: Any) -> None:
    config = LearnerConfig(lr=1e-2, schedule="linear", warmup_steps=2)
    trainer = Trainer(make_llama(), None, config, LossConfig(), 6, 1.0, OneRank())
    rates = [trainer.apply(make_training_batch(step, groups=1), step)["lr"] for step in range(6)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_a_gradient_that_is_not_finite_is_never_applied(make_llama: Any, make_training_batch: Any) -> None:
    """Whatever is done about it, the weights must stay finite or the step must raise: NaN weights would be published silently."""
    batch = make_training_batch()
    sequences = [sequence._replace(behaviour=sequence.behaviour - 60, advantage=-1.0) for sequence in batch.sequences]
    trainer = Trainer(make_llama(), None, LearnerConfig(lr=1e-2), LossConfig(ratio="sequence"), 10, 1.0, OneRank())
    raised = False
    try:
        trainer.apply(batch._replace(sequences=sequences), 0)
    except Exception:
        raised = True
    assert raised or bool(flat_weights(trainer).isfinite().all())
