"""Room on the broker's disk: two marks, and what is done without below each. Pure.

Invariant: below the first mark no tickets are issued, and what is out already still fits; below the second nothing is journalled, so that a
commit does not run into a full disk. The first lies above the second, and above the second the largest group still fits.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from protocol.config import Config
from protocol.groups import MAX_GROUP_BYTES

MIB: Final = 1 << 20
COPIES: Final = 3
"""A payload is written to the write-ahead log and from there to the database; the third is a margin."""
TOKEN_BYTES: Final = 12
"""Of a group's payload: a token's id, log-probability and version."""
COMPLETION_BYTES: Final = 9
"""Of a group's payload: a completion's length, reward and finish."""
ENVELOPE_BYTES: Final = 64 << 10
"""Of a group's payload: the prompt and the names."""
COMMIT_MARGIN: Final = 16 * MIB
"""The write-ahead log grows to about this size, and between two looks at the disk much less is taken."""
CREDIT_MARGIN: Final = 64 * MIB


class Reserves(Struct, frozen=True):
    """Bytes that must be free for tickets to be issued (`credit`), and for anything to be journalled (`commit`)."""

    credit: int
    commit: int


def reserves(config: Config, policy_bytes: int) -> Reserves:
    """The marks of a run whose policy's files have `policy_bytes`: they follow from the configuration alone.

    Once credit has stopped there may still come: a group for every ticket that can be out, a snapshot, and deltas.
    """
    group = largest_group(config)
    commit = COMMIT_MARGIN + COPIES * group
    return Reserves(commit + COPIES * group * config.pacing.run_ahead + 2 * policy_bytes + CREDIT_MARGIN - COMMIT_MARGIN, commit)


def largest_group(config: Config) -> int:
    """The most bytes that a group's payload can have: every completion uses its whole budget."""
    completion = COMPLETION_BYTES + TOKEN_BYTES * config.rollout.max_tokens
    return min(MAX_GROUP_BYTES, ENVELOPE_BYTES + completion * config.rollout.group_size)


class Room(Struct, frozen=True):
    """Bytes free on the broker's disk when it was looked at last, and what that allows."""

    free: int
    reserves: Reserves
    allows_credit: bool = True
    allows_commits: bool = True

    def measured(self, free: int) -> Room:
        """The same disk with `free` bytes. What has stopped goes on only at an eighth above its mark, or it would flutter there."""
        allows_commits = free >= _needed(self.reserves.commit, self.allows_commits)
        allows_credit = allows_commits and free >= _needed(self.reserves.credit, self.allows_credit)
        return replace(self, free=max(0, free), allows_credit=allows_credit, allows_commits=allows_commits)

    def allows_same(self, other: Room) -> bool:
        """Whether the same things go on as with `other`."""
        return (self.allows_credit, self.allows_commits) == (other.allows_credit, other.allows_commits)

    @property
    def shortage(self) -> str:
        """What does not go on for want of room, and what to do; empty if everything goes on."""
        if self.allows_credit:
            return ""
        mark, purpose = (self.reserves.credit, "to issue tickets") if self.allows_commits else (self.reserves.commit, "to journal anything")
        return (
            f"no room on the broker's disk: {self.free // MIB} MiB free, {-(-_needed(mark, False) // MIB)} MiB needed {purpose}; "
            "free space on the disk of the run's directory, it goes on by itself"
        )


PLENTY: Final = Room(1 << 62, Reserves(0, 0))
"""Before anybody has looked."""


def _needed(mark: int, goes_on: bool) -> int:
    return mark if goes_on else mark + mark // 8
