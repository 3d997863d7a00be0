from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError, TaskError
from tasks.question_answer import QuestionAnswer
from tasks.scoring import score

_GSM8K = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72",
}
_MATH = {"question": "What is half of one?", "answer": "Half of $1$ is $1/2$, so it is $\\boxed{\\frac{1}{2}}$."}

Rows = list[dict[str, Any]]


def _write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _write_parquet(path: Path, rows: Rows) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def _numbered(num_rows: int) -> Rows:
    return [{"question": f"What is {number}?", "answer": f"#### {number}"} for number in range(num_rows)]


def _one(tmp_path: Path, row: dict[str, Any], **options: Any) -> QuestionAnswer:
    """A task whose only training problem is `row`."""
    filler = {**row, "question": "filler", "answer": "0"}
    path = _write_json_lines(tmp_path / "train.jsonl", [row])
    heldout_path = _write_json_lines(tmp_path / "heldout.jsonl", [filler])
    return QuestionAnswer(path, heldout_path=heldout_path, **options)


def _prompts(task: QuestionAnswer) -> tuple[list[str], list[str]]:
    train = [task.train(index).prompt for index in range(task.num_train)]
    return train, [task.heldout(index).prompt for index in range(task.num_heldout)]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Half of 48 is 24, so the answer is \\boxed{72}.", 1.0),
        ("The answer is 72.", 1.0),
        ("#### 72", 1.0),
        ("$72.00$", 1.0),
        ("first 72, no: \\boxed{24}", 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
    ],
)
def test_a_gsm8k_answer_is_what_follows_the_hashes(tmp_path: Path, completion: str, expected: float) -> None:
    task = _one(tmp_path, _GSM8K)
    problem = task.train(0)
    assert problem.answer == "72"
    assert score(task, problem, completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("\\boxed{\\frac{1}{2}}", 1.0), ("\\boxed{0.5}", 1.0), ("It is $\\frac{2}{4}$", 1.0), ("\\boxed{2}", 0.0)],
)
def test_a_math_answer_is_what_is_in_the_box(tmp_path: Path, completion: str, expected: float) -> None:
    task = _one(tmp_path, _MATH)
    assert score(task, task.train(0), completion) == expected


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        (72, "72"),
        (0.5, "1/2"),
        ("1,234", "1234"),
        ("#### 1,234", "\\boxed{1234}"),
        ("$50", "50"),
        ("50%", "\\boxed{50\\%}"),
        ("3x+2", "\\boxed{2+3x}"),
        ("(1, 2)", "\\boxed{(1,2)}"),
        ("\\frac{3}{4}", "0.75"),
        ("$x^2$ and so $\\frac{1}{3}$", "1/3"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "$\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}$"),
    ],
)
def test_answers_may_be_written_in_many_ways(tmp_path: Path, answer: Any, completion: str) -> None:
    task = _one(tmp_path, {"question": "q", "answer": answer})
    assert score(task, task.train(0), completion) == 1.0
    assert score(task, task.train(0), "\\boxed{7}") == 0.0


@pytest.mark.parametrize("row", [_GSM8K, _MATH, {"question": "q", "answer": 5}, {"question": "q", "answer": "$50"}])
def test_the_solution_has_the_full_reward(tmp_path: Path, row: dict[str, Any]) -> None:
    task = _one(tmp_path, row)
    problem = task.train(0)
    assert "\\boxed{" in task.solution(problem)
    assert "####" not in task.solution(problem)
    assert score(task, problem, task.solution(problem)) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "9**9**9**9",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{((2^{9999})^{9999})^{9999}}",
        "\\boxed{10000000!}",
        "\\boxed{2^{1000000!}}",
        "\\boxed{\\sum_{i=1}^{10000000} \\frac{1}{i}}",
        "\\boxed{(1+x+y)^{2000}}",
        "\\boxed{2^{\\infty}}",
        "\\boxed{0^{0/0}}",
    ],
)
@pytest.mark.timeout(10)
def test_a_completion_that_would_take_forever_to_evaluate_is_wrong_at_once(tmp_path: Path, completion: str) -> None:
    task = _one(tmp_path, _GSM8K)
    assert score(task, task.train(0), completion) == 0.0


@pytest.mark.parametrize("answer", ["2^{100}", "x^{2008}", "2^{\\sqrt{2}}", "2^{x^2}", "7^{7^{7^7}}", "(1+x)^{30}", "5!"])
def test_powers_and_factorials_are_answers_like_any_other(tmp_path: Path, answer: str) -> None:
    task = _one(tmp_path, {"question": "q", "answer": answer})
    assert score(task, task.train(0), f"\\boxed{{{answer}}}") == 1.0


