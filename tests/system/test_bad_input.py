"""Bad input: each a clear error that names what is wrong and what to do, and nothing lost."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("learner", {"lrr": 1e-3}, ["learner.lrr", "did you mean 'lr'"]),
        ("learner", {"lr": -1.0}, ["learner.lr = -1.0", "greater than 0"]),
        ("policy", {"reuse": 4, "max_lag": 1}, ["policy.max_lag = 1", "max_lag = 3 is the smallest that works"]),
        ("policy", {"path": "/nowhere/at/all"}, ["policy.path", "/nowhere/at/all"]),
        ("task", {"name": "arithmetics"}, ["task.name", "did you mean 'arithmetic'"]),
        ("task", {"name": "examples.own_task:Nothing"}, ["task.name"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_fix(
    cli: Any, write_config: Callable[..., Path], settings: Callable[..., Any], section: str, values: dict[str, Any], said: list[str]
) -> None:
    done = cli("up", str(write_config(settings(**{section: values}))))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr


def test_an_actor_with_a_key_of_another_run_is_told_so(start: Any, settings: Callable[..., Any], cli: Any, tmp_path: Path) -> None:
    from broker.keys import make_keys

    run = start(settings(run={"steps": 100_000}, policy={"max_lag": 1}))
    address = run.until(lambda status: status["step"] >= 1) and json.loads((run.directory / "broker.json").read_bytes())["address"]
    make_keys(tmp_path / "other")
    wrong_run = cli("actor", "--broker", address, "--key", str(tmp_path / "other" / "actor.key"))
    wrong_role = cli("actor", "--broker", address, "--key", str(run.directory / "keys" / "learner.key"))
    open_key = tmp_path / "open.key"
    shutil.copy(run.directory / "keys" / "actor.key", open_key)
    open_key.chmod(0o644)
    readable = cli("actor", "--broker", address, "--key", str(open_key))
    for done in (wrong_run, wrong_role):
        assert done.returncode == 2, done.stderr
        assert "refused our key for the role 'actor'" in done.stderr
    assert readable.returncode == 2
    assert "chmod 600" in readable.stderr
    at = run.until(lambda status: status["step"] >= 2)["step"]
    run.until(lambda status: status["step"] > at)


def test_no_broker_is_an_error_that_names_the_address(cli: Any, tmp_path: Path) -> None:
    from broker.keys import make_keys

    make_keys(tmp_path / "keys")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    done = cli("actor", "--broker", address, "--key", str(tmp_path / "keys" / "actor.key"))
    assert done.returncode == 3
    assert f"no answer from the broker at {address}" in done.stderr


def test_a_port_in_use_is_an_error_that_names_it(cli: Any, write_config: Callable[..., Path], settings: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = cli("up", str(write_config(settings(broker={"address": address}))))
    assert done.returncode != 0
    assert f"cannot listen on {address}" in done.stderr


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_reward_that_always_fails_halts_the_run_with_the_reason_and_trains_on_nothing(
    cli: Any, write_config: Callable[..., Path], settings: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    config = settings(task={"name": f"tests.system.broken_tasks:{kind.capitalize()}"})
    done = cli("up", str(write_config(config)), "--directory", str(tmp_path / "run"))
    assert done.returncode == 5, done.stderr
    assert "tickets in a row failed" in done.stderr
    assert {"raises": "the scorer broke", "nan": "nan"}[kind] in done.stderr
    done = cli("report", "--run", str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert summary["steps"] == 0
    assert summary["broken_promises"] == []
    assert summary["tickets_failed"] >= 4


def test_a_reward_that_fails_sometimes_costs_only_its_own_tickets(train: Any, settings: Callable[..., Any]) -> None:
    summary = train(settings(task={"name": "tests.system.broken_tasks:Sometimes"}, run={"steps": 6}))
    assert summary["steps"] == 6
    assert summary["tickets_failed"] > 0
    assert summary["tickets_consumed"] == 6 * 4
    assert summary["broken_promises"] == []


def test_completions_that_fill_their_budget_are_trained_on(train: Any, settings: Callable[..., Any], tmp_path: Path) -> None:
    summary = train(settings(rollout={"max_tokens": 1}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["steps"] == 4
    assert all(row["completion_length"] == 1 for row in rows if "reward" in row)
    assert any(row["full_budget_share"] > 0.5 for row in rows if "reward" in row)


def test_a_policy_whose_tokenizer_has_no_end_token_is_refused_by_name(
    cli: Any, write_config: Callable[..., Path], settings: Callable[..., Any], tiny_policy: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(tiny_policy, endless)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        data = json.loads((endless / name).read_text())
        data = {key: value for key, value in data.items() if not key.startswith("eos_token")}
        (endless / name).write_text(json.dumps(data))
    done = cli("up", str(write_config(settings(policy={"path": str(endless)}))))
    assert done.returncode != 0
    assert "names a token that ends a completion" in done.stderr
    assert "eos_token" in done.stderr
