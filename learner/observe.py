"""Looking into single optimizer steps: importance ratios before, the applied update after. No collectives, so one rank may look alone."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from learner.batch import Batch, collate, plan_microbatches
from learner.model import completion_logprobs
from learner.step import Trainer


class StepObserver(Protocol):
    """Is told of every optimizer step."""

    def before(self, step: int, batch: Batch, trainer: Trainer) -> None:
        """The step that turns theta_step into theta_{step+1} is about to be taken."""

    def after(self, step: int, metrics: dict[str, float], trainer: Trainer) -> None:
        """It was taken."""


@torch.no_grad()
def importance_ratios(trainer: Trainer, batch: Batch, tokens_per_microbatch: int, temperature: float) -> list[NDArray[np.float32]]:
    """For each completion of the batch, pi_theta / mu of its tokens at the trainer's present weights; float32 (T_i,)."""
    found: list[NDArray[np.float32] | None] = [None] * len(batch.sequences)
    for indices in plan_microbatches([sequence.length for sequence in batch.sequences], tokens_per_microbatch, 0, 1):
        micro = collate([batch.sequences[index] for index in indices], trainer.device)
        logprobs, _ = completion_logprobs(trainer.model, micro, temperature)
        ratios = torch.exp(logprobs.float() - micro.behaviour).cpu().numpy()
        for row, index in enumerate(indices):
            found[index] = ratios[row, : batch.sequences[index].token_ids.size]
    return [ratios for ratios in found if ratios is not None]


class Update(NamedTuple):
    """An applied update: its Euclidean norm, and its cosine with the one before (None for the first, or where one of them is zero)."""

    norm: float
    cosine: float | None


class UpdateMeter:
    """Measures the updates that are applied to a model. Holds two copies of its weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._weights = self._flat()
        self._update: torch.Tensor | None = None

    def measure(self) -> Update:
        """The update since the last call."""
        weights = self._flat()
        update, before = weights - self._weights, self._update
        self._weights, self._update = weights, update
        norm = float(update.norm())
        if before is None or norm == 0 or float(before.norm()) == 0:
            return Update(norm, None)
        return Update(norm, float(torch.dot(update, before) / (update.norm() * before.norm())))

    def _flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().float() for parameter in self._model.parameters() if parameter.requires_grad])
