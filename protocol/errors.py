"""Every error a user can meet, in one tree.

    SlipstreamError
    ├── ConfigError              a field of a config file or command line is wrong
    ├── ProtocolError            a peer sent something this side will not act on
    │   ├── MalformedFrame       not two frames, not msgpack, unknown kind, over a limit
    │   ├── InvalidGroup         a rollout group that contradicts itself or its ticket
    │   └── IncompatiblePeer     the two sides speak different protocol versions
    ├── PeerError                the other side cannot be talked to
    │   ├── BrokerUnreachable    nobody answers at the address
    │   ├── AccessRefused        somebody answers and does not accept the key
    │   ├── AddressInUse         the port is taken
    │   ├── KeyFileError         a key file is missing, malformed or readable by others
    │   └── RequestRefused       the broker answered, and the answer is no
    │       └── TakenOver        a learner that started later has this one's place
    ├── WeightsError             weights that are not exactly what was published
    │   ├── DamagedDelta         a delta or snapshot that does not decode
    │   ├── WrongParent          a delta that starts from other weights than the ones held
    │   ├── ShadowLost           an actor's own copy of the weights is gone, or has no room
    │   └── RootMismatch         the result does not have the published root hash
    ├── StaleGroup               a group older than max_lag reached an optimizer step
    ├── JournalError             the record of the run cannot be written or read
    │   ├── JournalCommitFailed  a commit failed; it is never retried in this process
    │   └── JournalDamaged       what is on disk is not what was written
    ├── TaskError                a task cannot be loaded or cannot score
    ├── EngineError              an inference engine cannot start or generate
    ├── EngineDied               an inference engine is gone; its actor ends and is started again
    ├── CheckpointError          a checkpoint is missing or does not fit the run
    ├── ReplayDiffers            a replay does not arrive at the recorded weights
    ├── RoleEnded                a process that a run cannot do without has ended for good
    ├── PromisesBroken           a run's journal contradicts a promise
    ├── Collapsed                the reward went to zero and stayed there, and the run was ended for it
    └── RunHalted                the run was stopped because going on would be useless

Each message says what happened, with the value, and what to do next.
"""

from __future__ import annotations

from typing import Final

MAX_SHOWN: Final = 500


def _shown(value: object) -> str:
    """`value` as a message shows it. A file can hold numbers and nesting that Python does not write out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class SlipstreamError(Exception):
    """Base of all errors that are meant for a person to read."""

    exit_code = 1


class ConfigError(SlipstreamError):
    """A configured value is wrong. `field` is its dotted name; `fix` says what to write instead."""

    exit_code = 2

    def __init__(self, field: str, value: object, problem: str, fix: str) -> None:
        self.field, self.value, self.problem, self.fix = field, value, problem, fix
        super().__init__(f"{field} = {_shown(value)}: {problem}. Fix: {fix}")


class ProtocolError(SlipstreamError):
    """A peer sent something that is not acted on."""


class MalformedFrame(ProtocolError):
    """A message that cannot be decoded. `reason` is a short stable word used for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class InvalidGroup(ProtocolError):
    """A rollout group that decodes but cannot be true. `reason` is a short stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class IncompatiblePeer(ProtocolError):
    """The other side speaks another protocol version."""

    exit_code = 2

    def __init__(self, ours: int, theirs: int) -> None:
        self.ours, self.theirs = ours, theirs
        super().__init__(
            f"this side speaks protocol {ours}, the other side {theirs}. Install the same version of Slipstream on both machines."
        )


class PeerError(SlipstreamError):
    """The other side cannot be talked to."""


class BrokerUnreachable(PeerError):
    """Nobody answers at `address` after `waited` seconds."""

    exit_code = 3

    def __init__(self, address: str, waited: float, waiting_for: str) -> None:
        self.address, self.waited, self.waiting_for = address, waited, waiting_for
        super().__init__(
            f"no answer from the broker at {address} after {waited:.0f} s (waiting for {waiting_for}). "
            "If the run has ended, there is nothing to talk to; otherwise check the address, and that its four ports are open between the machines."
        )


class AccessRefused(PeerError):
    """The broker does not accept this key on this socket."""

    exit_code = 2

    def __init__(self, address: str, role: str) -> None:
        self.address, self.role = address, role
        super().__init__(
            f"the broker at {address} refused our key for the role {role!r}. "
            f"Use the {role}.key file from the run's keys/ directory; keys of other runs and other roles are not accepted."
        )


class AddressInUse(PeerError):
    """The address cannot be bound."""

    exit_code = 2

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        super().__init__(
            f"cannot listen on {address}: {reason}. "
            "The broker takes four consecutive ports; choose another broker.address, or port 0 for any free ones."
        )


class KeyFileError(PeerError):
    """A key file cannot be used. `path` names it."""

    exit_code = 2

    def __init__(self, path: object, problem: str, fix: str) -> None:
        self.path, self.problem, self.fix = path, problem, fix
        super().__init__(f"key file {path}: {problem}. Fix: {fix}")


class RequestRefused(PeerError):
    """The broker answered a request with a refusal."""

    def __init__(self, request: str, reason: str) -> None:
        self.request, self.reason = request, reason
        super().__init__(f"the broker refused {request}: {reason}")


class TakenOver(RequestRefused):
    """Another learner session has joined the run since this one did."""

    exit_code = 2

    def __init__(self, request: str) -> None:
        reason = "a learner that started later has taken over. One learner trains a run: end that one before this one is started again"
        super().__init__(request, reason)


class WeightsError(SlipstreamError):
    """Weights are not exactly what was published. Nothing may be sampled from them."""


class DamagedDelta(WeightsError):
    """A weight file does not decode, or contradicts its own manifest."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"damaged weight file: {problem}. Fetch it again; if it persists, restart the actor.")


