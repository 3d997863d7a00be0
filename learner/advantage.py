"""Advantages of the completions of a group. Pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch

EPSILON = 1e-6
"""For z-score: groups whose rewards spread less than this carry no signal and get advantages of zero."""


def advantages(rewards: torch.Tensor, kind: Literal["z-score", "mean", "leave-one-out"]) -> torch.Tensor:
    """Advantages (groups, G) from rewards (groups, G), G >= 2.

    z-score: (r - mean) / std with the population standard deviation (paper Eq. 1); mean: r - mean (Dr. GRPO); leave-one-out: r minus the
    mean of the others (RLOO), which is the mean kind times G / (G - 1).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "mean":
        return centred
    if kind == "leave-one-out":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(std > EPSILON, centred / std.clamp(min=EPSILON), torch.zeros_like(centred))
