"""Calling a task's reward, which may be a user's code, and refusing what is not a finite number."""

from __future__ import annotations

from typing import SupportsFloat

from protocol.errors import TaskError
from tasks.base import Problem, Task

_SHOWN_CHARACTERS = 120
LARGEST = 3.4e38
"""Rewards travel as float32."""


def fetch_problem(task: Task, index: int) -> Problem:
    """Training problem `index`. TaskError, naming the task and the index, if making it raises (the cause is chained)."""
    try:
        return task.train(index)
    except Exception as error:  # a task is user code and may raise anything; the cause is chained, not lost
        raise TaskError(f"task {type(task).__name__}: training problem {index} raised {type(error).__name__}: {error}") from error


def score(task: Task, problem: Problem, completion: str) -> float:
    """The reward of `completion` as a finite float.

    TaskError, naming the task, the problem and the completion, if the reward raises (the cause is chained), or
    returns something that is not a finite number.
    """
    try:
        reward: object = task.reward(problem, completion)
        # A string is refused although float("1.0") would take it: a reward that is text is a mistake.
        value = float(reward) if isinstance(reward, SupportsFloat) else None
    except Exception as error:  # a reward is user code and may raise anything; the cause is chained, not lost
        raise TaskError(f"{_where(task, problem, completion)} raised {type(error).__name__}: {error}") from error
    if value is None or not abs(value) <= LARGEST:
        raise TaskError(f"{_where(task, problem, completion)} is {reward!r}. Return a finite number.")
    return value


def _where(task: Task, problem: Problem, completion: str) -> str:
    return (
        f"task {type(task).__name__}: the reward of completion {_shortened(completion)} "
        f"to problem {problem.index} ({_shortened(problem.prompt)})"
    )


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:_SHOWN_CHARACTERS]!r}... ({len(text)} characters)"
