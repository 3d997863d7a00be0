from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError
from tasks.arithmetic import Arithmetic
from tasks.base import Problem

_OPERATIONS = st.sampled_from(["+", "-", "*", "+-", "-*", "+*", "+-*"])


def _prompts(task: Arithmetic) -> tuple[list[str], list[str]]:
    train = [task.train(index).prompt for index in range(task.num_train)]
    return train, [task.heldout(index).prompt for index in range(task.num_heldout)]


@settings(max_examples=20, deadline=None)
@given(operations=_OPERATIONS, heldout=st.integers(1, 99), seed=st.integers(0, 2**63 - 1))
def test_every_problem_is_in_exactly_one_split_exactly_once(operations: str, heldout: int, seed: int) -> None:
    train, held = _prompts(Arithmetic(digits=1, operations=operations, heldout=heldout, seed=seed))
    assert len(held) == heldout
    assert len(train) + len(held) == len(operations) * 100
    assert len({*train, *held}) == len(operations) * 100


@settings(max_examples=50, deadline=None)
@given(digits=st.integers(1, 9), operations=_OPERATIONS, seed=st.integers(0, 100), data=st.data())
def test_the_answer_is_the_value_of_the_prompt(digits: int, operations: str, seed: int, data: st.DataObject) -> None:
    task = Arithmetic(digits=digits, operations=operations, heldout=50, seed=seed)
    problem = task.train(data.draw(st.integers(0, task.num_train - 1)))
    assert problem.prompt.endswith("=")
    expression = ast.parse(problem.prompt[:-1], mode="eval")
    assert isinstance(expression.body, ast.BinOp)
    assert problem.answer == str(eval(compile(expression, "prompt", "eval")))
    operands = problem.prompt[:-1].replace("+", " ").replace("-", " ").replace("*", " ").split()
    assert all(0 <= int(operand) < 10**digits for operand in operands)


def test_a_prompt_looks_as_documented() -> None:
    task = Arithmetic(digits=1, operations="+", heldout=1)
    assert Problem(index=0, prompt="3+5=", answer="8") in [
        Problem(index=0, prompt=task.train(index).prompt, answer=task.train(index).answer) for index in range(task.num_train)
    ]


def test_a_universe_too_large_to_enumerate_is_used_without_enumerating_it() -> None:
    task = Arithmetic(digits=9, operations="+-*", heldout=100)
    assert task.num_train == 3 * 10**18 - 100
    held = {task.heldout(index).prompt for index in range(100)}
    train = {task.train(index).prompt for index in [*range(500), task.num_train - 1]}
    assert len(held) == 100
    assert len(train) == 501
    assert not held & train


def test_the_same_seed_gives_the_same_problems_and_another_seed_gives_others() -> None:
    def first(seed: int) -> list[str]:
        return [Arithmetic(seed=seed).heldout(index).prompt for index in range(20)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_the_order_in_which_operations_are_written_does_not_matter() -> None:
    one, other = Arithmetic(operations="+-"), Arithmetic(operations="-+")
    assert [one.train(index) for index in range(50)] == [other.train(index) for index in range(50)]


def test_a_problem_knows_its_index_in_its_split() -> None:
    task = Arithmetic()
    assert task.train(17).index == 17
    assert task.heldout(17).index == 17


@pytest.mark.parametrize(("completion", "expected"), [("95", 1.0), (" 95\n", 1.0), ("095", 0.0), ("95.", 0.0), ("", 0.0), ("9 5", 0.0)])
def test_only_the_exact_result_is_rewarded(completion: str, expected: float) -> None:
    assert Arithmetic().reward(Problem(index=0, prompt="37+58=", answer="95"), completion) == expected


def test_the_solution_has_the_full_reward() -> None:
    task = Arithmetic(digits=2, operations="+-*")
    problems = [task.train(index) for index in range(100)]
    assert all(task.reward(problem, task.solution(problem)) == 1.0 for problem in problems)


@pytest.mark.parametrize("index", [-1, 100 - 10])
def test_an_index_outside_the_split_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=r"problems 0\.\.89"):
        Arithmetic(digits=1, heldout=10).train(index)


def test_an_index_outside_the_heldout_split_is_an_index_error() -> None:
    with pytest.raises(IndexError, match=r"no heldout problem 10: .* 0\.\.9"):
        Arithmetic(digits=1, heldout=10).heldout(10)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("task.digits", {"digits": 0}),
        ("task.digits", {"digits": 10}),
        ("task.digits", {"digits": True}),
        ("task.digits", {"digits": "2"}),
        ("task.operations", {"operations": ""}),
        ("task.operations", {"operations": "+/"}),
        ("task.operations", {"operations": "++"}),
        ("task.operations", {"operations": ["+"]}),
        ("task.heldout", {"heldout": 0}),
        ("task.heldout", {"digits": 1, "heldout": 100}),
        ("task.heldout", {"heldout": 1.5}),
        ("task.seed", {"seed": -1}),
    ],
)
def test_a_wrong_option_is_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Arithmetic(**options)
    assert caught.value.field == field
