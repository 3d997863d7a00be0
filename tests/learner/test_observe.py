"""Looking into a step: ratios before it, the applied update after it, against slow references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from learner.observe import UpdateMeter, importance_ratios
from learner.ranks import OneRank
from learner.step import Trainer
from protocol.config import LearnerConfig, LossConfig


@pytest.fixture
def make_trainer(make_llama: Callable[..., Any]) -> Callable[..., Trainer]:
    def make(lr: float = 1e-2) -> Trainer:
        return Trainer(make_llama(), None, LearnerConfig(lr=lr, warmup_steps=0), LossConfig(), 100, 1.0, OneRank())

    return make


@pytest.mark.parametrize(("temperature", "tokens_per_microbatch"), [(1.0, 8192), (0.7, 16)])
def test_importance_ratios_are_those_of_a_slow_reference_completion_by_completion(
    temperature: float, tokens_per_microbatch: int, make_trainer: Any, make_training_batch: Any, slow_logprobs: Any
) -> None:
    trainer, batch = make_trainer(), make_training_batch()
    found = importance_ratios(trainer, batch, tokens_per_microbatch, temperature)
    assert len(found) == len(batch.sequences)
    for ratios, sequence in zip(found, batch.sequences, strict=True):
        logprobs, _ = slow_logprobs(trainer.model, sequence.prompt_ids, sequence.token_ids, temperature)
        expected = [math.exp(float(ours.detach()) - float(theirs)) for ours, theirs in zip(logprobs, sequence.behaviour, strict=True)]
        np.testing.assert_allclose(ratios, expected, rtol=1e-3)


def test_looking_at_a_batch_changes_nothing(make_trainer: Any, make_training_batch: Any) -> None:
    looked, other = make_trainer(), make_trainer()
    batch = make_training_batch()
    importance_ratios(looked, batch, 64, 1.0)
    meter = UpdateMeter(looked.model)
    ours, theirs = looked.apply(batch, 0), other.apply(batch, 0)
    meter.measure()
    assert ours == theirs
    for mine, its in zip(looked.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_norm_and_the_cosine_of_updates_are_those_of_a_slow_reference(make_trainer: Any, make_training_batch: Any) -> None:
    trainer = make_trainer()
    meter, before, last = UpdateMeter(trainer.model), flat(trainer.model), None
    for step in range(3):
        trainer.apply(make_training_batch(step), step)
        after = flat(trainer.model)
        update, found = after - before, meter.measure()
        assert found.norm == pytest.approx(float(np.sqrt(np.sum(update**2))), rel=1e-5)
        if last is None:
            assert found.cosine is None
        else:
            expected = float(np.sum(update * last) / (np.sqrt(np.sum(update**2)) * np.sqrt(np.sum(last**2))))
            assert found.cosine == pytest.approx(expected, abs=1e-5)
        before, last = after, update


def test_an_update_of_zero_has_no_cosine_and_neither_has_the_next(make_trainer: Any, make_training_batch: Any) -> None:
    trainer = make_trainer()
    meter = UpdateMeter(trainer.model)
    assert (meter.measure().norm, meter.measure().cosine) == (0.0, None)
    trainer.apply(make_training_batch(), 0)
    found = meter.measure()
    assert found.norm > 0 and found.cosine is None


def flat(model: Any) -> np.ndarray:
    """All parameters that are trained, float64; tied ones once."""
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters() if p.requires_grad])
