"""`replay RUN`: the learner, the real one under torchrun, over the batches that a run recorded. No actors, no broker; the run is only read.

A run whose learner died is replayed in segments (broker.history), each with the world size and configuration that it had; the checkpoint that ends
one is where the next begins, as in the run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from broker.blobs import BlobStore
from broker.history import History, Segment, read_history
from broker.replay import Replayed, ReplayPort, ReplayResult, StepRow
from deploy.local import math_threads
from deploy.prepare import CLI
from deploy.replay_report import explain
from deploy.rundir import RunDirectory, assemble_policy
from deploy.wiring import build_learner, learner_device
from learner.rollback import recorded_in, write_rollbacks
from protocol.config import Config, config_json, overridden, parse_config_json
from protocol.errors import CheckpointError, ConfigError, ReplayDiffers, SlipstreamError
from protocol.journal import JOURNAL_NAME

if TYPE_CHECKING:
    from learner.ranks import Ranks

TOLERANCE = 1.0
"""Drift within which versions of another machine, world size or library count as the same run; docs/replay.md says what was seen."""
NEVER = 1 << 40
PROGRESS_SECONDS = 5.0
CHANGEABLE = ("learner", "loss")
"""Sections that a what-if may change: everything else is in the recorded data already."""
Say = Callable[[str], None]
Launch = Callable[[Path, int, int], int]
"""Runs what a plan's file says, with so many ranks of so many threads each, to its end; returns the exit code."""


class ReplayOptions(msgspec.Struct, frozen=True):
    """What of a run to replay, and how. `end` is exclusive."""

    first: int = 0
    end: int | None = None
    overrides: list[str] = []
    stepping: bool = False
    num_ranks: int | None = None
    tolerance: float = TOLERANCE
    out: Path | None = None


class RankPlan(msgspec.Struct, frozen=True):
    """What every rank of a replaying learner is told, as a file. `folder` has checkpoints/ to start from, and takes what comes of it."""

    run: str
    directory: str
    policy: str
    folder: str
    first: int
    """The first step of interest; what lies between it and the checkpoint is replayed without a word."""
    end: int
    config: str
    how: Replayed
    stepping: bool


class Replay(msgspec.Struct):
    """What a replay came to, all segments together."""

    history: History
    first: int
    end: int
    wall_seconds: float
    results: list[ReplayResult]
    rows: list[StepRow]
    overrides: list[str]


def run_ranks(plan: Path, num_ranks: int, num_threads: int) -> int:
    """Run the ranks of a replaying learner to their end: one by itself, several under torchrun. The exit code."""
    command = [str(CLI), "replay-rank", "--plan", str(plan)]
    if num_ranks > 1:
        command = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", "0",
            "--log-dir", str(plan.parent / "torchrun"), *command,
        ]  # fmt: skip
    return subprocess.run([sys.executable, *command], env=os.environ | math_threads(num_threads), check=False).returncode


def replay_run(directory: Path, options: ReplayOptions, say: Say, launch: Launch = run_ranks) -> Replay:
    """Replay the steps that `options` name. Raises ConfigError, JournalError, ReplayDiffers at the first version that is not the recorded one."""
    run = RunDirectory(directory)
    policy_files = run.manifest().policy_files
    history = read_history(directory / JOURNAL_NAME)
    end = _end(history, options)
    configs = [_config(segment, options.overrides) for segment in history.segments]
    started = time.monotonic()
    with _folder(options.out) as folder:
        policy = folder / "policy"
        assemble_policy(policy_files, BlobStore(directory / "blobs"), policy)
        first, checkpoint = _start(run, history, options.first)
        say(f"replaying steps {first} to {end - 1} of run {history.run}" + (f", from {checkpoint}" if checkpoint else ", from its policy"))
        if options.overrides:
            say(f"what if {' '.join(options.overrides)}: off-policy, since the data were sampled by the run's policies and not by this one")
        replay = Replay(history, first, end, 0.0, [], [], options.overrides)
        for segment, config in zip(history.segments, configs, strict=True):
            if segment.end > first and segment.first < end:
                place = folder / f"steps-{max(segment.first, first):08d}"
                plan = RankPlan(
                    history.run, str(directory.resolve()), str(policy), str(place), options.first, min(segment.end, end), config_json(config),
                    Replayed(not options.overrides, options.tolerance), options.stepping,
                )  # fmt: skip
                write_rollbacks(place / "checkpoints", recorded_in(segment.environment))
                checkpoint = _replay_segment(plan, checkpoint, options.num_ranks or segment.world_size, launch, replay)
                if replay.results[-1].end < plan.end:  # it differs, or a person has quit
                    break
        if options.out is not None:
            _write_metrics(folder / "metrics.jsonl", replay)
    replay.wall_seconds = time.monotonic() - started
    if replay.results[-1].difference is not None:
        raise ReplayDiffers(explain(replay.results[-1].difference))
    return replay


def _end(history: History, options: ReplayOptions) -> int:
    """The step before which to stop. Raises ConfigError for steps that the recording does not have."""
    recorded = history.num_steps
    if not recorded:
        raise ConfigError("RUN", history.run, "has no step in its journal", "let it train first")
    if not 0 <= options.first < recorded:
        raise ConfigError("--from", options.first, f"is not among the {recorded} steps recorded", f"a step from 0 to {recorded - 1}")
    if options.end is not None and not options.first < options.end <= recorded:
        raise ConfigError("--to", options.end, f"is not after --from and among the {recorded} steps recorded", f"at most {recorded}")
    end = recorded if options.end is None else options.end
    reuse = parse_config_json(history.config).pacing.reuse
    if end % reuse and end < recorded:
        below = end - end % reuse
        fix = f"{below} or {below + reuse}" if below > options.first else str(below + reuse)
        raise ConfigError("--to", end, f"is in the middle of a batch, which is used for {reuse} steps", fix)
    return end


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="slipstream-replay-") as folder:
            yield Path(folder)
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError("--out", str(out), "is there already and not empty", "name a folder that is not there")
    out.mkdir(parents=True, exist_ok=True)
    yield out.resolve()