def test_scoring_works_in_a_thread(tmp_path: Path) -> None:
    task = _one(tmp_path, _GSM8K)
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(score(task, task.train(0), "\\boxed{72}")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_a_reference_that_is_not_mathematical_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    task = _one(tmp_path, {"question": "q", "answer": "####"})
    with pytest.raises(TaskError, match=r"train\.jsonl, line 1: the answer '' is not a number or formula"):
        task.reward(task.train(0), "72")


def test_the_prompt_is_the_template_with_the_question_in_it(tmp_path: Path) -> None:
    row = {"question": "What is {x} in \\frac{1}{2}?", "answer": "1"}
    task = _one(tmp_path, row, template="Q: {question} Use \\boxed{}.\nA:")
    assert task.train(0).prompt == "Q: What is {x} in \\frac{1}{2}? Use \\boxed{}.\nA:"


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    path = _write_json_lines(tmp_path / "a.jsonl", ({"problem": f"q{n}", "solution": n, "level": 5} for n in range(3)))
    task = QuestionAnswer(path, question="problem", answer="solution", heldout=1)
    assert task.num_train == 2


def test_json_lines_and_parquet_with_the_same_rows_are_the_same_task(tmp_path: Path) -> None:
    from_json_lines = QuestionAnswer(_write_json_lines(tmp_path / "a.jsonl", _numbered(50)), heldout=10)
    from_parquet = QuestionAnswer(_write_parquet(tmp_path / "a.parquet", _numbered(50)), heldout=10)
    assert _prompts(from_json_lines) == _prompts(from_parquet)


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(2, 60), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_every_question_is_in_exactly_one_split_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, seed: int, data: st.DataObject
) -> None:
    heldout = data.draw(st.integers(1, num_rows - 1))
    path = _write_json_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", _numbered(num_rows) * 2)
    train, held = _prompts(QuestionAnswer(path, heldout=heldout, seed=seed, template="{question}"))
    assert len(held) == heldout
    assert sorted(train + held) == sorted(row["question"] for row in _numbered(num_rows))


def test_questions_that_differ_in_white_space_are_the_same_and_the_first_row_is_used(tmp_path: Path) -> None:
    rows = [{"question": "a  b", "answer": 1}, {"question": "c", "answer": 2}, {"question": " a\nb ", "answer": 3}]
    task = QuestionAnswer(_write_json_lines(tmp_path / "a.jsonl", rows), heldout=1)
    assert {task.train(0).answer, task.heldout(0).answer} == {"1", "2"}
    assert task.num_train == 1


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    one = _write_json_lines(tmp_path / "one.jsonl", _numbered(100))
    other = _write_json_lines(tmp_path / "other.jsonl", reversed(_numbered(100)))
    assert _prompts(QuestionAnswer(one, heldout=20)) == _prompts(QuestionAnswer(other, heldout=20))
    assert _prompts(QuestionAnswer(one, heldout=20)) != _prompts(QuestionAnswer(one, heldout=20, seed=1))


def test_questions_of_the_heldout_file_are_removed_from_training(tmp_path: Path) -> None:
    path = _write_json_lines(tmp_path / "train.jsonl", _numbered(30))
    heldout_path = _write_parquet(tmp_path / "test.parquet", [*_numbered(10), {"question": "new", "answer": "#### 1"}])
    task = QuestionAnswer(path, heldout_path=heldout_path)
    assert (task.num_train, task.num_heldout) == (20, 11)
    train, held = _prompts(task)
    assert not set(train) & set(held)


def test_a_part_of_the_heldout_file_can_be_used_and_the_rest_still_is_not_trained_on(tmp_path: Path) -> None:
    path = _write_json_lines(tmp_path / "train.jsonl", _numbered(30))
    heldout_path = _write_json_lines(tmp_path / "test.jsonl", _numbered(10))
    task = QuestionAnswer(path, heldout_path=heldout_path, heldout=4)
    assert (task.num_train, task.num_heldout) == (20, 4)


def test_a_heldout_file_with_every_question_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    path = _write_json_lines(tmp_path / "train.jsonl", _numbered(3))
    with pytest.raises(ConfigError, match=r"task\.heldout_path .*none to train on"):
        QuestionAnswer(path, heldout_path=path)


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "a", "answer": 1}\n  \n{"question": "b"}\n', encoding="utf-8")
    with pytest.raises(TaskError, match=r"a\.jsonl, line 4: no field 'answer'; its fields are question"):
        QuestionAnswer(str(path), heldout=1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"question": "a", ', "not a JSON object"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"question": "\xff", "answer": 1}', "not a JSON object"),
        (b'{"answer": 1}', "no field 'question'"),
        (b'{"question": "a", "answer": null}', "field 'answer' is None"),
        (b'{"question": "a", "answer": true}', "field 'answer' is True"),
        (b'{"question": ["a"], "answer": 1}', r"field 'question' is \['a'\]"),
        (b'{"question": " ", "answer": 1}', "field 'question' is empty"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "fine", "answer": 1}\n' + line + b"\n")
    with pytest.raises(TaskError, match=rf"rows\.jsonl, line 2: {expected}"):
        QuestionAnswer(str(path), heldout=1)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no rows"):
        QuestionAnswer(_write_json_lines(tmp_path / "a.jsonl", []))


