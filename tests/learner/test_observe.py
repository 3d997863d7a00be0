"""Looking into a step: ratios before it, against a slow reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from learner.observe import importance_ratios
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
    ours, theirs = looked.apply(batch, 0), other.apply(batch, 0)
    assert ours == theirs
    for mine, its in zip(looked.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, its)
