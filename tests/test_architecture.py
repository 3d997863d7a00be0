"""The house: what may be imported where, how long things may be, and how quickly the command line answers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.config import Config

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["protocol", "broker", "tasks", "actor", "learner", "deploy", "analysis"]
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "cli.py"]


@pytest.mark.parametrize("room", ["protocol", "broker", "tasks", "analysis", "deploy", "cli"])
def test_a_room_without_torch_does_not_load_it(room: str) -> None:
    """Importing every module of the room, and of what it imports, leaves the heavy libraries unloaded."""
    modules = ["cli"] if room == "cli" else [f"{room}.{path.stem}" for path in (ROOT / room).glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print(*({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_composition_root_s_side_knows_the_command_line() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "cli" not in imported, path


def test_nothing_is_pickled() -> None:
    for path in SOURCES:
        text = path.read_text()
        for word in ("pickle", "recv_pyobj", "send_pyobj", "torch.load", "torch.save", "_object_list", "object_list("):
            assert word not in text, f"{path}: {word}"


def test_protocol_and_ledger_never_ask_the_clock_or_the_global_random_state() -> None:
    pure = [
        *(ROOT / "protocol").glob("*.py"),
        *(ROOT / "broker" / f"{name}.py" for name in ("ledger", "tickets", "publications", "session")),
    ]
    pure += [ROOT / "learner" / f"{name}.py" for name in ("objective", "advantage", "batch")]
    for path in pure:
        text = path.read_text()
        for word in ("import time", "time.time", "datetime", "import random", "np.random.seed", "torch.manual_seed"):
            assert word not in text, f"{path}: {word}"


def test_files_and_functions_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, f"{path} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        if path.stem != "__init__":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_number_of_settings_does_not_creep_up() -> None:
    num_fields = sum(len(section.annotation.model_fields) for section in Config.model_fields.values())  # type: ignore[union-attr]
    assert num_fields <= 80


@pytest.mark.parametrize("command", [[], ["up"], ["broker"], ["actor"], ["learner"], ["scale"], ["eval"], ["doctor"]])
def test_help_needs_no_heavy_library(command: list[str]) -> None:
    code = (
        f"import sys, cli\nsys.argv = ['cli.py', *{command!r}, '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
        "print('heavy', *({'torch', 'zmq', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy"


def test_every_example_is_valid() -> None:
    from protocol.config import load_config
    from protocol.sweep import load_sweep

    for path in (ROOT / "examples").glob("*.toml"):
        if "[[grids]]" in path.read_text():
            load_sweep(path)
        else:
            load_config(path)
