"""Mathematical questions with reference answers from a file or a Hugging Face data set (GSM8K, MATH, your own)."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from protocol.errors import ConfigError, TaskError
from protocol.keyed import MAX_SEED, split_key
from tasks.base import Problem, check_index
from tasks.math_answer import final_answer, is_correct, parse_reference
from tasks.options import check_whole_number
from tasks.rows import Row, Source, read_rows

_DEFAULT_HELDOUT = 400
_DEFAULT_TEMPLATE = "{question}\n\nReason step by step, and put the final answer within \\boxed{}."


class QuestionAnswer:
    """Rows of a data set, scored by whether the completion's final answer equals the reference mathematically.

    Invariant: questions are the same if they differ in white space at most; each is used once (its first row), and
    is in one split only. `seed` decides the order of both splits, by a keyed hash of the question.
    """

    def __init__(
        self,
        path: str,
        *,
        question: str = "question",
        answer: str = "answer",
        split: str = "train",
        subset: str | None = None,
        heldout: int | None = None,
        heldout_path: str | None = None,
        heldout_split: str = "test",
        seed: int = 0,
        template: str = _DEFAULT_TEMPLATE,
    ) -> None:
        """Read all rows into memory.

        `path` is a .jsonl or .parquet file, or the directory or id of a Hugging Face data set; `subset` and `split`
        are used with the latter only, as is `heldout_split`, for `heldout_path`. `question` and `answer` name the
        fields. With `heldout_path`, the held-out problems come from there (all of them unless `heldout` says how
        many) and all its questions are removed from training; without it, `heldout` (400 by default) questions of
        `path` are held out. The prompt is `template` with "{question}" replaced.

        ConfigError if an option is wrong; TaskError, naming file and line, if the data is.
        """
        check_whole_number("task.seed", seed, 0, MAX_SEED)
        if "{question}" not in template:
            raise ConfigError("task.template", template, "the question has no place in it", "write {question} in it")
        self._template = template
        key = split_key(seed, "question order")
        rows = _in_keyed_order(read_rows(Source("task.path", path, question, answer, subset, split)), key)
        if heldout_path is None:
            num_heldout = _DEFAULT_HELDOUT if heldout is None else heldout
            check_whole_number("task.heldout", num_heldout, 1, len(rows) - 1)
            self._heldout = list(rows.values())[:num_heldout]
            self._train = list(rows.values())[num_heldout:]
        else:
            heldout_source = Source("task.heldout_path", heldout_path, question, answer, subset, heldout_split)
            heldout_rows = _in_keyed_order(read_rows(heldout_source), key)
            num_heldout = len(heldout_rows) if heldout is None else heldout
            check_whole_number("task.heldout", num_heldout, 1, len(heldout_rows))
            self._heldout = list(heldout_rows.values())[:num_heldout]
            self._train = [row for identity, row in rows.items() if identity not in heldout_rows]
            if not self._train:
                problem = "it contains every question of task.path, which leaves none to train on"
                raise ConfigError("task.heldout_path", heldout_path, problem, "use another file")

    @property
    def num_train(self) -> int:
        """Different questions that are not held out."""
        return len(self._train)

    @property
    def num_heldout(self) -> int:
        """Different questions that are held out."""
        return len(self._heldout)

    def train(self, index: int) -> Problem:
        """Training problem `index`; IndexError unless 0 <= index < num_train."""
        check_index(index, self.num_train, "train")
        return self._problem(index, self._train[index])

    def heldout(self, index: int) -> Problem:
        """Held-out problem `index`; IndexError unless 0 <= index < num_heldout."""
        check_index(index, self.num_heldout, "heldout")
        return self._problem(index, self._heldout[index])

    def solution(self, problem: Problem) -> str:
        """The row's own worked answer, with the final answer in \\boxed{}."""
        worked: str = problem.extra["worked_answer"]
        if "\\boxed" in worked:
            return worked
        reasoning, marker, _ = worked.rpartition("####")
        return f"{reasoning if marker else ''}\\boxed{{{problem.answer}}}"

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the last answer in `completion` equals the reference answer mathematically, otherwise 0.0.

        There is no time limit (see tasks.math_answer): score in a process that can be killed if the policy is not
        trusted. TaskError, naming the row, if the reference answer is not mathematical.
        """
        reference = parse_reference(problem.answer)
        if not reference:
            where = problem.extra["where"]
            raise TaskError(f"{where}: the answer {problem.answer!r} is not a number or formula that can be compared")
        return 1.0 if is_correct(reference, completion) else 0.0

    def _problem(self, index: int, row: Row) -> Problem:
        # replace() and not format(): templates and questions are full of LaTeX braces.
        prompt = self._template.replace("{question}", row.question)
        extra: dict[str, Any] = {"where": row.where, "worked_answer": row.answer}
        return Problem(index=index, prompt=prompt, answer=final_answer(row.answer), extra=extra)


def _in_keyed_order(rows: list[Row], key: bytes) -> dict[str, Row]:
    """The first row of each different question, by what makes it different, ordered by its hash under `key`."""
    by_question: dict[str, Row] = {}
    for row in rows:
        by_question.setdefault(" ".join(row.question.split()), row)
    return dict(sorted(by_question.items(), key=lambda item: blake3(item[0].encode(), key=key).digest()))
