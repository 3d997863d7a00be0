"""One optimizer step on one batch, over all ranks.

Invariant: every rank ends a step with the same weights and optimizer state, because all apply the same summed gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from learner.batch import Batch, Microbatch, Sequence, collate, plan_microbatches
from learner.model import completion_logprobs
from learner.objective import STATISTICS, TokenBatch, objective, token_weights
from learner.ranks import Ranks
from learner.stability.quantiles import EDGES, ratio_quantiles
from protocol.config import LearnerConfig, LossConfig
from protocol.errors import RunHalted

Govern = Callable[[float, dict[str, float]], float]
"""From the learning rate of the schedule and the step's metrics before the update to the learning rate that is used."""
MAX_SKIPPED = 5
"""Steps in a row whose gradient may be not finite."""


def learning_rate(config: LearnerConfig, step: int, num_steps: int) -> float:
    """The learning rate of the step that turns theta_step into theta_{step+1}: linear warm-up, then the schedule down to zero at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr


class Trainer:
    """Model, optimizer and objective of one rank."""

    def __init__(
        self,
        model: Any,
        reference: Any | None,
        learner: LearnerConfig,
        loss: LossConfig,
        num_steps: int,
        temperature: float,
        ranks: Ranks,
    ) -> None:
        self.model, self._reference = model, reference
        self._config, self._loss, self._num_steps, self._temperature = learner, loss, num_steps, temperature
        self._ranks = ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self._parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=learner.lr,
            betas=(learner.beta1, learner.beta2),
            eps=learner.eps,
            weight_decay=learner.weight_decay,
        )
        self._num_skipped = 0
        self._prepared: tuple[int, list[tuple[Microbatch, TokenBatch]]] | None = None

    def apply(self, batch: Batch, step: int, govern: Govern = lambda lr, _: lr) -> dict[str, float]:
        """Turn theta_step into theta_{step+1} with `batch`; returns the step's metrics, the same on every rank.

        `govern` has the last word on the learning rate; it must decide alike on every rank. At zero the optimizer's moments stay as they are, too.
        """
        microbatches = self._microbatches(batch)
        self.optimizer.zero_grad(set_to_none=True)
        names = (*STATISTICS, "objective", "entropy")
        totals = torch.zeros(len(names) + len(EDGES) + 1, dtype=torch.float64, device=self.device)
        for micro, tokens in microbatches:
            logprobs, entropy = completion_logprobs(self.model, micro, self._temperature)
            result = objective(logprobs, tokens, self._loss)
            (-result.value).backward()  # type: ignore[no-untyped-call]
            sums = torch.stack([*(result.statistics[name] for name in STATISTICS), result.value.detach().double(), entropy.double()])
            totals += torch.cat([sums, result.ratio_counts.double()])
        self._ranks.sum_(totals)
        found = totals.tolist()
        metrics = _metrics(dict(zip(names, found, strict=False))) | ratio_quantiles(found[len(names) :])
        metrics["grad_norm"] = self._sum_gradients()
        metrics["lr"] = govern(learning_rate(self._config, step, self._num_steps), metrics)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        if metrics["lr"] > 0:
            self._update(metrics["grad_norm"])
        return metrics | {"update_skipped": float(self._num_skipped > 0)}

    def _update(self, grad_norm: float) -> None:
        """Apply the summed gradient, unless it is not finite; every rank decides alike. Raises RunHalted when that does not pass."""
        if math.isfinite(grad_norm):
            self._num_skipped = 0
            self.optimizer.step()
            return
        self._num_skipped += 1
        if self._num_skipped >= MAX_SKIPPED:
            raise RunHalted(f"the gradient was not finite in {MAX_SKIPPED} steps in a row; lower learner.lr or the clip range")

    def _microbatches(self, batch: Batch) -> list[tuple[Microbatch, TokenBatch]]:
        """This rank's share of the batch; kept while the same batch is reused, so that proximal log-probabilities stay those of its first use."""
        if self._prepared is None or self._prepared[0] != batch.number:
            lengths = [sequence.length for sequence in batch.sequences]
            plan = plan_microbatches(lengths, self._config.tokens_per_microbatch, self._ranks.rank, self._ranks.world_size)
            self._prepared = (batch.number, [self._prepare(batch, [batch.sequences[i] for i in indices]) for indices in plan])
        return self._prepared[1]

    @torch.no_grad()
    def _prepare(self, batch: Batch, sequences: list[Sequence]) -> tuple[Microbatch, TokenBatch]:
        micro = collate(sequences, self.device)
        weights = token_weights(micro.num_tokens, micro.mask.shape[1], self._loss.aggregate, len(batch.sequences), batch.num_tokens)
        proximal = reference = None
        if self._loss.importance_cap is not None:
            proximal, _ = completion_logprobs(self.model, micro, self._temperature)
        if self._reference is not None:
            reference, _ = completion_logprobs(self._reference, micro, self._temperature)
        return micro, TokenBatch(micro.mask, micro.behaviour, micro.advantages, weights, proximal, reference)

    def _sum_gradients(self) -> float:
        """Sum gradients over the ranks in one flat buffer and clip their norm; returns the norm before clipping, not finite if any part is not."""
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self._parameters])
        self._ranks.sum_(flat)
        norm = float(flat.norm())
        if norm > self._config.max_grad_norm:
            flat *= self._config.max_grad_norm / norm
        begin = 0
        for parameter in self._parameters:
            end = begin + parameter.numel()
            parameter.grad = flat[begin:end].view_as(parameter)
            begin = end
        return norm


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over tokens. The effective sample size is that of the importance ratios, as a share of the tokens: (sum rho)^2 / (n sum rho^2)."""
    count = max(sums["num_tokens"], 1.0)
    return {
        "objective": sums["objective"],
        "entropy": sums["entropy"] / count,
        "num_tokens": sums["num_tokens"],
        "clip_fraction": sums["num_clipped"] / count,
        "ratio": sums["ratio"] / count,
        "effective_sample_size": sums["ratio"] ** 2 / max(count * sums["ratio_squared"], 1e-30),
        "kl_behaviour": sums["kl_behaviour"] / count,
        "kl_reference": sums["kl_reference"] / count,
        "importance_weight": sums["importance_weight"] / count,
        "truncated_share": sums["num_truncated"] / count,
    }