def test_a_parquet_file_without_the_column_is_refused_with_the_columns_it_has(tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", [{"question": "a", "solution": "1"}])
    with pytest.raises(TaskError, match=r"a\.parquet: no column 'answer'; its columns are question, solution"):
        QuestionAnswer(path)


def test_an_empty_cell_in_a_parquet_file_is_named_with_its_row(tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", [{"question": "a", "answer": "1"}, {"question": "b", "answer": None}])
    with pytest.raises(TaskError, match=r"a\.parquet, row 2: field 'answer' is None"):
        QuestionAnswer(path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(TaskError, match=r"a\.parquet: not a Parquet file that can be read"):
        QuestionAnswer(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet"])
def test_a_missing_file_names_the_option(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.path = .*there is no such file"):
        QuestionAnswer(str(tmp_path / name))
    path = _write_json_lines(tmp_path / "train.jsonl", _numbered(3))
    with pytest.raises(ConfigError, match=r"task\.heldout_path = .*there is no such file"):
        QuestionAnswer(path, heldout_path=str(tmp_path / name))


def test_a_file_of_another_format_is_refused_with_the_formats_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n")
    with pytest.raises(ConfigError, match=r"task\.path = .*\.jsonl.*\.parquet"):
        QuestionAnswer(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("task.heldout", {"heldout": 0}),
        ("task.heldout", {"heldout": 10}),
        ("task.heldout", {}),
        ("task.seed", {"heldout": 2, "seed": -1}),
        ("task.template", {"heldout": 2, "template": "no place"}),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, field: str, options: dict[str, Any]) -> None:
    path = _write_json_lines(tmp_path / "a.jsonl", _numbered(10))
    with pytest.raises(ConfigError) as caught:
        QuestionAnswer(path, **options)
    assert caught.value.field == field


def test_holding_out_more_than_the_heldout_file_has_is_refused(tmp_path: Path) -> None:
    path = _write_json_lines(tmp_path / "train.jsonl", _numbered(10))
    heldout_path = _write_json_lines(tmp_path / "test.jsonl", _numbered(3))
    with pytest.raises(ConfigError, match=r"task\.heldout = 4"):
        QuestionAnswer(path, heldout_path=heldout_path, heldout=4)


def test_an_index_outside_the_split_is_an_index_error(tmp_path: Path) -> None:
    task = QuestionAnswer(_write_json_lines(tmp_path / "a.jsonl", _numbered(10)), heldout=4)
    with pytest.raises(IndexError):
        task.train(6)
    with pytest.raises(IndexError):
        task.heldout(-1)


class FakeDatasets:
    """Stands for the module `datasets`: one data set, two splits, and the errors of the real one."""

    def load_dataset(self, path: str, name: str | None, split: str) -> Rows:
        if path != "openai/gsm8k":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        if name != "main":
            raise ValueError("Config name is missing. Please pick one among: ['main', 'socratic']")
        return {"train": _numbered(20), "test": _numbered(5), "broken": [{"question": "a"}]}[split]


InstallDatasets = Callable[[object], None]


@pytest.fixture
def install_datasets(monkeypatch: pytest.MonkeyPatch) -> InstallDatasets:
    """Make `import datasets` give an object, or fail if it is None, whatever is installed here."""
    return lambda module: monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hugging_face_data_set_is_read_by_its_id(install_datasets: InstallDatasets) -> None:
    install_datasets(FakeDatasets())
    task = QuestionAnswer("openai/gsm8k", subset="main", heldout=4)
    assert (task.num_train, task.num_heldout) == (16, 4)
    assert "openai/gsm8k (train), row" in task.train(0).extra["where"]


def test_the_test_split_of_a_hugging_face_data_set_can_be_held_out(install_datasets: InstallDatasets) -> None:
    install_datasets(FakeDatasets())
    task = QuestionAnswer("openai/gsm8k", subset="main", heldout_path="openai/gsm8k")
    assert (task.num_train, task.num_heldout) == (15, 5)


@pytest.mark.parametrize(
    ("path", "subset", "expected"),
    [("openai/gsm9k", "main", "doesn't exist"), ("openai/gsm8k", None, "pick one among")],
)
def test_what_cannot_be_loaded_from_hugging_face_is_named_with_the_reason(
    install_datasets: InstallDatasets, path: str, subset: str | None, expected: str
) -> None:
    install_datasets(FakeDatasets())
    with pytest.raises(ConfigError, match=expected) as caught:
        QuestionAnswer(path, subset=subset)
    assert caught.value.field == "task.path"


def test_a_wrong_row_of_a_hugging_face_data_set_is_named(install_datasets: InstallDatasets) -> None:
    install_datasets(FakeDatasets())
    with pytest.raises(TaskError, match=r"openai/gsm8k \(broken\), row 1: no field 'answer'"):
        QuestionAnswer("openai/gsm8k", subset="main", split="broken")


def test_without_the_datasets_package_the_message_says_how_to_install_it(install_datasets: InstallDatasets) -> None:
    install_datasets(None)
    with pytest.raises(ConfigError, match=r"pip install slipstream-rl\[datasets\]"):
        QuestionAnswer("openai/gsm8k")
