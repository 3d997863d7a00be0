"""Any data set of reasoning-gym, with a held-out split that shares no question with the training split."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from protocol.errors import ConfigError, TaskError
from tasks.base import Problem, check_index
from tasks.options import check_whole_number

# Entry i of a data set is generated from seed + i, so data sets with neighbouring seeds are shifted copies of each
# other. Within these limits the seeds of both splits lie in ranges that never meet, and below NumPy's 2**32.
_HELDOUT_SEED_OFFSET = 2**31
_MAX_SEED = 2**30 - 1
_MAX_SIZE = 2**30
_MAX_HELDOUT = 2**26

_DRAWS_PER_HELDOUT = 10
_MAX_PROBES = 1000


class ReasoningGym:
    """`size` training problems of the reasoning-gym data set `dataset`, generated when they are asked for.

    Invariant: no training question has the same text as a held-out question, and no two held-out questions are the
    same. The held-out problems are generated at the start and kept. Training problem i is entry i of the data set,
    or, if that question is held out, the first later entry (cyclically) whose question is not: this needs no pass
    over all `size` entries, and the price is that a training question can occur under two indexes, which happens in
    generated data anyway. Generation is only as thread-safe as reasoning-gym: use one thread.
    """

    def __init__(self, dataset: str, size: int = 10_000, heldout: int = 200, seed: int = 0, **options: Any) -> None:
        """`options` are passed to the data set's own config.

        ConfigError if the data set does not exist, an option is wrong, or there are not `heldout` distinct questions;
        TaskError if nearly every training question is held out.
        """
        check_whole_number("task.size", size, 1, _MAX_SIZE)
        check_whole_number("task.heldout", heldout, 1, _MAX_HELDOUT)
        check_whole_number("task.seed", seed, 0, _MAX_SEED)
        _check_options(dataset, options)
        self._name = dataset
        self._train = _create(dataset, size, seed, options)
        draws = _create(dataset, heldout * _DRAWS_PER_HELDOUT, seed + _HELDOUT_SEED_OFFSET, options)
        self._heldout = _distinct_problems(dataset, draws, heldout)
        self._heldout_questions = frozenset(problem.prompt for problem in self._heldout)
        self.train(0)  # fail now rather than hours into a run if there is nothing left to train on

    @property
    def num_train(self) -> int:
        """The configured size."""
        return len(self._train)

    @property
    def num_heldout(self) -> int:
        """The number of distinct held-out questions."""
        return len(self._heldout)

    def train(self, index: int) -> Problem:
        """Training problem `index`; IndexError unless 0 <= index < num_train, TaskError if too much is held out."""
        check_index(index, self.num_train, "train")
        for probe in range(min(self.num_train, _MAX_PROBES)):
            problem = _problem(index, self._train[(index + probe) % self.num_train])
            if problem.prompt not in self._heldout_questions:
                return problem
        raise TaskError(
            f"reasoning-gym {self._name}: every question from entry {index} on is held out. "
            "Lower task.heldout, or choose options that give more different questions."
        )

    def heldout(self, index: int) -> Problem:
        """Held-out problem `index`; IndexError unless 0 <= index < num_heldout."""
        check_index(index, self.num_heldout, "heldout")
        return self._heldout[index]

    def solution(self, problem: Problem) -> str:
        """The reference answer; TaskError for the data sets that check answers without having one."""
        answer = problem.extra["entry"]["answer"]
        if answer is None:
            raise TaskError(
                f"reasoning-gym {self._name} checks answers but has none of its own, so it cannot be used for "
                "supervised training. Start from a policy that was trained already."
            )
        return str(answer)

    def reward(self, problem: Problem, completion: str) -> float:
        """What the data set's own `score_answer` says of `completion`, as it is; most give partial credit.

        0.0 if it raises: some scorers raise on text that does not have the form of an answer.
        """
        try:
            return float(self._train.score_answer(completion, problem.extra["entry"]))
        # Scorers of prime_factorization, game_of_life and boxnet were seen to raise ValueError, KeyError, TypeError and
        # AttributeError on malformed answers. That is what a young policy writes, and must not stop a run.
        except Exception:
            return 0.0


def _check_options(dataset: str, options: Mapping[str, Any]) -> None:
    # Loaded here because it takes 1.5 s and not every run needs it.
    data_sets = importlib.import_module("reasoning_gym.factory").DATASETS
    if dataset not in data_sets:
        close = difflib.get_close_matches(str(dataset), data_sets, n=5)
        fix = f"did you mean {', '.join(close)}?" if close else f"use one of {', '.join(sorted(data_sets))}"
        raise ConfigError("task.dataset", dataset, "reasoning-gym has no such data set", fix)
    _, config_class = data_sets[dataset]
    accepted = [field.name for field in fields(config_class) if field.name not in {"seed", "size"}]
    for option, value in options.items():
        if option not in accepted:
            problem = f"reasoning-gym {dataset} has no such option"
            raise ConfigError(f"task.{option}", value, problem, f"use one of {', '.join(accepted)}")


def _create(dataset: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
    create = importlib.import_module("reasoning_gym").create_dataset
    try:
        return create(dataset, seed=seed, size=size, **options)
    # What reasoning-gym's validation raises: it asserts, and trips over values of the wrong type.
    except (AssertionError, ValueError, TypeError, AttributeError) as error:
        shown = {"size": size, **options}
        raise ConfigError("task.options", shown, f"reasoning-gym {dataset} refuses them: {error}", "change the option it names") from error


def _distinct_problems(dataset: str, draws: Any, num_problems: int) -> list[Problem]:
    """The first `num_problems` entries of `draws` with different questions; ConfigError if there are fewer."""
    problems: dict[str, Problem] = {}
    for number in range(len(draws)):
        problem = _problem(len(problems), draws[number])
        problems.setdefault(problem.prompt, problem)
        if len(problems) == num_problems:
            return list(problems.values())
    raise ConfigError(
        "task.heldout",
        num_problems,
        f"{len(draws)} entries of reasoning-gym {dataset} have only {len(problems)} different questions",
        f"hold out fewer than {len(problems)}, or choose options that give more different questions",
    )


def _problem(index: int, entry: dict[str, Any]) -> Problem:
    answer = entry["answer"]
    return Problem(index=index, prompt=entry["question"], answer="" if answer is None else str(answer), extra={"entry": entry})
