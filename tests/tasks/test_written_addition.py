"""The example task with its working written out: what it teaches is right, and only the sum is rewarded."""

from __future__ import annotations

import pytest

from examples.written_addition import WrittenAddition
from protocol.errors import ConfigError
from tasks.base import Problem

TASK = WrittenAddition(digits=2, heldout=100)
SUM = Problem(0, "478+64=", "542")


def test_the_solution_has_each_column_with_its_carry_and_then_the_sum() -> None:
    assert TASK.solution(SUM) == "8+4=12,7+6+1=14,4+0+1=5;542"
    assert TASK.solution(Problem(0, "0+0=", "0")) == "0+0=0;0"


def test_every_solution_is_rewarded_and_its_columns_are_true() -> None:
    for index in range(TASK.num_train):
        problem = TASK.train(index)
        solution = TASK.solution(problem)
        assert TASK.reward(problem, solution) == 1.0
        for column in solution.partition(";")[0].split(","):
            terms, _, total = column.partition("=")
            assert sum(int(term) for term in terms.split("+")) == int(total)


@pytest.mark.parametrize(
    ("completion", "reward"), [("working;542", 1.0), (";542 ", 1.0), ("542", 0.0), ("", 0.0), (";", 0.0), ("542;541", 0.0)]
)
def test_only_what_follows_the_last_semicolon_is_rewarded(completion: str, reward: float) -> None:
    assert TASK.reward(SUM, completion) == reward


def test_an_option_that_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.digits"):
        WrittenAddition(digits=0)
