"""A sweep makes every run once, however often it is ended and started again, and leaves nothing running."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.sweep import Sweep, difference
from learner.stability.files import with_calibration, write_calibration
from learner.stability.rule import Calibration, Measured
from protocol.config import config_json, overridden, parse_config
from protocol.errors import ConfigError
from protocol.sweep import load_sweep

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 120.0
SHORT, OTHER = "cycles-clip-S1-lr0.001-seed0", "cycles-clip-S1-lr0.002-seed0"
ENDLESS = {"run.steps": 1_000_000}


class Files:
    """The files of a sweep of two runs, SHORT and OTHER, and what is in its folder."""

    def __init__(self, folder: Path, base: dict[str, Any]) -> None:
        self.path, self.runs = folder / "sweep.toml", folder / "runs" / "s"
        (folder / "base.json").write_text(json.dumps(base))

    def write(self, other: dict[str, Any], head: str = "parallel = 1") -> Path:
        """The sweep's file, with fields that are set for OTHER alone."""
        fields = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in other.items())
        self.path.write_text(
            f'name = "s"\nconfig = "base.json"\ndirectory = "{self.runs.parent}"\n{head}\n'
            f"[[grids]]\nlags = [1]\nlearning_rates = [1e-3]\n"
            f"[[grids]]\nlags = [1]\nlearning_rates = [2e-3]\nset = {{{fields}}}\n"
        )
        return self.path

    def under_way(self, name: str) -> bool:
        return (self.runs / f".{name}.partial" / name / "journal.sqlite").exists()

    def done(self) -> dict[str, int]:
        """The finished runs, and when they were finished."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.runs.glob("[!.]*/summary.json")}


@pytest.fixture
def files(settings: Callable[..., Any], tmp_path: Path) -> Files:
    run = {"steps": 2, "directory": str(tmp_path / "runs")}
    return Files(tmp_path, settings(run=run, policy={"max_lag": None}, learner={"eval_prompts": 2}))


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[[Path], psutil.Popen]]:
    """Start `cli.py sweep` in the background; whatever is left of it at the end of the test is killed."""
    started: list[psutil.Popen] = []

    def run(sweep: Path) -> psutil.Popen:
        with (tmp_path / f"output-{len(started)}.txt").open("w") as output:
            command = [sys.executable, str(ROOT / "cli.py"), "sweep", str(sweep)]
            started.append(
                psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], bool], process: psutil.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, "the sweep has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)  # a file that appears has no event to wait for


def everything(process: psutil.Popen) -> list[psutil.Process]:
    found: list[psutil.Process] = process.children(recursive=True)
    assert found
    return found


def assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"left running: {[process.cmdline() for process in alive]}"


@pytest.mark.system
def test_a_sweep_that_is_ended_goes_on_with_what_is_left_and_leaves_nothing_running(
    files: Files, begin: Callable[[Path], psutil.Popen], cli: Any
) -> None:
    sweep = begin(files.write(ENDLESS))
    until(lambda: SHORT in files.done() and files.under_way(OTHER), sweep)
    first, runs = files.done(), everything(sweep)
    assert first.keys() == {SHORT}
    sweep.kill()
    sweep.wait()
    assert_all_gone(runs)

    sweep = begin(files.path)
    until(lambda: bool(sweep.children()) and files.under_way(OTHER), sweep)  # what the killed one left is gone before a child is there
    runs = everything(sweep)
    second = cli("sweep", str(files.path))
    assert second.returncode == 2 and "another `sweep` is at work on it" in second.stderr
    sweep.terminate()
    assert sweep.wait(DEADLINE_SECONDS) == 128 + signal.SIGTERM
    assert_all_gone(runs)
    assert files.done() == first, "nothing was done again, and what did not end is not done"

    done = cli("sweep", str(files.write({})))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 1 of them done" in done.stdout and f"2/2 {OTHER}: " in done.stdout
    assert files.done().keys() == {SHORT, OTHER} and files.done()[SHORT] == first[SHORT]
    assert sorted(path.name for path in files.runs.iterdir()) == [SHORT, OTHER, "sweep.lock"]
    assert (files.runs / OTHER / "sweep.log").exists()
    assert json.loads((files.runs / OTHER / "run.json").read_bytes())["run"] == OTHER
    assert not (files.runs.parent / "latest").is_symlink(), "a run of a sweep is not what other commands are about"
    before = files.done()
    again = cli("sweep", str(files.path))
    assert again.returncode == 0 and "2 runs, 2 of them done" in again.stdout
    assert files.done() == before


@pytest.mark.system
def test_a_run_that_fails_is_named_with_its_log_and_tried_again_and_one_that_collapsed_is_done(files: Files, cli: Any) -> None:
    fading = {"run.steps": 40, "task.name": "tests.deploy.fading_task:Fades"}
    done = cli("sweep", str(files.write({**fading, "task.no_such_option": 1})))
    log = files.runs / f"{OTHER}.log"
    assert done.returncode == 1
    assert f"2/2 {OTHER}: FAILED: exit code 2, see {log}" in done.stdout
    assert f"1 of 2 runs failed: {OTHER}" in done.stderr
    assert "no_such_option" in log.read_text()
    first = files.done()
    assert first.keys() == {SHORT}

    done = cli("sweep", str(files.write(fading)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 1 of them done" in done.stdout and "s, collapsed" in done.stdout
    assert files.done().keys() == {SHORT, OTHER} and files.done()[SHORT] == first[SHORT]
    summary = json.loads((files.runs / OTHER / "summary.json").read_bytes())
    assert "collapsed" in summary["outcome"] and 5 <= summary["steps"] < 40
    assert not log.exists(), "it is in the run's folder"
    assert "2 of them done" in cli("sweep", str(files.path)).stdout


@pytest.mark.system
def test_a_run_that_somebody_ended_early_is_not_done(files: Files, begin: Callable[[Path], psutil.Popen], tmp_path: Path) -> None:
    sweep = begin(files.write(ENDLESS, 'mode = "processes"\nparallel = 2'))
    until(lambda: SHORT in files.done() and files.under_way(OTHER), sweep)
    (up,) = sweep.children()
    runs = everything(sweep)
    up.send_signal(signal.SIGINT)
    assert sweep.wait(DEADLINE_SECONDS) == 1
    assert f"{OTHER}: FAILED: ended after " in (tmp_path / "output-0.txt").read_text()
    assert files.done().keys() == {SHORT}
    assert_all_gone(runs)


# --- without processes: the folder is as if the runs had been made


def pretend_done(files: Files) -> list[str]:
    """Give all runs of the sweep a folder; then start it, and return what it says."""
    for plan in load_sweep(files.path)[1]:
        (files.runs / plan.name).mkdir(parents=True, exist_ok=True)
        (files.runs / plan.name / "config.json").write_text(config_json(with_calibration(plan.config)))
        (files.runs / plan.name / "summary.json").write_text("{}")
    return start(files)


def start(files: Files) -> list[str]:
    settings, plans = load_sweep(files.path)
    said: list[str] = []
    Sweep(settings, plans, settings.folder, said.append).go()
    return said


def test_a_run_of_another_configuration_under_the_same_name_is_refused(files: Files) -> None:
    files.write({})
    assert pretend_done(files) == [f"2 runs, 2 of them done; 1 at a time in {files.runs}"]
    files.write({"learner.eval_prompts": 3})
    with pytest.raises(ConfigError) as caught:
        start(files)
    assert (caught.value.field, caught.value.value) == ("learner.eval_prompts", 3)
    assert str(files.runs / OTHER) in str(caught.value) and "with 2 in this place" in str(caught.value)


def test_a_run_that_has_its_calibration_s_content_is_done_by_the_file_that_it_came_from(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(Calibration(batch=Measured(2.0, 1.0, 4.0)), path)
    files.write({"stability.calibration": str(path)})
    assert "2 of them done" in pretend_done(files)[0]
    write_calibration(Calibration(batch=Measured(3.0, 1.0, 4.0)), path)
    with pytest.raises(ConfigError, match=r"stability\.calibration"):
        start(files)


def test_what_a_killed_sweep_left_is_removed(files: Files) -> None:
    files.write({})
    pretend_done(files)
    (files.runs / f".{OTHER}.partial" / OTHER).mkdir(parents=True)
    (files.runs / f".{OTHER}.json").touch()
    start(files)
    assert sorted(path.name for path in files.runs.iterdir()) == [SHORT, OTHER, "sweep.lock"]


def test_a_second_sweep_in_the_same_folder_is_refused(files: Files) -> None:
    files.write({})
    files.runs.mkdir(parents=True)
    with (files.runs / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another `sweep` is at work on it"):
            pretend_done(files)
    assert "2 of them done" in pretend_done(files)[0]


def test_a_folder_that_cannot_be_made_is_named(files: Files) -> None:
    files.write({})
    files.runs.parent.mkdir()
    files.runs.write_text("a file")
    with pytest.raises(ConfigError) as caught:
        start(files)
    assert caught.value.value == str(files.runs)


def test_the_first_field_that_differs_is_named_with_both_values(settings: Callable[..., Any]) -> None:
    config = parse_config(settings())
    assert difference(config, parse_config(settings())) is None
    assert difference(config, overridden(config, ["learner.lr=7.0", "run.seed=9"])) == ("run.seed", 3, 9)
    assert difference(config, overridden(config, ["task.length=2"])) == ("task.length", None, 2)
    assert difference(overridden(config, ["task.length=2"]), config) == ("task.length", 2, None)
