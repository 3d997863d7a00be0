"""The whole loop on one machine at real size: a vLLM actor and a learner (sharing an accelerator if there is one), random weights.

    python bench/gpu_loop.py [--size 1b] [--updates 20] [--groups 8] [--group 8] [--tokens 256] [--memory 0.3] [--lag 1]

It is an ordinary `cli.py up`. Printed per update: bytes, ratio to the i.i.d. bound, and the seconds of each part, from the run's own record:
the learner's (round, copy, encode, gather, upload: journal) and the actor's (fetch, stage, pause, writing: its log).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.random_policy import make_policy  # noqa: E402
from protocol.facts import StepCommitted, VersionPublished  # noqa: E402
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts  # noqa: E402

_ARRIVAL = re.compile(
    r"version (\d+) \(step \d+\): (\d+) B fetched in ([\d.]+) s, staged in ([\d.]+) s, "
    r"generation stopped for ([\d.]+) s, ([\d.]+) s of it writing"
)


def configuration(policy: Path, options: argparse.Namespace) -> str:
    """The run as TOML."""
    return f"""
[run]
name = "gpu-loop"
steps = {options.updates}
[policy]
path = "{policy}"
max_lag = {options.lag}
[task]
name = "bench.random_policy:FixedLength"
length = {options.tokens}
[rollout]
group_size = {options.group}
groups_per_batch = {options.groups}
max_tokens = {options.tokens}
[actor]
num_actors = 1
engine = "vllm"
memory_share = {options.memory}
max_sequences = {options.group * options.groups * 2}
[learner]
lr = 1e-6
eval_every = 0
eval_prompts = 2
checkpoint_every = 100000
tokens_per_microbatch = 4096
threads = {options.threads}
compact_deltas = {str(options.compact).lower()}
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run it; the figures of each update."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        policy = make_policy(Path(folder) / "policy", options.size)
        config, directory = Path(folder) / "config.toml", Path(folder) / "run"
        config.write_text(configuration(policy, options))
        command = [sys.executable, str(ROOT / "cli.py"), "up", str(config), "--directory", str(directory)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            for log in sorted((directory / "logs").glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-6000:]}")
            raise SystemExit(f"the run ended with {done.returncode}")
        return figures(directory)


def figures(directory: Path) -> dict[str, Any]:
    """What the record of a run says about its updates."""
    path = directory / JOURNAL_NAME
    connection = open_read_only(path)
    facts = [entry.fact for entry in read_facts(connection, path)]
    versions = [fact for fact in facts if isinstance(fact, VersionPublished) and fact.delta is not None]
    steps = [fact.metrics for fact in facts if isinstance(fact, StepCommitted)]
    log = "".join(path.read_text() for path in (directory / "logs").glob("actor-*.log"))
    arrivals = {int(match[1]): [float(part) for part in match.groups()[1:]] for match in _ARRIVAL.finditer(log)}
    rows = []
    for fact in versions:
        assert fact.delta is not None
        row: dict[str, Any] = {
            "version": fact.version.number,
            "bytes": fact.delta.size,
            "full / bytes": fact.full_bytes / fact.delta.size,
            "bytes / bound": fact.delta.size / max(1, fact.bound_bytes),
            **fact.seconds,
        }
        if fact.version.number in arrivals:
            row |= dict(zip(("fetched B", "fetch", "stage", "pause", "writing"), arrivals[fact.version.number], strict=True))
        rows.append(row)
    return {
        "full_bytes": versions[0].full_bytes if versions else 0,
        "updates": rows,
        "first load": arrivals.get(0),
        "seconds_training": statistics.median(step["seconds_training"] or 0 for step in steps),
        "seconds_publishing (held up)": [round(step.get("seconds_publishing") or 0, 4) for step in steps],
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    columns = [
        "version", "bytes", "full / bytes", "bytes / bound", "round", "copy", "encode", "gather", "upload", "fetch", "stage", "pause", "writing",
    ]  # fmt: skip
    print(" ".join(f"{name:>13}" for name in columns))
    for row in found["updates"]:
        print(" ".join(f"{row[name]:13.3f}" if isinstance(row.get(name), float) else f"{row.get(name, '-'):>13}" for name in columns))
    medians = {
        name: statistics.median(values) for name in columns[1:] if (values := [row[name] for row in found["updates"] if name in row])
    }
    print(" ".join(f"{'median':>13}" if name == "version" else f"{medians.get(name, float('nan')):13.3f}" for name in columns))
    print({key: value for key, value in found.items() if key != "updates"})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.3)
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--compact", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    found = run(options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
