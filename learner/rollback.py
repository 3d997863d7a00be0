"""Going back: a run that collapsed goes on from its last good checkpoint with a lower learning rate.

Batches that were formed are history (docs/decisions/002): the learner is given them again, those that the collapsed policy sampled included.
Training on them would take the policy to where it was, and their rewards say nothing about it; so the steps before `until` are done again at a
learning rate of zero, and none of their batches counts as a collapse. The first new batch is sampled from the last good weights. For the same
reason a process that dies before it has gone back does so after its next start: the same batches show it the same collapse.

Invariant: what the learning rate was at a step follows from the rollbacks that its session went by. They are in a file beside the checkpoints,
which is written once nothing is left to be set aside; each session records them when it starts, as part of what its arithmetic depends on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from learner.damage import list_checkpoints, set_aside_after
from learner.stability.monitor import Rollback
from protocol.errors import CheckpointError, SlipstreamError

FILE: Final = "rollbacks.json"
MAX_ROLLBACKS: Final = 3
"""A run that collapses once more is stopped."""
SCALE: Final = 0.5
"""What the learning rate is multiplied by each time."""
RECORDED: Final = "rollbacks"
"""Their name in a session's environment."""


class RolledBack(SlipstreamError):
    """The learner is to be built again, from the checkpoint it has gone back to."""


def read_rollbacks(checkpoints: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. Raises CheckpointError if they are damaged."""
    path = checkpoints / FILE
    if not path.exists():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Rollback])
    except (OSError, msgspec.DecodeError) as error:
        fix = f"Put it back as the run's last session recorded it ({RECORDED!r} of its environment in the journal)."
        raise CheckpointError(f"{path} cannot be read: {error}. {fix}") from None


def write_rollbacks(checkpoints: Path, rollbacks: Sequence[Rollback]) -> None:
    """Let every learner that starts from these checkpoints go by `rollbacks`; on the disk when this returns."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = checkpoints / f".{FILE}.partial"
    with partial.open("wb") as file:
        file.write(msgspec.json.encode(rollbacks))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checkpoints / FILE)


def recorded_as(rollbacks: Sequence[Rollback]) -> dict[str, str]:
    """What a session's environment says of the rollbacks that it goes by."""
    return {RECORDED: msgspec.json.encode(rollbacks).decode()} if rollbacks else {}


def recorded_in(environment: Mapping[str, str]) -> list[Rollback]:
    """The rollbacks that a recorded session went by."""
    return msgspec.json.decode(environment.get(RECORDED, "[]"), type=list[Rollback])


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint; 0 for None, which is the policy itself."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def last_good_checkpoint(checkpoints: Path, good_step: int) -> Path | None:
    """The newest checkpoint from up to `good_step`; None if only the policy itself is that old."""
    return next((path for path in reversed(list_checkpoints(checkpoints)) if step_of(path) <= good_step), None)


def next_rollback(known: Sequence[Rollback], start: int, until: int, level: float) -> Rollback | None:
    """The rollback to the checkpoint of step `start` from a batch that was to be used before `until`; None after MAX_ROLLBACKS."""
    if len(known) >= MAX_ROLLBACKS:
        return None
    # Six digits, as the text that records all of them has little room.
    return Rollback(start, until, (known[-1].lr_scale if known else 1.0) * SCALE, float(f"{level:.6g}"))


def roll_back(checkpoints: Path, rollbacks: Sequence[Rollback], say: Callable[[str], None]) -> None:
    """Set aside every checkpoint after the start of the last of `rollbacks`, and go by them from now on. For rank 0.

    If this ends in between, the next learner starts from the newest checkpoint left, comes to the same collapse, and does it again.
    """
    set_aside_after(checkpoints, rollbacks[-1].start, "collapsed", say)
    write_rollbacks(checkpoints, rollbacks)
