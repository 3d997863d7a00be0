"""From a task's name in a config file to the task."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from protocol.errors import ConfigError, SlipstreamError, TaskError
from tasks.arithmetic import Arithmetic
from tasks.base import Task
from tasks.gym import ReasoningGym
from tasks.question_answer import QuestionAnswer

TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": Arithmetic,
    "reasoning-gym": ReasoningGym,
    "question-answer": QuestionAnswer,
}

_Made = TypeVar("_Made")

_COUNTS = ("num_train", "num_heldout")
_METHODS = ("train", "heldout", "solution", "reward")


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task called `name`, made with `options`.

    `name` is a key of TASKS or "module:object" for a task of your own, where object is a task, or a class or function
    that is called with `options` and returns one. ConfigError if there is no such task, it is not a task, or an
    option is wrong; TaskError, with the cause chained, if the code of your own task raises.
    """
    if name in TASKS:
        return _made(name, TASKS[name], options)
    if ":" in name:
        return _users_task(name, options)
    close = difflib.get_close_matches(name, TASKS, n=1)
    fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(TASKS)}, or module:object for your own"
    raise ConfigError("task.name", name, "there is no such task", fix)


def _users_task(name: str, options: Mapping[str, Any]) -> Task:
    found = _imported(name)
    if not isinstance(found, type) and not _missing_parts(found):
        for option, value in options.items():
            problem = f"{name} is a task already and takes no options"
            raise ConfigError(f"task.{option}", value, problem, "leave it out, or let the name point to a class")
        return cast(Task, found)
    made = _made(name, found, options) if callable(found) else found
    missing = _missing_parts(made)
    if missing:
        problem = f"{type(made).__name__} is not a task: it has no {', '.join(missing)}"
        raise ConfigError("task.name", name, problem, "add what is missing (see tasks.base.Task)")
    return cast(Task, made)


def _imported(name: str) -> Any:
    module_name, _, object_name = name.partition(":")
    if not module_name or not object_name:
        raise ConfigError("task.name", name, "one side of the colon is empty", "write module:object")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs user code, which may raise anything; the cause is chained, not lost
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            problem = f"there is no module {error.name!r}"
            raise ConfigError("task.name", name, problem, "put the directory it is in on PYTHONPATH") from error
        raise TaskError(f"importing {module_name} for task {name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, object_name):
        problem = f"module {module_name!r} has no {object_name!r}"
        raise ConfigError("task.name", name, problem, f"define it in {module.__file__}, or name another object")
    return getattr(module, object_name)


def _made(name: str, factory: Callable[..., _Made], options: Mapping[str, Any]) -> _Made:
    try:
        _check_options(name, factory, options)
        return factory(**options)
    except SlipstreamError:
        raise  # already says what is wrong
    except Exception as error:  # a factory is user code and may raise anything; the cause is chained, not lost
        raise TaskError(f"making task {name} raised {type(error).__name__}: {error}") from error


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """ConfigError for an option that `factory` does not accept, or that it needs and `options` lacks."""
    parameters = inspect.signature(factory).parameters.values()
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in by_keyword}
    accepted = f"use one of {', '.join(named)}" if named else "leave it out: the task takes no options"
    for option, value in options.items():
        if option not in named and not accepts_any:
            raise ConfigError(f"task.{option}", value, f"task {name} has no such option", accepted)
    for option, parameter in named.items():
        if parameter.default is parameter.empty and option not in options:
            raise ConfigError(f"task.{option}", None, f"task {name} needs this option", f"set {option}")


def _missing_parts(candidate: object) -> list[str]:
    missing = [count for count in _COUNTS if not hasattr(candidate, count)]
    return missing + [method for method in _METHODS if not callable(getattr(candidate, method, None))]
