from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from protocol.errors import TaskError
from tasks.base import Problem
from tasks.scoring import score


class Rewarding:
    """A task that returns, or raises, what it was given as the reward."""

    num_train = 1
    num_heldout = 1

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def train(self, index: int) -> Problem:
        return Problem(index=index, prompt="what is it?", answer="it")

    heldout = train

    def solution(self, problem: Problem) -> str:
        return problem.answer

    def reward(self, problem: Problem, completion: str) -> float:
        if isinstance(self._reward, BaseException):
            raise self._reward
        result: float = self._reward
        return result


_PROBLEM = Problem(index=42, prompt="what is it?", answer="it")


@pytest.mark.parametrize("reward", [1, True, 1.0, np.float32(1.0), np.array(1.0), Decimal(1)])
def test_any_finite_number_becomes_a_float(reward: Any) -> None:
    result = score(Rewarding(reward), _PROBLEM, "it")
    assert type(result) is float
    assert result == 1.0


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, np.float64("nan"), None, "1.0", b"1", [1.0], {}])
def test_what_is_not_a_finite_number_is_refused_by_value(reward: Any) -> None:
    with pytest.raises(TaskError) as caught:
        score(Rewarding(reward), _PROBLEM, "it")
    assert repr(reward) in str(caught.value)
    assert "Return a finite number" in str(caught.value)


@pytest.mark.parametrize("reward", [np.array([1.0, 2.0]), 10**400])
def test_what_cannot_be_converted_to_a_float_is_refused(reward: Any) -> None:
    with pytest.raises(TaskError):
        score(Rewarding(reward), _PROBLEM, "it")


def test_a_reward_that_raises_names_task_problem_and_completion_and_keeps_the_cause() -> None:
    cause = ZeroDivisionError("by zero")
    with pytest.raises(TaskError) as caught:
        score(Rewarding(cause), _PROBLEM, "a completion")
    assert caught.value.__cause__ is cause
    for part in ("Rewarding", "problem 42", "what is it?", "a completion", "ZeroDivisionError", "by zero"):
        assert part in str(caught.value)


def test_a_long_completion_is_shortened_in_the_message() -> None:
    with pytest.raises(TaskError) as caught:
        score(Rewarding(None), _PROBLEM, "x" * 100_000)
    assert "(100000 characters)" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        score(Rewarding(KeyboardInterrupt()), _PROBLEM, "it")
