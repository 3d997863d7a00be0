"""Making a run: everything its processes need, once, and nothing of it left behind when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.prepare import cache_folder, prepare_run, supervised_seed
from deploy.rundir import RunDirectory, is_weights, latest_run
from examples.own_task import EvenDigits
from protocol.config import overridden, parse_config
from protocol.errors import ConfigError


def test_a_run_directory_says_what_the_run_is(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = parse_config(settings(run={"directory": str(tmp_path / "runs")}))
    run = prepare_run(config, None, lambda _: None)
    manifest = run.manifest()
    assert run.config() == config
    assert manifest.num_prompts == 64
    assert {file.name for file in manifest.policy_files} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert all((run.path / "blobs" / file.blob.digest).stat().st_size == file.blob.size for file in manifest.policy_files)
    assert manifest.versions["torch"]
    assert latest_run(tmp_path / "runs").path == run.path.resolve()
    assert [file.name for file in manifest.policy_files if is_weights(file.name)] == ["model.safetensors"]
    with pytest.raises(ConfigError, match="holds a run already"):
        prepare_run(config, run.path, lambda _: None)


class Endless(EvenDigits):
    """More problems than tickets can number."""

    def __init__(self) -> None:
        super().__init__()
        self.num_train = 2**63 + 1


def test_a_task_with_more_problems_than_tickets_can_number_is_refused(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = parse_config(settings() | {"task": {"name": f"{__name__}:Endless"}})
    with pytest.raises(ConfigError, match="9223372036854775809 training problems"):
        prepare_run(config, tmp_path / "run", print)


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run yet"):
        latest_run(tmp_path)
    with pytest.raises(ConfigError, match=r"has no run\.json"):
        RunDirectory(tmp_path).manifest()


def test_a_supervised_policy_has_the_run_s_seed_unless_it_has_its_own() -> None:
    seeds = [supervised_seed(parse_config({"run": {"seed": seed}, "supervised": own})) for own in ({}, {"seed": 0}) for seed in (1, 2)]
    assert seeds == [1, 2, 0, 0]


def test_the_supervised_policy_is_trained_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = {"hidden_size": 16, "layers": 1, "heads": 2, "target_reward": 0.01, "max_steps": 400, "batch_size": 32, "lr": 3e-3, "seed": 0}
    config = parse_config(
        {"run": {"directory": str(tmp_path / "runs")}, "task": {"name": "arithmetic", "digits": 1, "heldout": 50}, "supervised": recipe}
    )
    said: list[str] = []
    first = prepare_run(config, tmp_path / "a", said.append)
    assert any("held-out reward" in line for line in said)
    said.clear()
    second = prepare_run(overridden(config, ["run.seed=7"]), tmp_path / "b", said.append, is_latest=False)
    assert latest_run(tmp_path / "runs").path == first.path
    assert said == [f"policy: using the supervised policy in {first.manifest().policy}"]
    assert first.manifest().policy_files == second.manifest().policy_files
    assert json.loads((Path(first.manifest().policy) / "supervised.json").read_bytes())["heldout_reward"] >= 0.01
    assert [path.name for path in (cache_folder() / "policies").iterdir()] == [Path(first.manifest().policy).name], (
        "nothing half made is left"
    )
