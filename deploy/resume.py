"""Going on with a run that was there before: what it had come to, which settings may change, and that nobody else is at work on it.

What may change is what nothing recorded rests on, see docs/decisions/009-what-a-resume-may-change.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from deploy.rundir import RunDirectory
from learner.damage import set_aside_damaged
from protocol.config import Config, overridden
from protocol.errors import ConfigError
from protocol.facts import AnyFact, LearnerStarted, RunEnded, RunStopping, StepCommitted
from protocol.journal import JOURNAL_NAME, open_read_only

MAY_CHANGE: Final = ("learner.", "loss.", "actor.", "broker.address")
STEPS: Final = "run.steps"
_decoder: Final = msgspec.json.Decoder[AnyFact](AnyFact)


class Past(NamedTuple):
    """What a journal says a run had come to. `step` is the next step, `lineage` the last learner session's, -1 before the first."""

    step: int = 0
    lineage: int = -1
    stopping: str = ""
    """Why it was being stopped or had ended; empty if it was under way."""
    has_ended: bool = False
    halted: str = ""


NOTHING: Final = Past()


def open_run(path: Path | None) -> RunDirectory:
    """The run in a directory. Raises ConfigError if there is none."""
    run = RunDirectory((path or Path()).resolve())
    try:
        run.manifest()
        run.config()
    except ConfigError as error:
        raise ConfigError("--resume", str(path), error.problem, "give the directory of a run, as `cli.py up` printed it") from None
    return run


def wanted_actors(run: RunDirectory, overrides: Sequence[str]) -> int | None:
    """The number of actors, if the overrides name it: it then stands above what `scale` asked for before."""
    named = any(override.partition("=")[0].strip() == "actor.num_actors" for override in overrides)
    return run.config().actor.num_actors if named else None


def look_back(run: RunDirectory) -> Past:
    """What the run in a directory had come to. Raises JournalError."""
    path = run.path / JOURNAL_NAME
    if not path.exists():
        return NOTHING
    with closing(open_read_only(path)) as journal:
        started, ended, stopping, stepped = (_last(journal, kind) for kind in (LearnerStarted, RunEnded, RunStopping, StepCommitted))
    has_ended = ended[0] > started[0]
    is_stopping = has_ended or stopping[0] > ended[0]
    began = started[1].step if started[1] is not None else 0
    return Past(
        step=stepped[1].step + 1 if stepped[0] > started[0] else began,
        lineage=started[1].lineage if started[1] is not None else -1,
        stopping=stopping[1].reason if is_stopping and stopping[1] is not None else "",
        has_ended=has_ended,
        halted=ended[1].halted if has_ended else "",
    )


def _last(journal: sqlite3.Connection, kind: type[Any]) -> tuple[int, Any]:
    """Number and content of the last fact of a kind; 0 and None if there is none."""
    row = journal.execute("SELECT lsn, body FROM events WHERE fact = ? ORDER BY lsn DESC LIMIT 1", (kind.__name__,)).fetchone()
    return (0, None) if row is None else (row[0], _decoder.decode(row[1]))


def changes(before: Config, after: Config, past: Past) -> dict[str, tuple[object, object]]:
    """The fields that differ, with both values. Raises ConfigError for one that may not change."""
    found = {}
    old, new = _fields(before), _fields(after)
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            _check_change(name, old.get(name), new.get(name), before, past)
            found[name] = (old.get(name), new.get(name))
    return found


def _fields(config: Config) -> dict[str, object]:
    sections: dict[str, dict[str, object]] = config.model_dump(mode="json")
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _check_change(name: str, old: Any, new: Any, before: Config, past: Past) -> None:
    if name == STEPS:
        if new < old:
            raise ConfigError(name, new, f"the run was made for {old} steps, and can only be given more", f"{old} or more")
        if past.step >= old and old % before.policy.reuse:
            problem = f"the run ended at step {old}, in the middle of a batch that {before.policy.reuse} steps use"
            raise ConfigError(name, new, problem, "start a new run from its last checkpoint: policy.path")
        return
    if not name.startswith(MAY_CHANGE):
        fix = f"leave it out, or start a new run; a run that goes on takes {', '.join(MAY_CHANGE)} and more {STEPS}"
        raise ConfigError(name, new, f"cannot change when a run goes on (it is {old!r}): what is recorded rests on it", fix)


def change_settings(run: RunDirectory, overrides: Sequence[str], past: Past) -> list[str]:
    """Apply overrides to a run's configuration and keep the result; what changed, in words. Raises ConfigError, and then changes nothing.

    The broker records the configuration in the journal when it starts.
    """
    before = run.config()
    after = overridden(before, overrides)
    found = changes(before, after, past)
    if found:
        run.change_config(after)
    if "broker.address" in found:
        (run.path / "broker.json").unlink(missing_ok=True)
    return [f"{name}: {old!r} -> {new!r}" for name, (old, new) in found.items()]


@contextlib.contextmanager
def sole_supervisor(run: RunDirectory) -> Iterator[None]:
    """Nobody else supervises the run meanwhile; the kernel gives the lock back however this process ends. Raises ConfigError."""
    path = run.path / "up.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            problem = f"another `up` is at work on it (process {lock.read().strip() or 'unknown'})"
            raise ConfigError("--resume", str(run.path), problem, "look at it with `cli.py status --run`, or end that one first") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def policy_is_there(run: RunDirectory) -> None:
    """Raise ConfigError if the folder of the run's policy is gone: tokenizer, base and reference come from there."""
    policy = Path(run.manifest().policy)
    if not (policy / "config.json").exists():
        raise ConfigError("policy.path", str(policy), "is gone", "put the policy's folder back there; the run was started from it")


def go_on(run: RunDirectory, overrides: Sequence[str], say: Callable[[str], None]) -> Past | None:
    """Make a run ready to go on, and say what it had come to; None if there is nothing left to do. Raises ConfigError or JournalError."""
    past = look_back(run)
    changed = change_settings(run, overrides, past)
    steps = run.config().run.steps
    if past.has_ended and past.step >= steps:
        say(f"nothing to do: all {steps} steps are done; --set run.steps=N gives it more")
        return None
    policy_is_there(run)
    if past.halted:
        how = f"it was halted ({past.halted})"
    elif past.has_ended:
        how = f"it had ended ({past.stopping})"
    elif past.stopping:
        how = f"it was being stopped ({past.stopping}); that is finished first"
    else:
        how = "it was under way" if past.lineage >= 0 else "it had not begun"
    say(f"going on from step {past.step} of {steps}: {how}")
    for line in changed:
        say(f"changed: {line}")
    newest = set_aside_damaged(run.checkpoints, say)
    say(f"newest checkpoint: {newest.name if newest is not None else 'none'}")
    return past
