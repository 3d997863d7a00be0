"""The checker: whether a history keeps the promises. It reads facts and records, and uses nothing of the ledger.

`check` goes through the journal once, in order, and then holds against it what each process wrote down when it happened.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

import blake3

from protocol import facts
from protocol.errors import InvalidGroup
from tests.faults.history import History
from tests.faults.records import (
    Acknowledged,
    Announced,
    Announcing,
    Complaint,
    Confirmed,
    GivingUp,
    Resumed,
    Submitting,
    Trained,
    engine_name,
)
from tests.faults.ticket_account import TRAINED_TWICE, Find, TicketAccount
from tests.faults.tokens import START, Contradiction, Described, advance, describe, fingerprint

LOST: Final = "acknowledged and lost"
BATCH_CHANGED: Final = "a batch given again was another"
LAG: Final = "lag above max_lag"
CONTRADICTION: Final = "tokens contradict the journal"
ORPHAN_USED: Final = "a group of an orphaned version in a later batch"
NOT_ORPHANED: Final = "a version on a dead branch stayed good"
WRONG_REFUSAL: Final = "a good group was refused"
COMMIT_LOST: Final = "confirmed and lost"
CHAIN: Final = "the learner's steps do not follow from one another"
COMPLAINT: Final = "a process found a contradiction itself"


class Finding(NamedTuple):
    """A promise that was broken."""

    kind: str
    text: str


class Verdict(NamedTuple):
    """What a history comes to."""

    findings: list[Finding]
    figures: dict[str, int]

    def of(self, kind: str) -> list[str]:
        """The findings of one kind, in words."""
        return [finding.text for finding in self.findings if finding.kind == kind]


class Accepted(NamedTuple):
    """A group in the journal."""

    fact: facts.GroupAccepted
    digest: str
    says: Described


class _Versions:
    """Published versions by number, and which of them are in doubt or dead."""

    def __init__(self, history: History, find: Find) -> None:
        self._find = find
        records = [record for log in history.learners for record in log if isinstance(record, Announcing)]
        self._chains = {(record.step, record.root): bytes.fromhex(record.chain) for record in records}
        self._arrived = {(record.lineage, record.step, record.root) for record in records}
        self.step: dict[int, int] = {}
        self.fingerprint: dict[int, int] = {}
        self.root: dict[int, str] = {}
        self._suspect: set[int] = set()
        self.orphaned: set[int] = set()
        self.num_reproduced = 0

    def take(self, fact: facts.AnyFact) -> None:
        match fact:
            case facts.VersionPublished(version=version):
                chain = self._chains.get((version.step, version.root))
                if chain is None or (version.lineage, version.step, version.root) not in self._arrived:
                    self._find(CONTRADICTION, f"version {version.number} is in the journal, and no learner announced it")
                if version.number != len(self.step):
                    self._find(CONTRADICTION, f"version {version.number} follows version {len(self.step) - 1}")
                self.step[version.number], self.root[version.number] = version.step, version.root
                self.fingerprint[version.number] = -1 if chain is None else fingerprint(chain)
                dead = sorted(number for number in self._suspect if self.step[number] >= version.step)
                if dead:
                    self._find(NOT_ORPHANED, f"versions {dead} are good after version {version.number} took another way at {version.step}")
            case facts.VersionOrphaned(number=number):
                if number not in self._suspect:
                    self._find(NOT_ORPHANED, f"version {number} was orphaned and was not in doubt")
                self._suspect.discard(number)
                self.orphaned.add(number)
            case facts.VersionReproduced(number=number, lineage=lineage):
                self.num_reproduced += 1
                if (lineage, self.step[number], self.root[number]) not in self._arrived:
                    self._find(NOT_ORPHANED, f"lineage {lineage} did not arrive at version {number}, and that is in the journal")
                self._suspect.discard(number)
            case facts.LearnerStarted(step=step):
                self._suspect |= {number for number, taken_at in self.step.items() if taken_at > step} - self.orphaned


class _Replay:
    """The journal, fact by fact."""

    def __init__(self, history: History, find: Find) -> None:
        self._history, self._find = history, find
        self.tickets = TicketAccount(history.pacing, find)
        self.versions = _Versions(history, find)
        self.groups: dict[int, Accepted] = {}
        """The group that is in the journal for a ticket, if it was not orphaned."""
        self.results: dict[tuple[str, str, int], facts.AnyFact] = {}
        self.digests: dict[tuple[str, str, int], str] = {}
        self.incarnation: dict[tuple[str, str], str] = {}
        """What an epoch of an actor called itself, see `engine_name`."""
        self.handed_in = {
            (record.actor, engine_name(record.incarnation), record.seq): record
            for log in history.actors
            for record in log
            if isinstance(record, Submitting | GivingUp)
        }
        self._last_seq: Counter[tuple[str, str]] = Counter()
        self.lineage, self.step = -1, 0
        self.committed: dict[tuple[int, int], facts.StepCommitted] = {}
        self.lags: Counter[int] = Counter()
        self.num = Counter[str]()
        self.refused = Counter[str]()

    def run(self) -> None:
        for entry in self._history.entries:
            self._take(entry.lsn, entry.fact)
            self.num[type(entry.fact).__name__] += 1

    def _take(self, lsn: int, fact: facts.AnyFact) -> None:
        match fact:  # before the account moves: where a ticket was says whether this may be
            case facts.ActorJoined():
                self.incarnation[fact.actor, fact.epoch] = fact.engine
            case facts.GroupAccepted():
                self._accepted(lsn, fact)
            case facts.ResultRefused():
                self._count_result(fact)
                self._refused(fact)
                self.refused[fact.reason] += 1
            case facts.AttemptFailed():
                self._count_result(fact)
            case facts.TicketRevoked():
                self._revoked(fact)
            case facts.TicketEnded():
                self._ended(fact)
            case facts.BatchFormed():
                for group in [self.groups[ticket] for ticket in fact.tickets if ticket in self.groups]:
                    dead = self.versions.orphaned.intersection(group.says.versions)
                    if dead:
                        self._find(ORPHAN_USED, f"ticket {group.fact.ticket} of versions {sorted(dead)} is in batch {fact.batch}")
            case facts.LearnerStarted():
                if fact.lineage != self.lineage + 1 or fact.step > self.step:
                    self._find(CHAIN, f"{fact} follows lineage {self.lineage} at step {self.step}")
                self.lineage, self.step = fact.lineage, fact.step
            case facts.StepCommitted():
                self._committed(fact)
        self.versions.take(fact)
        self.tickets.take(fact)

    def _count_result(self, fact: facts.GroupAccepted | facts.ResultRefused | facts.AttemptFailed) -> None:
        source = (fact.actor, fact.epoch)
        key = (*source, fact.seq)
        follows_refusal = isinstance(fact, facts.AttemptFailed) and isinstance(self.results.get(key), facts.ResultRefused)
        if fact.seq != self._last_seq[source] + 1 and not follows_refusal:
            self._find(CONTRADICTION, f"result {fact.seq} of {source} follows result {self._last_seq[source]}")
        self._last_seq[source] = fact.seq
        self.results.setdefault(key, fact)

    def _accepted(self, lsn: int, fact: facts.GroupAccepted) -> None:
        self._count_result(fact)
        payload, digest = self._history.payloads.get(lsn, (b"", b""))
        name = f"the group of ticket {fact.ticket}, result {fact.seq} of {fact.actor}/{fact.epoch},"
        if not payload or blake3.blake3(payload).digest() != digest:
            self._find(LOST, f"{name} is in the journal without its bytes")
            return
        self.digests[fact.actor, fact.epoch, fact.seq] = digest.hex()
        try:
            says = describe(payload)
        except (Contradiction, InvalidGroup) as error:
            self._find(CONTRADICTION, f"{name} contradicts itself: {error}")
            return
        claims = (says.ticket, says.attempt, says.actor, engine_name(says.incarnation), says.versions, says.num_tokens)
        incarnation = self.incarnation.get((fact.actor, fact.epoch), "")
        if claims != (fact.ticket, fact.attempt, fact.actor, incarnation, fact.versions, fact.num_tokens):
            self._find(CONTRADICTION, f"{name} says {claims}, the journal {fact} by {incarnation}")
        if self.tickets.given_to.get((says.ticket, says.attempt)) != (fact.actor, fact.epoch):
            self._find(CONTRADICTION, f"{name} was never given to that process")
        for token in says.body:
            if self.versions.fingerprint.get(token.version) != token.fingerprint:
                self._find(CONTRADICTION, f"{name} has a token of version {token.version} that was made with other weights")
                break
        dead = self.versions.orphaned.intersection(says.versions)
        if dead:
            self._find(ORPHAN_USED, f"{name} was accepted after its versions {sorted(dead)} had been orphaned")
        self.groups[fact.ticket] = Accepted(fact, digest.hex(), says)

    def _oldest_step(self, group: Accepted) -> int:
        return min(self.versions.step.get(number, -1) for number in group.says.versions)

    def _refused(self, fact: facts.ResultRefused) -> None:
        place = self.tickets.place.get(fact.ticket, "nowhere")
        if fact.reason == "already done":
            is_right = place in ("queued", "batched")
        elif fact.reason == "already ended":
            is_right = place in ("consumed", "expired", "failed", "void")
        else:
            is_right = fact.reason in self._reasons(fact)
        if not is_right:
            self._find(WRONG_REFUSAL, f"{fact}, and the ticket was {place}")

    def _reasons(self, fact: facts.ResultRefused) -> set[str]:
        """For what its versions alone a group is to be refused."""
        source = self.handed_in.get((fact.actor, self.incarnation.get((fact.actor, fact.epoch), ""), fact.seq))
        if not isinstance(source, Submitting) or not all(number in self.versions.step for number in source.versions):
            return set()
        if self.versions.orphaned.intersection(source.versions):
            return {"orphaned"}
        oldest = min(self.versions.step[number] for number in source.versions)
        return {"stale"} if oldest < self._history.pacing.oldest_step(self.tickets.batch_of(fact.ticket)) else set()

    def _revoked(self, fact: facts.TicketRevoked) -> None:
        group = self.groups.pop(fact.ticket, None)
        if group is None or self.tickets.place.get(fact.ticket) != "queued":
            return
        self.num["groups orphaned"] += 1
        if fact.reason != "orphaned" or not self.versions.orphaned.intersection(group.says.versions):
            self._find(LOST, f"the group of ticket {fact.ticket} was in the journal, and was dropped: {fact.reason}")

    def _ended(self, fact: facts.TicketEnded) -> None:
        if self.tickets.place.get(fact.ticket) != "queued" or fact.ticket not in self.groups:
            return
        is_old = self._oldest_step(self.groups[fact.ticket]) < self._history.pacing.oldest_step(self.tickets.batch_of(fact.ticket))
        if fact.outcome != "expired" or not is_old:
            self._find(LOST, f"the group of ticket {fact.ticket} was in the journal, and ended as {fact.outcome}: {fact.reason}")

    def _committed(self, fact: facts.StepCommitted) -> None:
        if (fact.lineage, fact.step) != (self.lineage, self.step) or fact.batch != self._history.pacing.batch_of_step(fact.step):
            self._find(CHAIN, f"step {fact.step} of batch {fact.batch}, lineage {fact.lineage}, was committed at step {self.step}")
        self.step = fact.step + 1
        self.committed[fact.lineage, fact.step] = fact
        tickets = self.tickets.batches.get(fact.batch, [])
        lags = [fact.step - self._oldest_step(self.groups[ticket]) for ticket in tickets if ticket in self.groups]
        self.lags.update(lags)
        if lags != fact.lags:
            self._find(CONTRADICTION, f"the lags at step {fact.step} are {fact.lags} in the journal, the tokens say {lags}")
        for ticket, lag in zip(tickets, lags, strict=False):
            if lag > self._history.pacing.max_lag:
                self._find(LAG, f"step {fact.step} used the group of ticket {ticket} with lag {lag}, S is {self._history.pacing.max_lag}")


class _Path:
    """The learner's own account: the steps that lead to where it stands, and what was given to it."""

    def __init__(self, history: History, replay: _Replay, find: Find) -> None:
        self._history, self._replay, self._find = history, replay, find
        self.steps: list[Trained] = []
        self._batch_of: dict[int, int] = {}
        self._given: dict[int, tuple[list[int], list[str]]] = {}
        self._done: set[int] = set()
        """Steps that some session has done; doing one again after a resume is right."""
        self.num_salted = self.num_again = 0

    def run(self) -> None:
        for log in self._history.learners:
            salt = ""
            for record in log:
                match record:
                    case Resumed():
                        salt = record.salt
                        self._resumed(record)
                    case Trained():
                        self._trained(record, salt)
                    case Confirmed(lineage=lineage, step=step) if step > 0 and self.steps and self.steps[-1].lineage == lineage:
                        self._confirmed(lineage, step)
                    case Complaint(text=text):
                        self._find(COMPLAINT, text)

    def _resumed(self, record: Resumed) -> None:
        self.num_salted += bool(record.salt)
        del self.steps[record.step :]
        self._batch_of = {ticket: step.batch for step in self.steps for ticket in step.tickets}
        if record.chain != (self.steps[-1].chain if self.steps else START.hex()) or len(self.steps) != record.step:
            self._find(CHAIN, f"lineage {record.lineage} resumed at step {record.step} from weights that no step before it led to")

    def _trained(self, record: Trained, salt: str) -> None:
        if record.step != len(self.steps):
            self._find(CHAIN, f"step {record.step} of lineage {record.lineage} follows step {len(self.steps) - 1}")
        for ticket in record.tickets:
            if self._batch_of.setdefault(ticket, record.batch) != record.batch:
                self._find(TRAINED_TWICE, f"step {record.step} used ticket {ticket} again, after batch {self._batch_of[ticket]}")
        if len(set(record.tickets)) < len(record.tickets):
            self._find(TRAINED_TWICE, f"batch {record.batch} holds a ticket twice: {record.tickets}")
        before = self._given.setdefault(record.batch, (record.tickets, record.digests))
        self.num_again += record.step in self._done
        self._done.add(record.step)
        if before != (record.tickets, record.digests):
            self._find(BATCH_CHANGED, f"batch {record.batch} was {before}, and at step {record.step} {(record.tickets, record.digests)}")
        in_journal = self._replay.tickets.batches.get(record.batch)
        held = [self._replay.groups[ticket].digest for ticket in record.tickets if ticket in self._replay.groups]
        if in_journal != record.tickets or held != record.digests:
            self._find(
                BATCH_CHANGED, f"batch {record.batch} has tickets {in_journal} in the journal, the learner was given {record.tickets}"
            )
        chain = bytes.fromhex(self.steps[-1].chain) if self.steps else START
        if advance(chain, [bytes.fromhex(digest) for digest in record.digests], salt).hex() != record.chain:
            self._find(CHAIN, f"step {record.step} of lineage {record.lineage} does not follow from the weights before it")
        if max(record.lags) > self._history.pacing.max_lag:
            self._find(LAG, f"the learner counted lags {record.lags} at step {record.step}, S is {self._history.pacing.max_lag}")
        self.steps.append(record)
        committed = self._replay.committed.get((record.lineage, record.step))
        if committed is not None and int(committed.metrics["chain"] or 0) != fingerprint(bytes.fromhex(record.chain)):
            self._find(COMMIT_LOST, f"step {record.step} of lineage {record.lineage} is in the journal with other weights")

    def _confirmed(self, lineage: int, step: int) -> None:
        if (lineage, step - 1) not in self._replay.committed:
            self._find(COMMIT_LOST, f"step {step - 1} of lineage {lineage} was confirmed, and is not in the journal")


