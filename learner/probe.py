"""The gradient of the surrogate at given weights on given groups, with nothing applied; and what rounds of such gradients have in common.

Gradients are flat tensors, float32 (P,), over the parameters that are trained. They are those of the objective itself: not scaled down to
learner.max_grad_norm, not passed through an optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from learner.batch import Batch, collate, plan_microbatches
from learner.model import completion_logprobs
from learner.objective import TokenBatch, objective, token_weights
from learner.stability.bias import RoundProducts
from protocol.config import Config

_CHUNK = 1 << 24
"""Elements that are turned to float64 at a time."""


def surrogate_gradient(model: Any, reference: Any | None, batch: Batch, config: Config) -> torch.Tensor:
    """The gradient (P,) of J (learner.objective) over a batch at the model's present weights (paper Eq. 4).

    Ratios and clipping are against the groups' own log-probabilities, or with an importance cap against the model's, as at a batch's first use.
    `reference` is given with a KL coefficient.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, temperature, loss = parameters[0].device, config.rollout.temperature, config.loss
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
    for indices in plan_microbatches([sequence.length for sequence in batch.sequences], config.learner.tokens_per_microbatch, 0, 1):
        micro = collate([batch.sequences[index] for index in indices], device)
        weights = token_weights(micro.num_tokens, micro.mask.shape[1], loss.aggregate, len(batch.sequences), batch.num_tokens)
        logprobs, _ = completion_logprobs(model, micro, temperature)
        known = None
        if reference is not None:
            with torch.no_grad():
                known, _ = completion_logprobs(reference, micro, temperature)
        proximal = logprobs.detach() if loss.importance_cap is not None else None
        value = objective(logprobs, TokenBatch(micro.mask, micro.behaviour, micro.advantages, weights, proximal, known), loss).value
        parts = torch.autograd.grad(value, parameters, allow_unused=True)
        total += torch.cat([
            torch.zeros_like(parameter).flatten() if part is None else part.flatten()
            for parameter, part in zip(parameters, parts, strict=True)
        ])  # fmt: skip
    return total


def round_products(fresh: Sequence[torch.Tensor], stale: Sequence[torch.Tensor]) -> RoundProducts:
    """The products of each round's gradient on fresh groups and its difference to the one on stale groups."""
    bias = [theirs - ours for ours, theirs in zip(fresh, stale, strict=True)]
    return RoundProducts(*([[_dot(a, b) for b in right] for a in left] for left, right in ((bias, bias), (bias, fresh), (fresh, fresh))))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """In float64: products of different rounds are small against their noise."""
    total = 0.0
    for x, y in zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True):
        total += float(torch.dot(x.double(), y.double()))
    return total
