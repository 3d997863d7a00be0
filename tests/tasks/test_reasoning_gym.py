from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import reasoning_gym  # type: ignore[import-untyped]

from protocol.errors import ConfigError, TaskError
from tasks.gym import ReasoningGym
from tasks.scoring import score

_FIVE_QUESTIONS = {"min_n": 1, "max_n": 5}  # of count_bits


def test_problems_are_made_of_the_data_sets_entries() -> None:
    task = ReasoningGym("chain_sum", size=20, heldout=5, min_terms=2, max_terms=2, max_digits=2)
    problem = task.train(7)
    assert problem.index == 7
    assert problem.prompt == problem.extra["entry"]["question"]
    assert eval(problem.extra["entry"]["metadata"]["expression"]) == int(problem.answer)


def test_no_training_question_is_held_out_even_where_the_draws_overlap() -> None:
    # Sums and differences of two digits: 200 questions, of which the held-out split takes 100.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = ReasoningGym("chain_sum", size=500, heldout=100, **options)
    held = {task.heldout(index).prompt for index in range(task.num_heldout)}
    train = [task.train(index) for index in range(task.num_train)]
    assert len(held) == task.num_heldout == 100
    assert not held & {problem.prompt for problem in train}
    assert [problem.index for problem in train] == list(range(500))
    generated = {entry["question"] for entry in reasoning_gym.create_dataset("chain_sum", seed=0, size=500, **options)}
    assert held & generated, "the data set was chosen so that something has to be excluded"


def test_the_same_seed_gives_the_same_problems_and_another_seed_gives_others() -> None:
    def prompts(seed: int) -> list[str]:
        task = ReasoningGym("chain_sum", size=20, heldout=5, seed=seed)
        return [task.heldout(0).prompt, *(task.train(index).prompt for index in range(20))]

    assert prompts(1) == prompts(1)
    assert not set(prompts(1)) & set(prompts(100))


def test_a_large_size_costs_nothing_at_the_start() -> None:
    task = ReasoningGym("chain_sum", size=10**9, heldout=5)
    assert task.num_train == 10**9
    assert task.train(10**9 - 1).index == 10**9 - 1


@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "countdown", "gsm_symbolic"])
def test_the_solution_has_the_full_reward_and_an_empty_completion_has_none(dataset: str) -> None:
    task = ReasoningGym(dataset, size=20, heldout=3)
    problem = task.train(4)
    assert score(task, problem, task.solution(problem)) == 1.0
    assert score(task, problem, "") < 0.1


def test_the_reward_is_that_of_the_data_set_with_its_partial_credit() -> None:
    task = ReasoningGym("chain_sum", size=20, heldout=3)
    problem = task.train(0)
    assert 0.0 < score(task, problem, f"I think it is {problem.answer}") < 1.0


@pytest.mark.parametrize("dataset", ["prime_factorization", "game_of_life"])
@pytest.mark.parametrize("completion", ["no idea", "{}", "", "1.5"])
def test_text_on_which_a_data_sets_scorer_raises_is_a_wrong_answer(dataset: str, completion: str) -> None:
    task = ReasoningGym(dataset, size=5, heldout=2)
    assert score(task, task.train(0), completion) < 0.1


def test_a_data_set_without_answers_has_rewards_but_no_solutions() -> None:
    task = ReasoningGym("graph_color", size=5, heldout=2)
    problem = task.train(0)
    assert problem.answer == ""
    assert score(task, problem, "not a colouring") < 1.0
    with pytest.raises(TaskError, match="graph_color checks answers but has none of its own"):
        task.solution(problem)


def test_holding_out_more_questions_than_there_are_fails_at_the_start() -> None:
    with pytest.raises(ConfigError) as caught:
        ReasoningGym("count_bits", size=10, heldout=6, **_FIVE_QUESTIONS)
    assert caught.value.field == "task.heldout"
    assert "only 5 different questions" in caught.value.problem


def test_training_questions_that_are_all_held_out_fail_at_the_start() -> None:
    with pytest.raises(TaskError, match="every question from entry 0 on is held out"):
        ReasoningGym("count_bits", size=10, heldout=5, **_FIVE_QUESTIONS)


def test_an_index_outside_the_split_is_an_index_error() -> None:
    task = ReasoningGym("chain_sum", size=5, heldout=2)
    with pytest.raises(IndexError):
        task.train(5)
    with pytest.raises(IndexError):
        task.heldout(-1)


@pytest.mark.parametrize(
    ("field", "expected", "options"),
    [
        ("task.dataset", "did you mean", {"dataset": "chainsum"}),
        ("task.dataset", "use one of", {"dataset": "@@@"}),
        ("task.min_term", "min_terms", {"dataset": "chain_sum", "min_term": 2}),
        ("task.options", "min_terms", {"dataset": "chain_sum", "min_terms": -2}),
        ("task.options", "refuses", {"dataset": "chain_sum", "min_terms": "two"}),
        ("task.size", "whole number", {"dataset": "chain_sum", "size": 0}),
        ("task.heldout", "whole number", {"dataset": "chain_sum", "heldout": 0}),
        ("task.seed", "whole number", {"dataset": "chain_sum", "seed": 2**31}),
    ],
)
def test_a_wrong_option_is_named_with_what_is_accepted(field: str, expected: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ReasoningGym(**options)
    assert caught.value.field == field
    assert expected in str(caught.value)


def test_neither_reasoning_gym_nor_math_verify_brings_in_torch() -> None:
    program = (
        "import sys\n"
        "from tasks.registry import load_task\n"
        "lazy = {'reasoning_gym', 'math_verify', 'pyarrow', 'sympy', 'torch', 'transformers'}\n"
        "assert not lazy & set(sys.modules), lazy & set(sys.modules)\n"
        "load_task('reasoning-gym', {'dataset': 'chain_sum', 'heldout': 2})\n"
        "import math_verify\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