def check(history: History) -> Verdict:
    """All findings, and the figures of the report."""
    findings: list[Finding] = []

    def find(kind: str, text: str) -> None:
        findings.append(Finding(kind, text))

    replay = _Replay(history, find)
    replay.run()
    path = _Path(history, replay, find)
    path.run()
    for record in (record for log in history.learners for record in log if isinstance(record, Announced)):
        if (replay.versions.step.get(record.number), replay.versions.root.get(record.number)) != (record.step, record.root):
            find(COMMIT_LOST, f"version {record.number} of step {record.step} was confirmed, and is not in the journal")
    acknowledged = _check_actors(history, replay, find)
    figures = {
        "groups_acknowledged": acknowledged["Submitting"],
        "failures_acknowledged": acknowledged["GivingUp"],
        "groups_refused": replay.num["ResultRefused"],
        **{f"refused_{reason}": number for reason, number in sorted(replay.refused.items())},
        "tickets_issued": replay.tickets.num_issued,
        "attempts": replay.num["TicketIssued"],
        "consumed": replay.tickets.counts["consumed"],
        "steps_committed": replay.num["StepCommitted"],
        "steps_in_the_end": replay.step,
        "steps_given_again": path.num_again,
        "lineages": replay.lineage + 1,
        "lineages_elsewhere": path.num_salted,
        "versions": len(replay.versions.step),
        "versions_orphaned": len(replay.versions.orphaned),
        "groups_orphaned": replay.num["groups orphaned"],
        "versions_reproduced": replay.versions.num_reproduced,
        "largest_lag": max(replay.lags, default=0),
        "max_lag": history.pacing.max_lag,
        "mixed_groups": sum(len(group.says.versions) > 1 for group in replay.groups.values()),
        "facts": len(history.entries),
        **{f"tickets_{outcome}": replay.tickets.counts[outcome] for outcome in ("expired", "failed", "void")},
    }
    return Verdict(findings, figures)


