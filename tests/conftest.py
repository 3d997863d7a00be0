"""Fixtures that several rooms share: a tiny random policy, and whole runs as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.random_policy import save_random_llama

ROOT = Path(__file__).resolve().parent.parent
UP_SECONDS = 240
SYSTEM_WEIGHT = 10
"""A test that starts real processes takes at least as long as this many others."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", action="store_true", help="the long versions: minutes of random faults, thousands of seeds, a million inputs"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, whole: a worker that began one at the end would go on alone. `make test` has xdist keep this order."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += SYSTEM_WEIGHT if item.get_closest_marker("system") else 1
    items.sort(key=lambda item: (-weights[item.path], item.path))


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the long version was asked for, `make soak`."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama of 20,000 parameters and a character tokenizer."""
    return save_random_llama(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1, num_heads=2)


@pytest.fixture(scope="session")
def settings(tiny_policy: Path) -> Callable[..., dict[str, Any]]:
    """The configuration of a short run on the tiny policy, with sections overridden."""

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, dict[str, Any]] = {
            "run": {"name": "test", "steps": 4, "seed": 3},
            "policy": {"path": str(tiny_policy), "max_lag": 0},
            "task": {"name": "examples.own_task:EvenDigits"},
            "rollout": {"group_size": 4, "groups_per_batch": 4, "max_tokens": 6},
            "actor": {"num_actors": 1, "engine": "transformers"},
            "learner": {"ranks": 1, "lr": 1e-3, "eval_every": 0, "eval_prompts": 8, "checkpoint_every": 2},
        }
        for name, values in sections.items():
            base[name] = base.get(name, {}) | values
        return base

    return make


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A TOML file with a configuration."""

    def write(config: dict[str, Any]) -> Path:
        path = tmp_path / "config.toml"
        lines = []
        for section, values in config.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with an empty cache."""
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def cli(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the command line to its end."""

    def run(*arguments: str, timeout: float = UP_SECONDS) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cli.py"), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def train(cli: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A whole run by `cli.py up`; returns its summary."""

    def run(config: dict[str, Any], name: str = "run", *flags: str) -> dict[str, Any]:
        directory = tmp_path / name
        done = cli("up", str(write_config(config)), "--directory", str(directory), *flags)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{all_logs(directory)}"
        found: dict[str, Any] = json.loads((directory / "summary.json").read_bytes())
        return found

    return run


def all_logs(directory: Path) -> str:
    """The logs of a run, for a failed assertion."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((directory / "logs").glob("*.log")))
