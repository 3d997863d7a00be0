"""What an actor behind a slow link that is cut time after time costs the others: an actor beside the broker samples as fast as without it.

    python bench/slow_link.py [--rate 1e6] [--cuts 20] [--pairs 5] [--seconds 14] [--before 20]

An ordinary `cli.py up` without actors, one `cli.py actor` beside the broker, and one that reaches it by a proxy that carries `--rate` bytes a
second and cuts all connections `--cuts` times. The policy has 21 MB in bf16, its reward is a coin, so every update changes nearly all of it.
max_lag is small, so the slow actor gets few tickets: it costs what its downloads cost, and hardly shares the work.

The fast actor has a core of its own. Windows of `--seconds` in which the link carries files and in which it does not take turns, since other work
on the machine comes and goes; the beginning of each is left out, and so is the time for which that core was given to other processes than the fast
actor (its waiting for anything counts). Before them the slow actor fetches the policy, while memory is watched. (Once there are more than 16
versions the broker folds an anchor, and `growth` says what that takes.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.random_policy import FixedLength, make_policy  # noqa: E402
from broker.control import ControlClient  # noqa: E402
from broker.keys import load_key  # noqa: E402
from broker.sockets import Channel  # noqa: E402
from protocol.facts import GroupAccepted, VersionPublished  # noqa: E402
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts  # noqa: E402
from protocol.messages import RunStatus  # noqa: E402
from tasks.base import Problem  # noqa: E402
from tests.faults.link import Link  # noqa: E402

LEFT_OUT_SECONDS = 2.0
DEADLINE_SECONDS = 240.0
CONFIG = """
[run]
name = "slow-link"
steps = 100000
[policy]
path = "{policy}"
max_lag = 2
[task]
name = "bench.slow_link:Coins"
prompt_words = 4
[rollout]
group_size = 2
groups_per_batch = 32
max_tokens = 64
[actor]
num_actors = 0
engine = "transformers"
[learner]
lr = 3e-4
eval_every = 0
eval_prompts = 2
checkpoint_every = 100000
"""


class Coins(FixedLength):
    """Reward: 0 or 1, by a digest of the completion."""

    def reward(self, problem: Problem, completion: str) -> float:
        return float(blake3.blake3(completion.encode()).digest(length=1)[0] & 1)


class Bench:
    """The run and its processes."""

    def __init__(self, folder: Path) -> None:
        self.directory, self._folder = folder / "run", folder
        self._environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "config.toml").write_text(CONFIG.format(policy=make_policy(folder / "policy", "20mb")))
        self.up = self._start("1", "up", str(folder / "config.toml"), "--directory", str(self.directory))
        wait("the broker", (self.directory / "broker.json").exists)
        self.address: str = json.loads((self.directory / "broker.json").read_bytes())["address"]
        self.control = ControlClient(self.address, load_key(self.directory / "keys" / "admin.key"))

    def join(self, name: str, core: str, address: str) -> psutil.Process:
        """An actor with a cache of its own."""
        self._environment["XDG_CACHE_HOME"] = str(self._folder / f"cache-{name}")
        key = str(self.directory / "keys" / "actor.key")
        return psutil.Process(self._start(core, "actor", "--name", name, "--broker", address, "--key", key).pid)

    def _start(self, core: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["taskset", "--cpu-list", core, sys.executable, str(ROOT / "cli.py"), *arguments]
        with (self._folder / f"{arguments[0]}-{len(self.processes)}.txt").open("w") as log:
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT))
        return self.processes[-1]

    def broker(self) -> psutil.Process:
        """The broker's process."""
        return next(child for child in psutil.Process(self.up.pid).children(recursive=True) if "broker" in child.cmdline())

    def status(self) -> RunStatus:
        """What the broker says."""
        return self.control.status()

    def version_of(self, name: str) -> int:
        """The version that an actor samples from."""
        return next((actor.version for actor in self.status().actors if actor.name == name), -1)

    def end(self) -> None:
        """End everything in order, or else kill it."""
        self.control.stop("measured")
        self.control.close()
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(what: str, condition: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {what} for {DEADLINE_SECONDS:.0f} s")
        meanwhile()
        time.sleep(0.02)


class Window(NamedTuple):
    """A part of the run: wall clock from 1970, and seconds that the fast actor's core was there for it."""

    begin: float
    end: float
    available: float


def let_pass(seconds: float, fast: psutil.Process) -> Window:
    """Let a window pass; the part of it that counts."""
    time.sleep(LEFT_OUT_SECONDS)
    begin, others = time.time(), _others_seconds(fast)
    time.sleep(seconds - LEFT_OUT_SECONDS)
    end = time.time()
    return Window(begin, end, end - begin - (_others_seconds(fast) - others))


def _others_seconds(fast: psutil.Process) -> float:
    """Seconds for which the fast actor's core has been busy with anything else."""
    core, own = psutil.cpu_times(percpu=True)[0], fast.cpu_times()
    return sum(core) - core.idle - core.iowait - core.guest - core.guest_nice - own.user - own.system


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it; the figures."""
    bench = Bench(folder)
    try:
        return _measure(options, bench)
    finally:
        bench.end()


def _measure(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    fast = bench.join("fast", "0", bench.address)
    wait("the first steps", lambda: bench.status().step >= 2)
    windows = {"before": [let_pass(options.before, fast)], "held": [], "carrying": []}
    base_bytes = (bench.directory.parent / "policy" / "model.safetensors").stat().st_size
    carrying_bytes = options.rate * options.seconds * options.pairs
    cuts = [int(base_bytes + carrying_bytes * part / (options.cuts + 1)) for part in range(1, options.cuts - 3)]
    cuts = [base_bytes * part // 5 for part in range(1, 5)] + cuts
    with Link(bench.address, options.rate, cuts) as link:
        processes = {"actor": bench.join("slow", "1", link.address), "broker": bench.broker()}
        started = time.monotonic()
        wait("the first megabyte", lambda: link.num_bytes[Channel.BLOBS] > 1 << 20)
        before = {name: process.memory_info().rss for name, process in processes.items()}
        peak = dict(before)

        def watch() -> None:
            for name, process in processes.items():
                peak[name] = max(peak[name], process.memory_info().rss)

        wait("the policy", lambda: link.num_bytes[Channel.BLOBS] > base_bytes - (1 << 20), watch)
        wait("the first version", lambda: bench.version_of("slow") >= 0)
        arrival, num_versions = time.monotonic() - started, bench.status().num_versions
        versions: list[tuple[int, int]] = []
        for pair in range(options.pairs):
            for kind in ("carrying", "held")[:: 1 if pair % 2 else -1]:  # in turns, so that neither is always the later one
                (link.hold if kind == "held" else link.release)(Channel.BLOBS)
                windows[kind].append(let_pass(options.seconds, fast))
            versions.append((bench.version_of("slow"), bench.status().num_versions - 1))
        link.release(Channel.BLOBS)
        target = bench.status().num_versions - 1
        started = time.monotonic()
        wait("the newest version", lambda: bench.version_of("slow") >= target)
        caught_up = time.monotonic() - started
        carried = link.num_bytes[Channel.BLOBS]
        num_cuts = link.num_cuts
    return {
        "cuts": num_cuts,
        "carried_bytes": carried,
        "growth": {name: peak[name] - before[name] for name in peak},
        "versions_meanwhile": num_versions,
        "policy_bytes": base_bytes,
        "seconds_to_first_version": arrival,
        "seconds_to_catch_up": caught_up,
        "versions_held_and_newest": versions,
        **rates(bench.directory, windows),
    }


def rates(directory: Path, windows: dict[str, list[Window]]) -> dict[str, Any]:
    """Tokens per second of the fast actor in each kind of window, and of each pair the ratio."""
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        entries = list(read_facts(journal, directory))
    groups = [(entry.time, entry.fact) for entry in entries if isinstance(entry.fact, GroupAccepted)]
    made = [(at, fact.num_tokens) for at, fact in groups if fact.actor == "fast"]
    deltas = [entry.fact.delta.size for entry in entries if isinstance(entry.fact, VersionPublished) and entry.fact.delta is not None]

    def rate(parts: list[Window]) -> float:
        tokens = sum(count for at, count in made for window in parts if window.begin <= at < window.end)
        return tokens / sum(window.available for window in parts)

    found = {name: rate(parts) for name, parts in windows.items()}
    return {
        "tokens_per_second": found,
        "core_available": {name: sum(w.available for w in parts) / sum(w.end - w.begin for w in parts) for name, parts in windows.items()},
        "carrying / held": found["carrying"] / found["held"],
        "windows": {name: [round(rate([window])) for window in parts] for name, parts in windows.items()},
        "pairs": [rate([one]) / rate([other]) for one, other in zip(windows["carrying"], windows["held"], strict=True)],
        "groups_of_the_slow_actor": sum(fact.actor == "slow" for _, fact in groups),
        "mean_delta_bytes": sum(deltas) / len(deltas),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1e6)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=14.0)
    parser.add_argument("--before", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    for name, value in found.items():
        print(f"{name:<28} {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
