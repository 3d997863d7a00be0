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

from broker.blobs import BlobStore, file_digest
from deploy.rundir import RunDirectory, assemble_policy
from learner.damage import set_aside_ahead, set_aside_damaged
from protocol.config import Config, overridden, parse_config_json
from protocol.errors import ConfigError, JournalDamaged
from protocol.facts import AnyFact, LearnerStarted, RunEnded, RunStarted, RunStopping, StepCommitted
from protocol.journal import JOURNAL_NAME, UNREADABLE, check_end, has_begun, open_read_only, read_facts
from protocol.messages import NamedBlob

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


@contextlib.contextmanager
def _recording(run: RunDirectory) -> Iterator[sqlite3.Connection | None]:
    """The run's journal to read; None if nothing has happened yet. Raises JournalError."""
    path = run.path / JOURNAL_NAME
    if not has_begun(path):
        yield None
        return
    with closing(open_read_only(path)) as journal:
        check_end(journal, path)
        try:
            yield journal
        except (*UNREADABLE, msgspec.DecodeError) as error:
            raise JournalDamaged(path, "table events", str(error)) from None


def look_back(run: RunDirectory) -> Past:
    """What the run in a directory had come to. Raises JournalError."""
    with _recording(run) as journal:
        if journal is None:
            return NOTHING
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


def check_recording(run: RunDirectory) -> None:
    """Read all that has happened, as a broker would. Raises JournalDamaged, with the place."""
    with _recording(run) as journal:
        if journal is not None:
            for _ in read_facts(journal, run.path / JOURNAL_NAME):
                pass


def recorded_config(run: RunDirectory) -> Config | None:
    """The configuration that the run's broker started with last, by its journal; None if it never has. Raises JournalError."""
    with _recording(run) as journal:
        if journal is None:
            return None
        _, started = _last(journal, RunStarted)
        if started is not None and started.config:
            return parse_config_json(started.config)
        (config,) = journal.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        return parse_config_json(config)


def check_config(run: RunDirectory) -> None:
    """Raise ConfigError if config.json, which anybody can edit, has changed in what recorded facts rest on. Raises JournalError."""
    before = recorded_config(run)
    if before is not None:
        changes(before, run.config(), look_back(run))


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
        fix = f"put {old!r} back, or start a new run; a run that goes on takes {', '.join(MAY_CHANGE)} and more {STEPS}"
        raise ConfigError(name, new, f"cannot change when a run goes on (it is {old!r}): what is recorded rests on it", fix)


class Settings(NamedTuple):
    """The configuration that a run goes on with, and the fields that are not as its broker last had them, with both values."""

    config: Config
    changed: dict[str, tuple[object, object]]

    def lines(self) -> list[str]:
        """What changed, in words."""
        return [f"{name}: {old!r} -> {new!r}" for name, (old, new) in self.changed.items()]


def new_settings(run: RunDirectory, overrides: Sequence[str], past: Past) -> Settings:
    """A run's configuration with overrides. Raises ConfigError for a change that may not be, by them or in the file; JournalError."""
    before = recorded_config(run) or run.config()
    after = overridden(run.config(), overrides)
    return Settings(after, changes(before, after, past))


def keep_settings(run: RunDirectory, settings: Settings) -> None:
    """Go on with these settings. The broker records them in the journal when it starts. Raises ConfigError where nothing can be written."""
    try:
        if settings.config != run.config():
            run.change_config(settings.config)
        if "broker.address" in settings.changed:
            (run.path / "broker.json").unlink(missing_ok=True)
    except OSError as error:
        raise not_writable(run, error) from None


@contextlib.contextmanager
def sole_supervisor(run: RunDirectory) -> Iterator[None]:
    """Nobody else supervises the run meanwhile; the kernel gives the lock back however this process ends. Raises ConfigError."""
    path = run.path / "up.lock"
    try:
        opened = path.open("a+")
    except OSError as error:
        raise not_writable(run, error) from None
    with opened as lock:
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


def not_writable(run: RunDirectory, error: OSError) -> ConfigError:
    """The error of whoever wants to write in a run's directory and cannot."""
    name = Path(error.filename).name if isinstance(error.filename, str) else "a file"
    fix = "make the directory writable for this user, or copy it to where it is; `cli.py inspect` only reads"
    return ConfigError("--run", str(run.path), f"{name} cannot be written there ({error.strerror})", fix)


def provide_policy(run: RunDirectory, say: Callable[[str], None]) -> None:
    """See that the policy's folder is there, and its files among the blobs: each is made from the other. Raises ConfigError.

    Tokenizer, base and reference come from the folder; actors that join get the files from the blobs.
    """
    manifest, blobs, folder = run.manifest(), BlobStore(run.path / "blobs"), run.policy()
    missing = [file for file in manifest.policy_files if blobs.size(file.blob.digest) != file.blob.size]
    if (folder / "config.json").exists():
        for file in missing:
            _link_again(file, folder, blobs)
            say(f"{file.name} was missing among the run's blobs: linked again from {folder}")
        return
    if missing or not manifest.policy_files:
        which = missing[0].name if missing else "it"
        fix = "put the policy's folder back there, or copy the run's blobs/ directory whole"
        raise ConfigError("policy.path", manifest.policy, f"is gone, and {which} is not whole among the run's blobs", fix)
    assemble_policy(manifest.policy_files, blobs, folder)
    say(f"the policy's folder {manifest.policy} is gone: put together again in {folder} from the run's blobs")


def _link_again(file: NamedBlob, folder: Path, blobs: BlobStore) -> None:
    """Put a policy's file back among the blobs. Raises ConfigError if the folder has another one."""
    source = folder / file.name
    if not source.is_file() or file_digest(source) != file.blob.digest:
        problem = f"its {file.name} is not the one that the run was started from, and the run's blobs have none"
        raise ConfigError("policy.path", str(folder), problem, "put that file back there, or copy the run's blobs/ directory whole")
    blobs.remove(file.blob.digest)  # what is there is cut
    blobs.link(source)


def go_on(run: RunDirectory, overrides: Sequence[str], say: Callable[[str], None]) -> Past | None:
    """Make a run ready to go on, and say what it had come to; None if there is nothing left to do. Raises ConfigError or JournalError.

    The configuration is changed last: a run that does not go on keeps the one it had.
    """
    check_recording(run)
    past = look_back(run)
    settings = new_settings(run, overrides, past)
    steps = settings.config.run.steps
    if past.has_ended and past.step >= steps:
        say(f"nothing to do: all {steps} steps are done; --set run.steps=N gives it more")
        return None
    provide_policy(run, say)
    if past.halted:
        how = f"it was halted ({past.halted})"
    elif past.has_ended:
        how = f"it had ended ({past.stopping})"
    elif past.stopping:
        how = f"it was being stopped ({past.stopping}); that is finished first"
    else:
        how = "it was under way" if past.lineage >= 0 else "it had not begun"
    say(f"going on from step {past.step} of {steps}: {how}")
    for line in settings.lines():
        say(f"changed: {line}")
    set_aside_ahead(run.checkpoints, past.step, say)
    newest = set_aside_damaged(run.checkpoints, say)
    say(f"newest checkpoint: {newest.name if newest is not None else 'none'}")
    keep_settings(run, settings)
    return past
