"""One run of a sweep, as the experiments of the paper look at it: what was set, what each optimizer step measured, and what became of it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Pipeline = Literal["cycles", "queue"]
"""cycles: one batch is used for S steps, then actors get new weights (paper, section 3.1). queue: a fresh batch each step that is S versions old."""
Outcome = Literal["stable", "collapsed"]


class StepRow(Struct, frozen=True, array_like=True):
    """What one optimizer step measured; None where there is nothing to measure, as for the cosine of the very first update."""

    step: int
    reward: float | None
    lr: float
    lag: float
    """Mean over the batch's groups."""
    is_first_use: bool
    """Whether this step is the first on its batch."""
    cosine: float | None
    """Of this applied update with the one before (Grad CosSim); with the same batch as before unless `is_first_use`."""
    g_upd: float | None
    """Norm of the applied update over the learning rate."""
    drift: float | None
    """Of the weights from those that sampled the batch, before the update; mean over its tokens."""
    displacement: float | None
    """Of the weights from the run's first, after the update."""
    clip_fraction: float | None
    effective_sample_size: float | None
    kl_behaviour: float | None
    entropy: float | None
    completion_length: float | None = None
    """Mean over the batch's completions, in tokens."""


class Cell(Struct, frozen=True):
    """A finished run of a sweep. `horizon` is the number of optimizer steps it was to take; a collapsed run may have been ended before."""

    name: str
    pipeline: Pipeline
    surrogate: str
    max_lag: int
    """S: of the cycles pipeline the number of uses of a batch, of the queue pipeline the lag in versions."""
    lr: float
    seed: int
    horizon: int
    governor: str
    """off, warn, hold, or sqrt-ess; rollback or by hand of a run whose learning rate was changed on the way by that."""
    rows: list[StepRow]
    validation: list[tuple[int, float]]
    """Step and mean held-out reward."""
    outcome: Outcome
    collapse_step: int | None = None
    """The optimizer step from which on the reward is zero and stays there."""
    warning_step: int | None = None
    """The first step at which the run itself warned of a collapse."""
    num_completions: int = 1
    """A batch has so many."""

    @property
    def collapse_sync(self) -> int | None:
        """M_collapse: the index of the weight sync at which the reward first was zero (paper, Table 2); t = M S by (11)."""
        return None if self.collapse_step is None else self.collapse_step // max(1, self.max_lag)
