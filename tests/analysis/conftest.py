"""Recordings to look at: an eventful one, made once, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from protocol.errors import SlipstreamError
from tests.analysis.recorded import record_eventful


@pytest.fixture(scope="session")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run in which everything has happened; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    record_eventful(folder)
    return folder


@pytest.fixture
def copy(eventful: Path, tmp_path: Path) -> Path:
    """A copy of the eventful run, to be damaged."""
    return Path(shutil.copytree(eventful, tmp_path / "copy"))


@pytest.fixture
def inspect() -> Callable[..., Result]:
    """`cli.py inspect` with arguments, as a command that succeeds; `code` expects another exit code, or raises the error that sets it."""

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
        if isinstance(result.exception, SlipstreamError):
            raise result.exception
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run