def _check_actors(history: History, replay: _Replay, find: Find) -> Counter[str]:
    """Whether all that was acknowledged is in the journal, as it was handed in, and nothing is there that nobody handed in."""
    acknowledged: Counter[str] = Counter()
    results = {(actor, replay.incarnation.get((actor, epoch), ""), seq): result for (actor, epoch, seq), result in replay.results.items()}
    for record in (record for log in history.actors for record in log):
        match record:
            case Acknowledged():
                given = replay.handed_in[record.actor, engine_name(record.incarnation), record.seq]
                acknowledged[type(given).__name__] += 1
                if (record.actor, engine_name(record.incarnation), record.seq) not in results:
                    find(LOST, f"{given} was acknowledged and is not in the journal")
            case Complaint(text=text):
                find(COMPLAINT, text)
    for key, result in results.items():
        source = replay.handed_in.get(key)
        kinds = (facts.AttemptFailed,) if isinstance(source, GivingUp) else (facts.GroupAccepted, facts.ResultRefused)
        if source is None or not isinstance(result, kinds) or (source.ticket, source.seq) != (result.ticket, result.seq):
            find(CONTRADICTION, f"{result} is in the journal, what was handed in is {source}")
            continue
        written = replay.digests.get((result.actor, result.epoch, result.seq))
        if isinstance(source, Submitting) and isinstance(result, facts.GroupAccepted) and written != source.digest:
            find(LOST, f"{source} is in the journal with other bytes")
    return acknowledged
