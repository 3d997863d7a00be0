from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError, TaskError
from tasks.arithmetic import Arithmetic
from tasks.gym import ReasoningGym
from tasks.question_answer import QuestionAnswer
from tasks.registry import TASKS, load_task
from tasks.scoring import score

_USERS_MODULE = '''
from protocol.errors import TaskError
from tasks.base import Problem


class Echo:
    """Say the word."""

    num_train = 10
    num_heldout = 2

    def __init__(self, word="hello", times=1):
        self._answer = " ".join([word] * times)

    def train(self, index):
        return Problem(index=index, prompt=f"{index}: say {self._answer}", answer=self._answer)

    heldout = train

    def solution(self, problem):
        return problem.answer

    def reward(self, problem, completion):
        return completion == problem.answer


class NeedsWord(Echo):
    def __init__(self, *, word):
        super().__init__(word)


class Unfinished:
    num_train = 10

    def train(self, index):
        return None

    reward = 1.0


def make(**options):
    return Echo(**options)


def make_nothing():
    return None


def make_trouble():
    raise RuntimeError("no such luck")


def make_refusal():
    raise TaskError("the oracle is asleep")


task = Echo("instance")
number = 5
'''

ModuleWriter = Callable[[str], str]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleWriter:
    """Write a module that can be imported, and return its name, which is new each time."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        name = f"users_task_{next(_MODULE_NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


_MODULE_NUMBERS = itertools.count()


def test_the_tasks_that_come_with_the_project_are_made_from_their_options(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{number}", "answer": number}) + "\n" for number in range(9)))
    assert isinstance(load_task("arithmetic", {"digits": 3}), Arithmetic)
    assert isinstance(load_task("reasoning-gym", {"dataset": "chain_sum", "heldout": 2, "min_terms": 3}), ReasoningGym)
    assert isinstance(load_task("question-answer", {"path": str(path), "heldout": 2}), QuestionAnswer)
    assert set(TASKS) == {"arithmetic", "reasoning-gym", "question-answer"}


@pytest.mark.parametrize(
    ("object_name", "options", "answer"),
    [
        ("Echo", {}, "hello"),
        ("Echo", {"word": "hi", "times": 2}, "hi hi"),
        ("make", {"word": "hi"}, "hi"),
        ("NeedsWord", {"word": "hi"}, "hi"),
        ("task", {}, "instance"),
    ],
)
def test_a_users_task_may_be_a_class_a_function_or_an_object(
    write_module: ModuleWriter, object_name: str, options: dict[str, Any], answer: str
) -> None:
    task = load_task(f"{write_module(_USERS_MODULE)}:{object_name}", options)
    problem = task.train(3)
    assert problem.answer == answer
    assert score(task, problem, task.solution(problem)) == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arithmetics", "did you mean 'arithmetic'"),
        ("zzz", "use one of arithmetic, reasoning-gym, question-answer"),
        (":thing", "one side of the colon is empty"),
        ("thing:", "one side of the colon is empty"),
        ("no_such_module_anywhere:task", "there is no module 'no_such_module_anywhere'"),
        ("protocol.no_such_module:task", r"there is no module 'protocol\.no_such_module'"),
        ("no_such_package.module:task", "there is no module 'no_such_package'"),
        ("protocol.errors:no_such_task", "module 'protocol.errors' has no 'no_such_task'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_task(name, {})
    assert caught.value.field == "task.name"


@pytest.mark.parametrize(
    ("object_name", "missing"),
    [
        ("Unfinished", "num_heldout, heldout, solution, reward"),
        ("make_nothing", "num_train, num_heldout, train, heldout, solution, reward"),
        ("number", "num_train, num_heldout, train, heldout, solution, reward"),
    ],
)
def test_an_object_that_is_not_a_task_is_refused_with_what_it_lacks(write_module: ModuleWriter, object_name: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"is not a task: it has no {missing}\\.") as caught:
        load_task(f"{write_module(_USERS_MODULE)}:{object_name}", {})
    assert caught.value.field == "task.name"


@pytest.mark.parametrize(
    ("object_name", "options", "field", "expected"),
    [
        ("Echo", {"words": 2}, "task.words", "use one of word, times"),
        ("NeedsWord", {}, "task.word", "needs this option"),
        ("make_nothing", {"word": "a"}, "task.word", "takes no options"),
        ("task", {"word": "a"}, "task.word", "takes no options"),
    ],
)
def test_a_wrong_option_of_a_users_task_is_named(
    write_module: ModuleWriter, object_name: str, options: dict[str, Any], field: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_task(f"{write_module(_USERS_MODULE)}:{object_name}", options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "options", "field", "expected"),
    [
        ("arithmetic", {"digitz": 2}, "task.digitz", "use one of digits, operations, heldout, seed"),
        ("arithmetic", {"digits": 0}, "task.digits", "1..9"),
        ("reasoning-gym", {}, "task.dataset", "needs this option"),
        ("reasoning-gym", {"dataset": "chain_sum", "terms": 2}, "task.terms", "use one of min_terms"),
        ("question-answer", {"heldout": 2}, "task.path", "needs this option"),
        ("question-answer", {"path": "a.jsonl", "column": "q"}, "task.column", "use one of path, question, answer"),
    ],
)
def test_a_wrong_option_is_named_with_the_accepted_ones(name: str, options: dict[str, Any], field: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_task(name, options)
    assert caught.value.field == field


def test_a_users_module_that_does_not_import_is_an_error_with_its_cause(write_module: ModuleWriter) -> None:
    name = write_module("1 / 0\n")
    with pytest.raises(TaskError, match=f"importing {name} .* raised ZeroDivisionError") as caught:
        load_task(f"{name}:task", {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_module_that_the_users_module_lacks_is_not_mistaken_for_the_users_module(write_module: ModuleWriter) -> None:
    name = write_module("import no_such_module_anywhere\n")
    with pytest.raises(TaskError, match=f"importing {name} .* No module named 'no_such_module_anywhere'"):
        load_task(f"{name}:task", {})


def test_a_factory_that_raises_is_an_error_with_its_cause(write_module: ModuleWriter) -> None:
    with pytest.raises(TaskError, match=r"making task .* raised RuntimeError: no such luck") as caught:
        load_task(f"{write_module(_USERS_MODULE)}:make_trouble", {})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_meant_for_a_person_is_passed_on_as_it_is(write_module: ModuleWriter) -> None:
    with pytest.raises(TaskError, match=r"^the oracle is asleep$"):
        load_task(f"{write_module(_USERS_MODULE)}:make_refusal", {})
