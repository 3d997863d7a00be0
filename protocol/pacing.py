"""Pacing: which ticket may be sampled from which version. Pure arithmetic; the proof is in docs/staleness.md.

Invariant: if every ticket of batch b is issued only to actors whose version was taken at a step v with b*R + R - 1 - v <= S, then
no optimizer step uses a group whose lag exceeds S.
"""

from __future__ import annotations

import math

import msgspec


class Pacing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers that fix the pipeline.

    `max_lag` is S, `reuse` is R (optimizer steps per batch), `sync_every` optimizer steps lie between publications,
    `groups_per_batch` is P, `num_steps` the length of the run in optimizer steps, `window` how many batches may complete out of order.
    """

    max_lag: int
    reuse: int
    sync_every: int
    groups_per_batch: int
    num_steps: int
    window: int = 1

    @property
    def num_batches(self) -> int:
        """Batches in the whole run; the last one may be used for fewer than R steps."""
        return math.ceil(self.num_steps / self.reuse)

    def batch_of_step(self, step: int) -> int:
        """The batch that the step turning theta_t into theta_{t+1} uses, t = `step`."""
        return step // self.reuse

    def first_use(self, batch: int) -> int:
        """The first step that uses `batch`."""
        return batch * self.reuse

    def last_use(self, batch: int) -> int:
        """The last step that uses `batch`."""
        return batch * self.reuse + self.reuse - 1

    def oldest_step(self, batch: int) -> int:
        """The smallest v such that a group of `batch` sampled at step v never has a lag above S."""
        return self.last_use(batch) - self.max_lag

    def publishes(self, step: int) -> bool:
        """Whether theta_`step` is published."""
        return step % self.sync_every == 0

    @property
    def run_ahead(self) -> int:
        """Upper bound on the number of groups that can be issued and not yet delivered.

        At learner step t the newest version has step v <= t, so a batch with b*R + R - 1 - v <= S has b <= (t + S - R + 1) / R;
        at least the batch being formed counts, and a window adds what may wait for a straggler.
        """
        ahead = max(0, (self.max_lag - self.reuse + 1) // self.reuse)
        return (1 + ahead + self.window) * self.groups_per_batch


def smallest_max_lag(reuse: int, sync_every: int) -> int:
    """The smallest S at which the learner never waits for a version that it has not published yet.

    Batch b is first used at step b*R. The newest version then has step b*R - (b*R mod sync_every), and b*R mod sync_every takes every
    multiple of gcd(R, sync_every) below sync_every. The batch is last used R - 1 steps later. Hence R - 1 + sync_every - gcd.

    Examples: (1, 1) -> 0, synchronous; (8, 8) -> 7, the paper's cycle; (1, 4) -> 3.
    """
    return reuse - 1 + sync_every - math.gcd(reuse, sync_every)