class WrongParent(WeightsError):
    """A delta was made against weights other than the ones held."""

    def __init__(self, expected: str, held: str) -> None:
        self.expected, self.held = expected, held
        super().__init__(
            f"the delta starts from root {expected[:16]} but the weights held have root {held[:16]}. "
            "Fetch a route from the version held, or the latest snapshot."
        )


class ShadowLost(WeightsError):
    """The file with an actor's copy of the weights is gone or cannot be made."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"shadow of the weights: {problem}. The actor makes a new one from the run's base.")


class RootMismatch(WeightsError):
    """Weights after an update do not have the root hash that was published for them."""

    def __init__(self, expected: str, found: str, where: str) -> None:
        self.expected, self.found, self.where = expected, found, where
        super().__init__(f"{where}: root hash is {found[:16]}, published {expected[:16]}. Reload from a snapshot.")


class StaleGroup(SlipstreamError):
    """A group older than the bound reached the learner: the ledger and the learner disagree."""

    def __init__(self, ticket: int, step: int, lag: int, max_lag: int) -> None:
        self.ticket, self.step, self.lag, self.max_lag = ticket, step, lag, max_lag
        super().__init__(
            f"the group of ticket {ticket} has lag {lag} at step {step}, but max_lag is {max_lag}. "
            "This must not happen; keep the run directory and report it."
        )


class JournalError(SlipstreamError):
    """The record of the run cannot be written or read."""

    exit_code = 4


class JournalCommitFailed(JournalError):
    """A commit did not reach the disk. What was in it is unknown until the journal is read again."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"journal {path}: commit failed ({reason}). The broker stops here, because retrying could lose "
            "acknowledged groups. Free space or mend the disk, then start the broker again: it recovers from the journal."
        )


class JournalDamaged(JournalError):
    """Rows of the journal are not what was written. No restart mends that."""

    exit_code = 8

    def __init__(self, path: object, where: str, problem: str) -> None:
        super().__init__(f"journal {path}, {where}: {problem}. Keep the file; the rows before it are intact.")


class TaskError(SlipstreamError):
    """A task cannot be loaded, or its reward is not a finite number."""

    exit_code = 2


class EngineError(SlipstreamError):
    """An inference engine cannot start or cannot generate."""


class EngineDied(SlipstreamError):
    """An inference engine's process is gone. The tickets in hand are nobody's fault: they are issued again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the inference engine died: {reason}. The actor ends and is started again; its log says more.")


class CheckpointError(SlipstreamError):
    """A checkpoint is missing, incomplete or of another run."""

    exit_code = 2


class ReplayDiffers(SlipstreamError):
    """A replay published other weights than the run; the message says where they differ."""

    exit_code = 6

    def __init__(self, where: str) -> None:
        super().__init__(f"the replay is not the run: {where}")


class RunHalted(SlipstreamError):
    """The broker stopped the run; `reason` says why going on would be useless."""

    exit_code = 5

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the run was halted: {reason}")


class Collapsed(SlipstreamError):
    """A run ended because its policy collapsed; the last good checkpoint is named."""

    exit_code = 9

    def __init__(self, run: object, told: str) -> None:
        fix = "start again from there with a lower learning rate or a smaller max_lag (`cli.py advise` says which), or with stability.governor=hold"
        super().__init__(f"the run in {run} {told}; {fix}")


class RoleEnded(SlipstreamError):
    """A supervised process has ended and is not started again. `exit_code` is the process's own where a restart could not have mended it."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class PromisesBroken(SlipstreamError):
    """A finished run contradicts its promises, as counted again from its journal."""

    exit_code = 7

    def __init__(self, run: object, broken: list[str]) -> None:
        self.broken = broken
        count = f"{len(broken)} broken promise{'s' * (len(broken) > 1)}"
        super().__init__(f"run {run}: {count}, the first: {broken[0]}. Do not use its results; `cli.py inspect verify {run}` says more.")


class DescriptorsLost(SlipstreamError):
    """So many connections ended in a way that libzmq does not notice that the process must be started again to have their descriptors back."""

    def __init__(self, num_lost: int) -> None:
        self.num_lost = num_lost
        super().__init__(
            f"{num_lost} descriptors are lost to connections that ended after another had taken their name. "
            "The supervisor starts the broker again, and it recovers from the journal; find out which peer does this."
        )
