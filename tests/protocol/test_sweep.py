"""A sweep's file: every combination once, each the run that its name says, and whatever is wrong is named."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.sweep import CellPlan, load_sweep

BASE = """
[run]
steps = 12
[policy]
path = "/a/policy"
[loss]
ratio = "sequence"
"""
GRID = """
[[grids]]
lags = [4]
learning_rates = [1e-4]
"""


def written(folder: Path, text: str = GRID, base: str = BASE, head: str = 'name = "s"\nconfig = "base.toml"\n') -> Path:
    (folder / "base.toml").write_text(base)
    path = folder / "sweep.toml"
    path.write_text(head + text)
    return path


def plans(folder: Path, text: str = GRID, *overrides: str) -> dict[str, CellPlan]:
    found = load_sweep(written(folder, text), overrides)[1]
    assert len({plan.name for plan in found}) == len(found)
    return {plan.name: plan for plan in found}


def refused(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, overrides)
    return caught.value


def test_a_grid_is_every_combination_of_its_lists_once(tmp_path: Path) -> None:
    found = plans(
        tmp_path,
        """
[[grids]]
pipelines = ["cycles", "queue"]
surrogates = ["clip", "min-clip"]
lags = [2, 8]
learning_rates = [1e-5, 2.5e-4, 0.00025]
seeds = [1, 2, 3]
governors = ["off", "hold"]

[[grids]]
lags = [2, 16]
learning_rates = [1e-5]
seeds = [1]
""",
    )
    settings = {
        (
            plan.pipeline,
            plan.config.loss.surrogate,
            plan.config.stability.governor,
            plan.max_lag,
            plan.config.learner.lr,
            plan.config.run.seed,
        )
        for plan in found.values()
    }
    whole = set(product(("cycles", "queue"), ("clip", "min-clip"), ("warn", "hold"), (2, 8), (1e-5, 2.5e-4), (1, 2, 3)))
    assert settings == whole | {("cycles", "clip", "warn", 16, 1e-5, 1)}
    assert len(found) == len(settings)
    assert all(plan.config.run.name == name and plan.config.run.steps == 12 for name, plan in found.items())
    assert found["queue-min-clip-hold-S8-lr0.00025-seed3"].config.loss.ratio == "sequence"


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_both_pipelines_are_those_of_the_table_in_the_staleness_page(tmp_path: Path, lag: int) -> None:
    found = plans(tmp_path, f'[[grids]]\npipelines = ["cycles", "queue"]\nlags = [{lag}]\nlearning_rates = [1.0]\n')
    cycles, queue = (found[f"{name}-clip-S{lag}-lr1-seed0"].config.policy for name in ("cycles", "queue"))
    assert (cycles.reuse, cycles.publish_every, cycles.max_lag) == (lag, lag, lag - 1)
    assert (queue.reuse, queue.publish_every, queue.max_lag) == (1, 1, lag)


def test_governors_are_set_and_off_leaves_the_configuration_s(tmp_path: Path) -> None:
    found = plans(tmp_path, GRID + 'governors = ["off", "hold", "sqrt-ess"]\nset = {"stability.governor" = "off"}\n')
    settings = [(plan.config.stability.governor, plan.config.stability.rule) for plan in found.values()]
    assert settings == [("off", "region"), ("hold", "region"), ("hold", "sqrt-ess")]


def test_fields_are_set_from_the_general_to_the_particular_and_overrides_come_last(tmp_path: Path) -> None:
    text = """
