"""From delivered groups to microbatches of tensors, the same on every rank.

Sequences of like length run together, so little is padded, and what is padded has no weight.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from learner.advantage import advantages
from protocol.config import LossConfig
from protocol.errors import StaleGroup
from protocol.groups import FULL, Group, decode_group
from protocol.ports import ReceivedBatch


class Sequence(NamedTuple):
    """One completion behind its prompt."""

    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    behaviour: NDArray[np.float32]
    advantage: float

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return self.prompt_ids.size + self.token_ids.size


class Batch(NamedTuple):
    """A batch on one rank: all sequences, the step of each group's oldest version, and facts about the batch for the metrics."""

    number: int
    sequences: list[Sequence]
    tickets: list[int]
    oldest_steps: list[int]
    facts: dict[str, float]
    version_tokens: dict[int, int] = {}
    """How many of its tokens were sampled from the version of each step."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(sequence.token_ids.size for sequence in self.sequences)

    def lags(self, step: int, max_lag: int) -> list[int]:
        """Each group's lag at `step`. Raises StaleGroup if one is above the bound."""
        lags = [step - oldest for oldest in self.oldest_steps]
        for ticket, lag in zip(self.tickets, lags, strict=True):
            if not 0 <= lag <= max_lag:
                raise StaleGroup(ticket, step, lag, max_lag)
        return lags


def make_batch(received: ReceivedBatch, config: LossConfig) -> Batch:
    """Decode and check the groups again, and give every completion its advantage."""
    groups = [decode_group(payload) for payload in received.payloads]
    rewards = torch.from_numpy(np.stack([group.rewards for group in groups])).double()
    gains = advantages(rewards, config.advantage)
    sequences = [
        Sequence(group.prompt_ids, group.token_ids[part], group.logprobs[part], float(gain))
        for group, group_gains in zip(groups, gains, strict=True)
        for part, gain in zip(group.completions(), group_gains, strict=True)
    ]
    oldest = [_oldest_step(group, received.version_steps) for group in groups]
    sampled: Counter[int] = Counter()
    for group in groups:
        for number, count in zip(*np.unique(group.versions, return_counts=True), strict=True):
            sampled[received.version_steps[int(number)]] += int(count)
    return Batch(received.number, sequences, [group.ticket for group in groups], oldest, _facts(groups, rewards, gains), dict(sampled))


def _oldest_step(group: Group, version_steps: dict[int, int]) -> int:
    """The smallest step among the versions its tokens were sampled from."""
    return min(version_steps[int(number)] for number in np.unique(group.versions))


def _facts(groups: list[Group], rewards: torch.Tensor, gains: torch.Tensor) -> dict[str, float]:
    lengths = np.concatenate([group.num_tokens for group in groups])
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "zero_advantage_share": float((gains.abs().amax(dim=1) == 0).double().mean()),
        "completion_length": float(lengths.mean()),
        "full_budget_share": float(np.concatenate([group.finish == FULL for group in groups]).mean()),
        "num_mixed_version_groups": float(sum(group.oldest_version != group.newest_version for group in groups)),
    }


def plan_microbatches(lengths: list[int], tokens: int, rank: int, world_size: int) -> list[list[int]]:
    """Indices of the sequences of each microbatch of `rank`.

    All sequences in order of length are cut into runs of at most `tokens` tokens with padding; runs go to the ranks in turn, longest first,
    so ranks are loaded alike. Every sequence is in exactly one microbatch of one rank. Runs are no longer than a rank's fair share, so that
    no rank is idle while another has two.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fair = -(-len(order) // world_size)
    runs: list[list[int]] = []
    for index in order:
        longest = lengths[runs[-1][0]] if runs else 0
        if not runs or len(runs[-1]) >= fair or (len(runs[-1]) + 1) * longest > tokens:
            runs.append([])
        runs[-1].append(index)
    return runs[rank::world_size]


class Microbatch(NamedTuple):
    """Tensors of B sequences, padded on the right to L tokens; the last K >= longest completion positions are scored.

    `input_ids`, `attention_mask`: (B, L). `targets`, `mask`, `behaviour`: (B, K); position k of row i is token k of its completion, and
    `positions` (B, K) says where in the row its logits are. `num_tokens`, `advantages`: (B,).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    behaviour: torch.Tensor
    num_tokens: torch.Tensor
    advantages: torch.Tensor


def collate(sequences: list[Sequence], device: torch.device) -> Microbatch:
    """The tensors of one microbatch."""
    rows, length = len(sequences), max(sequence.length for sequence in sequences)
    longest = max(sequence.token_ids.size for sequence in sequences)
    input_ids, attention = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
    positions, targets = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.int64)
    mask, behaviour = np.zeros((rows, longest), np.float32), np.zeros((rows, longest), np.float32)
    for row, sequence in enumerate(sequences):
        begin, count = sequence.prompt_ids.size, sequence.token_ids.size
        input_ids[row, :begin], input_ids[row, begin : begin + count] = sequence.prompt_ids, sequence.token_ids
        attention[row, : begin + count] = 1
        positions[row, :count] = np.arange(begin - 1, begin - 1 + count)
        targets[row, :count], behaviour[row, :count], mask[row, :count] = sequence.token_ids, sequence.behaviour, 1
    return Microbatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention).to(device),
        positions=torch.from_numpy(positions).to(device),
        targets=torch.from_numpy(targets).to(device),
        mask=torch.from_numpy(mask).to(device),
        behaviour=torch.from_numpy(behaviour).to(device),
        num_tokens=torch.tensor([sequence.token_ids.size for sequence in sequences], device=device),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32, device=device),
    )
