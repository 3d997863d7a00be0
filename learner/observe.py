"""Looking into single optimizer steps: who is told of them, and importance ratios before. No collectives, so one rank may look alone."""

from __future__ import annotations

from typing import Protocol

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

    def after(self, step: int, metrics: dict[str, float]) -> None:
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
