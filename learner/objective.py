"""The GRPO objective. Pure functions of tensors; each formula has a slow reference in tests/learner.

Notation, for completion i of T_i tokens: lp and b are the log-probabilities of its tokens under theta and under the behaviour policy, A_i its
advantage, w_it the weights of `token_weights` (they sum to one over the whole batch of all ranks). The objective, to be made large, is

    J = sum_it w_it [ c_it * s(rho_it, A_i) - beta * k_it ]

    rho_it = exp(lp_it - b_it), or for sequence ratios exp(sum_t (lp_it - b_it)) for every t                   (paper Eq. 2)
    s      = clip(rho, 1 - low, 1 + high) * A                       surrogate "clip", paper Eq. 3
           = min(rho * A, clip(rho, 1 - low, 1 + high) * A)         surrogate "min-clip"
    k_it   = exp(r_it - lp_it) - (r_it - lp_it) - 1                 r: reference log-probabilities
    c_it   = 1, or with an importance cap: rho is taken against p, the learner's own log-probabilities at the batch's first use, and
             c_it = min(exp(p_it - b_it), cap), of which no gradient is taken
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from learner.stability.quantiles import EDGES
from protocol.config import LossConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are capped here (a ratio of 5e8), beyond any clip range: a long completion's product would overflow, and 0 * inf is no gradient."""


class TokenBatch(NamedTuple):
    """Per-token tensors of shape (completions, longest); `mask` is 1 on sampled tokens and 0 on padding.

    `proximal` is given with an importance cap, `reference` with a KL coefficient. `advantages` is (completions,).
    """

    mask: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    proximal: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Objective(NamedTuple):
    """The value of J over the given completions, and what to watch, as sums over tokens or completions (see `STATISTICS`)."""

    value: torch.Tensor
    statistics: dict[str, torch.Tensor]
    ratio_counts: torch.Tensor
    """How many tokens have their log-ratio in each bin of stability.quantiles; int64 (len(EDGES) + 1,)."""


STATISTICS = (
    "num_tokens",
    "num_clipped",
    "ratio",
    "ratio_squared",
    "kl_behaviour",
    "kl_reference",
    "importance_weight",
    "num_truncated",
)
"""Sums over tokens; divide by num_tokens. kl_behaviour is exp(d) - d - 1 with d = lp - b, an estimate of KL(behaviour || theta)."""


def token_weights(num_tokens: torch.Tensor, longest: int, aggregate: str, all_completions: int, all_tokens: int) -> torch.Tensor:
    """w (completions, longest) for completions of `num_tokens` (completions,) tokens out of a batch of `all_completions` and `all_tokens`.

    "sequence": 1 / (N T_i), every completion counts the same. "token": 1 / sum_i T_i, every token counts the same.
    """
    inside = torch.arange(longest, device=num_tokens.device)[None, :] < num_tokens[:, None]
    each = 1.0 / (all_completions * num_tokens.float()) if aggregate == "sequence" else torch.full_like(num_tokens.float(), 1 / all_tokens)
    return inside * each[:, None]


def objective(logprobs: torch.Tensor, batch: TokenBatch, config: LossConfig) -> Objective:
    """J over a microbatch; see the module. `logprobs` (completions, longest) carries the gradient; padding does not matter."""
    mask = batch.mask
    start = batch.behaviour if batch.proximal is None else batch.proximal
    log_ratio = torch.where(mask > 0, logprobs - start, torch.zeros_like(logprobs))
    ratio = _spread(log_ratio, mask, config).clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = batch.advantages[:, None]
    surrogate = clipped * gain
    is_clipped = clipped != ratio
    if config.surrogate == "min-clip":
        is_clipped = is_clipped & (surrogate < ratio * gain)
        surrogate = torch.minimum(ratio * gain, surrogate)
    importance = _importance(batch, config)
    per_token = importance * surrogate
    kl_reference = torch.zeros_like(logprobs)
    if batch.reference is not None:
        difference = torch.where(mask > 0, batch.reference - logprobs, torch.zeros_like(logprobs))
        kl_reference = difference.exp() - difference - 1
        per_token = per_token - config.kl_coef * kl_reference
    value = (batch.weights * per_token).sum()
    with torch.no_grad():
        drift = torch.where(mask > 0, logprobs - batch.behaviour, torch.zeros_like(logprobs))
        sums = {
            "num_tokens": mask,
            "num_clipped": is_clipped * mask,
            "ratio": ratio * mask,
            "ratio_squared": ratio.square() * mask,
            "kl_behaviour": (drift.exp() - drift - 1) * mask,
            "kl_reference": kl_reference * mask,
            "importance_weight": importance * mask,
            "num_truncated": (importance == config.importance_cap) * mask if config.importance_cap else torch.zeros_like(mask),
        }
        counts = _count_ratios(_spread(log_ratio, mask, config)[mask > 0])
    return Objective(value, {name: sums[name].detach().double().sum() for name in STATISTICS}, counts)


def _count_ratios(log_ratios: torch.Tensor) -> torch.Tensor:
    """A number that is not one counts as the largest."""
    edges = torch.tensor(EDGES, dtype=torch.float32, device=log_ratios.device)
    return torch.bincount(torch.bucketize(log_ratios.float(), edges), minlength=len(EDGES) + 1)


def _importance(batch: TokenBatch, config: LossConfig) -> torch.Tensor:
    """c, without gradient."""
    if batch.proximal is None or config.importance_cap is None:
        return torch.ones_like(batch.mask)
    mismatch = torch.where(batch.mask > 0, batch.proximal - batch.behaviour, torch.zeros_like(batch.behaviour))
    return _spread(mismatch, batch.mask, config).exp().clamp(max=config.importance_cap).detach()


def _spread(log_ratio: torch.Tensor, mask: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Token log-ratios as they are, or each completion's sum at all of its tokens."""
    if config.ratio == "token":
        return log_ratio
    return log_ratio.sum(dim=1, keepdim=True) * mask