[set]
"run.steps" = 5
"learner.eval_prompts" = 6
"task.text" = "1e3"
"task.flag" = true
"task.size" = 1e22
"task.quoted" = 'a "b" \\ c'
[[grids]]
lags = [1]
learning_rates = [1.0]
set = {"run.steps" = 7, "learner.eval_every" = 9}
"""
    (plan,) = plans(tmp_path, text).values()
    assert (plan.config.run.steps, plan.config.learner.eval_prompts, plan.config.learner.eval_every) == (7, 6, 9)
    assert plan.config.task.options == {"text": "1e3", "flag": True, "size": 1e22, "quoted": 'a "b" \\ c'}
    (plan,) = plans(tmp_path, text, "run.steps=8").values()
    assert (plan.config.run.steps, plan.config.learner.eval_every) == (8, 9)


def test_runs_are_in_a_folder_of_the_sweep_s_name(tmp_path: Path) -> None:
    assert load_sweep(written(tmp_path))[0].folder == Path("runs/s")
    assert load_sweep(written(tmp_path, head='name = "t"\nconfig = "base.toml"\ndirectory = "/d"\n'))[0].folder == Path("/d/t")


@pytest.mark.parametrize(
    ("text", "field", "value", "said"),
    [
        ("[[grids]]\nlags = [0]\nlearning_rates = [1]\n", "grids.0.lags", [0], "each S should be at least 1"),
        ("[[grids]]\nlags = []\nlearning_rates = [1]\n", "grids.0.lags", [], "at least 1 item"),
        ("[[grids]]\nlags = [1]\n", "grids.0.learning_rates", None, "is missing"),
        (GRID + "pipelines = []\n", "grids.0.pipelines", [], "at least 1 item"),
        (GRID + 'pipelines = ["cycle"]\n', "grids.0.pipelines.0", "cycle", "'cycles' or 'queue'"),
        (GRID + 'governors = ["warn"]\n', "grids.0.governors.0", "warn", "'off', 'hold' or 'sqrt-ess'"),
        (GRID + "lag = [3]\n", "grids.0.lag", [3], "did you mean 'lags'?"),
        ("paralel = 3\n" + GRID, "paralel", 3, "did you mean 'parallel'?"),
        ("parallel = -1\n" + GRID, "parallel", -1, "greater than or equal to 0"),
        ("", "grids", None, "is missing"),
        (GRID + 'set = {"learner.lr" = 1.0}\n', "grids.0.set", {"learner.lr": 1.0}, "comes from the lists of a grid: learning_rates"),
        ('set = {"policy.max_lag" = 1}\n' + GRID, "set", {"policy.max_lag": 1}, "comes from the lists of a grid: pipelines and lags"),
        (GRID + 'set = {"learner.lrr" = 1.0}\n', "learner.lrr", 1.0, "did you mean 'lr'?"),
        ("[[grids]]\nlags = [1]\nlearning_rates = [-1.0]\n", "learner.lr", -1.0, "greater than 0"),
        ("[[grids]]\nlags = [1]\nlearning_rates = [nan]\n", "learner.lr", None, "nan"),
        (GRID + "seeds = [-1]\n", "run.seed", -1, "greater than or equal to 0"),
        ('set = {"learner.ranks" = 2}\n' + GRID, "learner.ranks", 2, "serial mode has one rank"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_fix(tmp_path: Path, text: str, field: str, value: object, said: str) -> None:
    error = refused(written(tmp_path, text))
    assert error.field == field
    assert value is None or error.value == value
    assert said in str(error)
    assert error.fix


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "x" * 65])
def test_a_name_that_is_no_folder_s_is_refused(tmp_path: Path, name: str) -> None:
    error = refused(written(tmp_path, head=f'name = "{name}"\nconfig = "base.toml"\n'))
    assert (error.field, error.value) == ("name", name)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        error = refused(path)
        assert error.value == str(path) and "cannot be read" in error.problem
    assert "is not valid TOML" in refused(written(tmp_path, "a = = 1")).problem
    (tmp_path / "sweep.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in refused(tmp_path / "sweep.toml").problem
    missing = written(tmp_path, head='name = "s"\nconfig = "other.toml"\n')
    assert refused(missing).value == str(tmp_path / "other.toml")


def test_two_grids_that_give_one_run_different_fields_are_refused_and_equal_ones_are_one_run(tmp_path: Path) -> None:
    assert len(plans(tmp_path, GRID + GRID)) == 1
    assert len(plans(tmp_path, GRID + 'set = {"run.steps" = 12}\n' + GRID)) == 1
    error = refused(written(tmp_path, GRID + 'set = {"run.steps" = 13}\n' + GRID))
    assert (error.field, error.value) == ("grids", "cycles-clip-S4-lr0.0001-seed0")
    assert "set it differently" in error.problem
    close = refused(written(tmp_path, "[[grids]]\nlags = [1]\nlearning_rates = [1.0000001e-4, 1e-4]\n"))
    assert close.value == "cycles-clip-S1-lr0.0001-seed0"


@pytest.mark.parametrize(
    "field", ["learner.lr", "policy.reuse", "policy.sync_every", "policy.max_lag", "run.seed", "run.name", "loss.surrogate"]
)
def test_what_a_run_s_name_says_is_not_overridden(tmp_path: Path, field: str) -> None:
    error = refused(written(tmp_path), f"{field} = 1")
    assert (error.field, error.value) == ("--set", f"{field} = 1")
    assert str(tmp_path / "sweep.toml") in error.fix


def test_the_shipped_sweep_has_three_arms_of_one_grid() -> None:
    _, found = load_sweep(Path(__file__).resolve().parent.parent.parent / "examples" / "paper.toml")
    arms: dict[tuple[str, str], set[tuple[int, float, int]]] = {}
    for plan in found:
        arm = arms.setdefault((plan.pipeline, plan.config.loss.surrogate), set())
        arm.add((plan.max_lag, plan.config.learner.lr, plan.config.run.seed))
    assert arms.keys() == {("cycles", "clip"), ("cycles", "min-clip"), ("queue", "clip")}
    assert len({frozenset(arm) for arm in arms.values()}) == 1
