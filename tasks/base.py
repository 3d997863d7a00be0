"""What a task is: problems in two disjoint splits, and a reward that can be computed from text alone."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One prompt and what is needed to score an answer to it.

    `index` is the position in the problem's split, `prompt` the user's turn as plain text, `answer` the reference
    answer as text, and `extra` whatever else the task's own scorer needs.
    """

    index: int
    prompt: str
    answer: str
    extra: dict[str, Any] = {}


class Task(Protocol):
    """Prompts with a verifiable reward, in two disjoint splits.

    The same options give the same problems in the same order on every machine, so an index is enough to name one.
    """

    @property
    def num_train(self) -> int:
        """Problems that may be trained on."""
        ...

    @property
    def num_heldout(self) -> int:
        """Problems that are only ever evaluated on."""
        ...

    def train(self, index: int) -> Problem:
        """Training problem `index`; IndexError unless 0 <= index < num_train."""
        ...

    def heldout(self, index: int) -> Problem:
        """Held-out problem `index`; IndexError unless 0 <= index < num_heldout."""
        ...

    def solution(self, problem: Problem) -> str:
        """A completion that solves `problem`, for supervised training; TaskError if the task has none."""
        ...

    def reward(self, problem: Problem, completion: str) -> float:
        """How good `completion` is; call it through `tasks.scoring.score`, which checks the result."""
        ...


def check_index(index: int, num_problems: int, split: str) -> None:
    """Raise IndexError unless 0 <= index < num_problems; negative indexes never count from the end."""
    if not 0 <= index < num_problems:
        raise IndexError(f"there is no {split} problem {index}: the split has problems 0..{num_problems - 1}")
