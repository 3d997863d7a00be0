"""Whether a checkpoint on the disk is what was written, and setting aside one that is not. Imports nothing heavy.

Invariant: a checkpoint that is damaged, or ahead of the journal, is never resumed from and never removed; it is set aside under a name that says
so, and whoever asked is told.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import blake3
import msgspec

from protocol.errors import CheckpointError
from protocol.weights import PolicyVersion

STATE_NAME = "state.json"


class CheckpointState(msgspec.Struct, frozen=True):
    """The small part of a checkpoint. `digests` are the BLAKE3 digests of its other files, by path below it."""

    run: str
    step: int
    version: PolicyVersion
    digests: dict[str, str] = {}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def digests_of(checkpoint: Path) -> dict[str, str]:
    """The digests of all files of a checkpoint but its state, by path below it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / STATE_NAME)
    return {str(path.relative_to(checkpoint)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    with path.open("rb") as file:
        if path.stat().st_size:
            hasher.update(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return hasher.hexdigest()


def load_state(checkpoint: Path, run: str) -> CheckpointState:
    """The state of a checkpoint. Raises CheckpointError if it is not one of `run`."""
    try:
        state = msgspec.json.decode((checkpoint / STATE_NAME).read_bytes(), type=CheckpointState)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}. Remove it to start from an older one.") from None
    if state.run != run:
        raise CheckpointError(f"checkpoint {checkpoint} belongs to run {state.run!r}, not to {run!r}. Give this run's folder.")
    return state


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if it is as it was written."""
    try:
        state = msgspec.json.decode((checkpoint / STATE_NAME).read_bytes(), type=CheckpointState)
        found = digests_of(checkpoint) if state.digests else {}
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return f"its {STATE_NAME} or a file cannot be read ({error})"
    missing = sorted(state.digests.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    changed = sorted(name for name, digest in state.digests.items() if found[name] != digest)
    return f"{changed[0]} is not what was written" if changed else ""


def set_aside_ahead(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Set checkpoints after `step` aside, where the run's journal ends: no broker lets a learner start from them. Each is told to `say`."""
    for checkpoint in list_checkpoints(folder):
        number = checkpoint.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            aside = _set_aside(checkpoint, "ahead")
            say(f"checkpoint {checkpoint.name} is ahead of the run's journal, which ends at step {step}. It is kept as {aside.name}")


def set_aside_after(folder: Path, step: int, why: str, say: Callable[[str], None]) -> None:
    """Set checkpoints after `step` aside because of `why`, the newest first, so that what is left never has a gap. Each is told to `say`."""
    for checkpoint in reversed(list_checkpoints(folder)):
        number = checkpoint.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            say(f"checkpoint {checkpoint.name} is kept as {_set_aside(checkpoint, why).name}")


def _set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint, so that none is replaced; its new place."""
    number = len(list(checkpoint.parent.glob(f"{why}-*-{checkpoint.name}")))
    return checkpoint.rename(checkpoint.with_name(f"{why}-{number}-{checkpoint.name}"))


def set_aside_damaged(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Set damaged checkpoints aside until the newest one is sound; that one, or None if there is none. Each is told to `say`."""
    for checkpoint in reversed(list_checkpoints(folder)):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        aside = _set_aside(checkpoint, "damaged")
        older = list_checkpoints(folder)
        instead = f"from {older[-1].name}" if older else "from the policy, with the journalled batches again"
        say(f"checkpoint {checkpoint.name} is damaged: {wrong}. It is kept as {aside.name}; going on {instead}")
    return None