def _start(run: RunDirectory, history: History, first: int) -> tuple[int, Path | None]:
    """The newest checkpoint of the run at or before step `first`, and its step; without one step 0."""
    from learner.damage import damage, list_checkpoints, load_state

    for checkpoint in reversed(list_checkpoints(run.checkpoints)):
        with contextlib.suppress(CheckpointError):
            state = load_state(checkpoint, history.run)
            number = history.version_at(state.version.step) if state.version.step <= state.step <= first else None
            # A checkpoint of steps that were done again, and came out otherwise, has a version that is not the run's.
            is_ours = number is not None and history.publications.by_number[number].version.root == state.version.root
            if is_ours and not damage(checkpoint):
                return state.step, checkpoint.resolve()
    return 0, None


def _replay_segment(plan: RankPlan, checkpoint: Path | None, num_ranks: int, launch: Launch, replay: Replay) -> Path:
    """Replay one segment; the checkpoint it ended with."""
    folder = Path(plan.folder)
    checkpoints = folder / "checkpoints"
    if checkpoint is not None:
        (checkpoints / checkpoint.name).symlink_to(checkpoint)
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    code = launch(folder / "plan.json", num_ranks, parse_config_json(plan.config).learner.threads)
    if code:
        raise SlipstreamError(f"the replaying learner ended with exit code {code}; the lines above say why")
    replay.results.append(msgspec.json.decode((folder / "result.json").read_bytes(), type=ReplayResult))
    with (folder / "steps.jsonl").open("rb") as lines:
        replay.rows += [msgspec.json.decode(line, type=StepRow) for line in lines]
    return sorted(checkpoints.glob("step-*"))[-1]


def _config(segment: Segment, overrides: list[str]) -> Config:
    """The configuration of a segment, changed as a what-if asks. Raises ConfigError for what the recorded data do not leave open."""
    for override in overrides:
        if override.partition("=")[0].strip() == "learner.ranks":
            raise ConfigError("--set", override, "is not a setting of what is trained", "--ranks N")
        if override.partition(".")[0].strip() not in CHANGEABLE:
            raise ConfigError(
                "--set", override, "cannot be changed: the recorded data were made with it", "change fields of [learner] or [loss]"
            )
    config = overridden(parse_config_json(segment.config), overrides)
    # The only checkpoint that matters is the last one, and that is written in any case. What the run did about a collapse, its sessions tell.
    learner = config.learner.model_copy(update={"checkpoint_every": NEVER})
    return config.model_copy(update={"learner": learner, "stability": config.stability.model_copy(update={"on_collapse": "continue"})})


def _write_metrics(path: Path, replay: Replay) -> None:
    """Each step's metrics beside the recorded ones."""
    with path.open("wb") as file:
        for row in replay.rows:
            both = {"step": row.step, "off_policy": bool(replay.overrides), "recorded": replay.history.steps[row.step].metrics}
            file.write(msgspec.json.encode(both | {"replayed": row.metrics}) + b"\n")


# --- in the ranks


def replay_rank(path: Path, ranks: Ranks | None = None) -> None:
    """One rank of a replaying learner: of `ranks`, by default torchrun's if it was started by that, and alone otherwise."""
    import torch

    from learner.ranks import OneRank, TorchRanks, under_torchrun

    plan = msgspec.json.decode(path.read_bytes(), type=RankPlan)
    config = parse_config_json(plan.config)
    device = learner_device(config)
    torch.set_num_threads(config.learner.threads)
    ranks = ranks or (TorchRanks(device) if under_torchrun() else OneRank())
    with (Path(plan.folder) / "steps.jsonl").open("ab") as rows:
        port, observer = _port(plan, rows) if ranks.rank == 0 else None, None
        if plan.stepping and port is not None:
            from deploy.step_console import StepConsole

            observer = StepConsole(port, Path(plan.policy), config, plan.first, input, _say)
        # A what-if evaluates, since its weights are its own; a replay of the run has the run's own evaluations.
        learner = build_learner(
            config, plan.run, Path(plan.policy), Path(plan.folder) / "checkpoints", ranks, port, device,
            evaluates=not plan.how.compare, observer=observer,
        )  # fmt: skip
        learner.run()
    if port is not None:
        (Path(plan.folder) / "result.json").write_bytes(msgspec.json.encode(port.result))
    if isinstance(ranks, TorchRanks):
        ranks.close()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _port(plan: RankPlan, rows: Any) -> ReplayPort:
    journal = Path(plan.directory) / JOURNAL_NAME
    told_at = time.monotonic()

    def on_step(row: StepRow) -> None:
        nonlocal told_at
        rows.write(msgspec.json.encode(row) + b"\n")
        if not plan.stepping and time.monotonic() - told_at > PROGRESS_SECONDS:
            told_at = time.monotonic()
            _say(
                f"step {row.step + 1} of {plan.end}"
                + (f", {port.result.num_equal} of {port.result.num_compared} roots equal" * plan.how.compare)
            )

    port = ReplayPort(
        journal, read_history(journal), RunDirectory(Path(plan.directory)).manifest().policy_files, plan.end, plan.how, _say, on_step
    )
    return port
