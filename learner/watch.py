"""The learner's side of stability: measures what the monitor asks for, and carries what it decides.

Invariant: every rank holds the same monitor state, since all it is fed are sums over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file

from learner.batch import Batch
from learner.displacement import RECENT, Sketcher, Trace, num_buckets
from learner.ranks import Ranks
from learner.stability.monitor import BatchSeen, Monitor, Moved, Rollback, Signal, State
from learner.stability.rule import Calibration
from protocol.config import Config

STATE_NAME = "stability.json"
TRACE_NAME = "stability.safetensors"


class Watch:
    """Looks at every optimizer step of one run."""

    def __init__(
        self, config: Config, model: Any, step: int, calibration: Calibration | None, ranks: Ranks, rollbacks: Sequence[Rollback]
    ) -> None:
        """`model` has the weights of `step`."""
        self._config, self._pacing = config, config.pacing
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        num_published = 1 + (config.policy.lag_bound + self._pacing.sync_every) // self._pacing.sync_every
        num_weights = sum(parameter.numel() for parameter in parameters)
        sketcher = Sketcher(parameters, num_buckets(num_weights, RECENT + num_published), ranks)
        self._trace = Trace(sketcher, step, self._pacing.max_lag, self._pacing.sync_every)
        self._calibration, self._rollbacks = calibration, rollbacks
        self.monitor = Monitor(config, calibration, None, rollbacks)

    def step(
        self, step: int, batch: Batch, apply: Callable[[Callable[[float, dict[str, float]], float]], dict[str, float]]
    ) -> dict[str, float]:
        """Take an optimizer step by `apply`, which is given what has the last word on the learning rate; its metrics and ours together."""
        seen = self._see(step, batch)
        metrics = apply(lambda lr, found: self.monitor.govern(step, lr, seen, _signal(found)))
        moved = self._trace.advance()
        return metrics | self.monitor.moved(step, metrics["lr"], seen, _signal(metrics), Moved(*moved, self._trace.distances()))

    def _see(self, step: int, batch: Batch) -> BatchSeen:
        pacing = self._pacing
        last = min(pacing.last_use(batch.number), pacing.num_steps - 1)
        lag = last - min(batch.oldest_steps, default=last) + (1 if pacing.reuse > 1 else 0)
        distances = {at: self._trace.distance(at) for at in batch.version_tokens}
        total = sum(batch.version_tokens.values())
        known = [(tokens, distance) for at, tokens in batch.version_tokens.items() if (distance := distances[at]) is not None]
        drift = sum(tokens * distance for tokens, distance in known) / total if total and len(known) == len(distances) else None
        now = step - fmean(batch.oldest_steps or [step])
        length = fmean([sequence.token_ids.size for sequence in batch.sequences] or [0])
        return BatchSeen(step == pacing.first_use(batch.number), batch.facts["reward"], len(batch.sequences), lag, drift, now, length)

    # --- checkpoints

    def save(self, folder: Path) -> None:
        """Write what it takes to go on from this step."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self._trace.state().items()}, folder / TRACE_NAME)
        (folder / STATE_NAME).write_bytes(msgspec.json.encode(self.monitor.state))

    @property
    def num_bytes(self) -> int:
        """About what `save` writes."""
        return self._trace.num_bytes

    def load(self, folder: Path) -> bool:
        """Go on from a checkpoint of the present step; False if it has nothing about stability, being made by an earlier version."""
        if not (folder / STATE_NAME).exists():
            return False
        self._trace.load(load_file(folder / TRACE_NAME))
        state = msgspec.json.decode((folder / STATE_NAME).read_bytes(), type=State)
        state.is_collapse_told = False  # told again by each session: one that was stopped for it is not to train on without a word
        self.monitor = Monitor(self._config, self._calibration, state, self._rollbacks)
        return True


def _signal(metrics: dict[str, float]) -> Signal:
    return Signal(metrics["kl_behaviour"], metrics["effective_sample_size"])
