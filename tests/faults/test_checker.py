"""The checker finds nothing in an honest history, and each broken promise in one that it was planted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import blake3
import msgspec
import numpy as np
import pytest

from protocol import facts
from protocol.groups import encode_group
from protocol.journal import JournalEntry
from protocol.messages import WireTicket
from protocol.pacing import Pacing
from protocol.weights import PolicyVersion, root_hash
from tests.faults import checker, ticket_account
from tests.faults.checker import Verdict, check
from tests.faults.history import History
from tests.faults.records import Acknowledged, Announced, Announcing, AnyRecord, Confirmed, Resumed, Submitting, Trained, engine_name
from tests.faults.tokens import Sampled, Theta, fingerprint, first_theta, make_group

PACING = Pacing(max_lag=1, reuse=1, sync_every=1, groups_per_batch=2, num_steps=1000)
ACTOR, EPOCH = "toy-1", "e"


@dataclass
class Story:
    """A run told fact by fact, with the records of its one actor and of its learners beside."""

    entries: list[JournalEntry] = field(default_factory=list)
    payloads: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    actor: list[AnyRecord] = field(default_factory=list)
    learners: list[list[AnyRecord]] = field(default_factory=list)
    thetas: list[Theta] = field(default_factory=lambda: [first_theta()])
    """By step, along the way that the learner is on."""
    versions: dict[int, tuple[PolicyVersion, Theta]] = field(default_factory=dict)
    groups: dict[int, bytes] = field(default_factory=dict)
    oldest: dict[int, int] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    lineage: int = -1
    num_results: int = 0
    salt: str = ""

    def tell(self, fact: facts.AnyFact, payload: bytes = b"") -> None:
        lsn = len(self.entries) + 1
        self.entries.append(JournalEntry(lsn, float(lsn), fact))
        if payload:
            self.payloads[lsn] = (payload, blake3.blake3(payload).digest())

    def resume(self, step: int, salt: str = "") -> None:
        self.lineage, self.salt = self.lineage + 1, salt
        del self.thetas[step + 1 :]
        self.learners.append([Resumed(self.lineage, self.lineage, step, self.thetas[step].chain.hex(), salt)])
        self.tell(facts.LearnerStarted(f"s{self.lineage}", self.lineage, step, 1))

    def publish(self) -> int:
        number, step = len(self.versions), len(self.thetas) - 1
        theta = self.thetas[step]
        version = PolicyVersion(number, step, self.lineage, root_hash(theta.weights()))
        self.versions[number] = (version, theta)
        self.learners[-1].append(Announcing(self.lineage, number, step, version.root, theta.chain.hex()))
        self.tell(facts.VersionPublished(version, -1, None, None, 1, 1))
        self.learners[-1].append(Announced(self.lineage, number, step, version.root))
        return number

    def issue(self, ticket: int, version: int) -> None:
        self.attempts[ticket] = self.attempts.get(ticket, 0) + 1
        step = self.versions[version][0].step
        self.tell(facts.TicketIssued(ticket, self.attempts[ticket], ACTOR, EPOCH, version, step))

    def accept(self, ticket: int, *numbers: int, weights_of: int | None = None) -> None:
        """A group sampled from versions `numbers`, in truth from `weights_of`."""
        body = [Sampled(n, fingerprint(self.versions[n if weights_of is None else weights_of][1].chain)) for n in numbers]
        wire = WireTicket(ticket, self.attempts[ticket], 0, 7)
        payload = encode_group(make_group(wire, ACTOR, 1, body, np.random.default_rng(ticket)))
        self.num_results += 1
        digest = blake3.blake3(payload).hexdigest()
        self.actor.append(Submitting(ACTOR, 1, self.num_results, ticket, wire.attempt, digest, sorted(set(numbers))))
        self.groups[ticket] = payload
        self.oldest[ticket] = min(self.versions[number][0].step for number in numbers)
        num_tokens, versions = 2 * (len(body) + 6), sorted(set(numbers))
        fact = facts.GroupAccepted(
            ACTOR, EPOCH, self.num_results, ticket, wire.attempt, versions, self.oldest[ticket], num_tokens, 0.5
        )  # fmt: skip
        self.tell(fact, payload)
        self.actor.append(Acknowledged(ACTOR, 1, self.num_results))

    def form(self, *tickets: int) -> None:
        self.batches.append(list(tickets))
        self.tell(facts.BatchFormed(len(self.batches) - 1, len(self.batches) - 1, list(tickets)))

    def train(self, *tickets: int) -> None:
        """The next step, on its batch; or on `tickets`, without the journal knowing."""
        step = len(self.thetas) - 1
        given = list(tickets) or self.batches[step]
        digests = [blake3.blake3(self.groups[ticket]).digest() for ticket in given]
        self.thetas.append(self.thetas[step].after(digests, self.salt))
        chain, lags = self.thetas[-1].chain, [step - self.oldest[ticket] for ticket in given]
        self.learners[-1].append(Trained(self.lineage, step, step, given, [digest.hex() for digest in digests], lags, chain.hex()))
        self.tell(facts.StepCommitted(step, step, self.lineage, lags, {"chain": float(fingerprint(chain))}))
        self.learners[-1].append(Confirmed(self.lineage, step + 1))

    def history(self) -> History:
        return History(PACING, self.entries, self.payloads, [self.actor], self.learners)

    def without(self, wanted: Callable[[facts.AnyFact], bool]) -> History:
        """The history without the facts that are `wanted`."""
        return self.history()._replace(entries=[entry for entry in self.entries if not wanted(entry.fact)])


def beginning() -> Story:
    """Two steps done, versions 0 to 2, tickets 4 and 5 with the actor."""
    story = Story()
    story.tell(facts.ActorJoined(ACTOR, EPOCH, engine_name(1), "here"))
    story.resume(0)
    story.publish()
    for ticket in range(4):
        story.issue(ticket, 0)
    for ticket in range(4):
        story.accept(ticket, 0)
    story.form(0, 1)
    story.train()
    story.publish()
    story.form(2, 3)
    story.issue(4, 1)
    story.issue(5, 1)
    story.train()
    story.publish()
    return story


def ending(story: Story) -> Story:
    """Steps 2 and on until nothing is open: a learner that goes back to step 1 and takes another way, and a version that is orphaned by it."""
    story.accept(4, 1, 2)
    story.accept(5, 1)
    story.issue(6, 2)
    story.accept(6, 2)
    story.resume(1, "elsewhere")
    story.train()
    story.tell(facts.VersionOrphaned(2, story.lineage))
    for ticket in (4, 6):
        story.tell(facts.TicketRevoked(ticket, 1, "orphaned"))
    story.publish()
    for ticket in (4, 6):
        story.issue(ticket, 3)
        story.accept(ticket, 3)
    story.form(4, 5)
    story.train()
    story.publish()
    story.issue(7, 4)
    story.tell(facts.TicketEnded(7, "void", "the run ended"))
    story.tell(facts.RunEnded(""))
    return story


def verdict(story: Story) -> Verdict:
    return check(story.history())


def test_an_honest_history_has_no_findings_and_its_figures_are_right() -> None:
    found = verdict(ending(beginning()))
    assert found.findings == []
    assert found.figures["groups_acknowledged"] == 9
    assert found.figures["tickets_issued"] == 8
    assert found.figures["consumed"] == 6
    assert found.figures["steps_committed"] == 4
    assert found.figures["steps_given_again"] == 1
    assert (found.figures["versions_orphaned"], found.figures["groups_orphaned"]) == (1, 2)
    assert found.figures["largest_lag"] == found.figures["max_lag"] == 1
    assert found.figures["tickets_void"] == 1


# --- planted: each takes a story after its beginning


def acknowledged_and_never_written(story: Story) -> History:
    story.actor += [Submitting(ACTOR, 1, 5, 4, 1, "ab" * 32, [1]), Acknowledged(ACTOR, 1, 5)]
    return story.history()


def acknowledged_and_its_row_deleted(story: Story) -> History:
    story = ending(story)
    return story.without(lambda fact: isinstance(fact, facts.GroupAccepted) and fact.ticket == 5)


def accepted_and_dropped_for_a_lease(story: Story) -> History:
    story.accept(4, 1)
    story.tell(facts.TicketRevoked(4, 1, "silent for more than 6 s"))
    return story.history()


def accepted_and_expired_while_it_was_young(story: Story) -> History:
    story.accept(4, 1)
    story.tell(facts.TicketEnded(4, "expired", "older than max_lag at delivery"))
    return story.history()


def bytes_changed_on_the_disk(story: Story) -> History:
    lsn, (payload, digest) = next(iter(story.payloads.items()))
    story.payloads[lsn] = (payload[:-1] + bytes([payload[-1] ^ 1]), digest)
    return story.history()


def bytes_of_another_group(story: Story) -> History:
    story.accept(4, 1)
    *_, (last, _) = story.payloads.items()
    wire = WireTicket(4, 1, 0, 7)
    body = [Sampled(1, fingerprint(story.versions[1][1].chain))]
    other = encode_group(make_group(wire, ACTOR, 1, body, np.random.default_rng(99)))
    story.payloads[last] = (other, blake3.blake3(other).digest())
    return story.history()


def ticket_in_two_batches(story: Story) -> History:
    story.accept(4, 1)
    story.form(3, 4)
    return story.history()


def learner_given_a_ticket_again(story: Story) -> History:
    story.accept(4, 1)
    story.accept(5, 1)
    story.form(4, 5)
    story.train(3, 4)
    return story.history()


def group_twice_in_a_batch(story: Story) -> History:
    story.accept(4, 1)
    story.form(4, 4)
    return story.history()


def batch_of_other_groups_when_given_again(story: Story) -> History:
    story.resume(1)
    story.groups[2] = story.groups[0]
    story.train()
    return story.history()


def a_group_too_old(story: Story) -> History:
    story.accept(4, 0)
    story.accept(5, 1)
    story.form(4, 5)
    story.train()
    return story.history()


def ticket_issued_too_early(story: Story) -> History:
    story.issue(6, 1)
    return story.history()


def lags_that_the_tokens_deny(story: Story) -> History:
    entry = next(entry for entry in story.entries if isinstance(entry.fact, facts.StepCommitted))
    story.entries[entry.lsn - 1] = entry._replace(fact=msgspec.structs.replace(entry.fact, lags=[0, 1]))
    return story.history()


def ticket_never_issued_in_between(story: Story) -> History:
    story.issue(7, 2)
    return story.history()


def ticket_left_behind_by_its_batch(story: Story) -> History:
    story.issue(6, 2)
    story.accept(5, 1)
    story.accept(6, 2)
    story.form(5, 6)
    return story.history()


def ticket_forgotten_at_the_end(story: Story) -> History:
    return ending(story).without(lambda fact: isinstance(fact, facts.TicketEnded))


def ticket_that_ends_twice(story: Story) -> History:
    for _ in range(2):
        story.tell(facts.TicketEnded(4, "failed", "on purpose"))
    return story.history()


def group_for_a_ticket_that_has_one(story: Story) -> History:
    story.accept(4, 1)
    story.accept(4, 1)
    return story.history()


def tokens_of_other_weights(story: Story) -> History:
    story.accept(4, 1, weights_of=2)
    return story.history()


def group_by_a_process_that_had_no_ticket(story: Story) -> History:
    story.tell(facts.ActorJoined("toy-2", "f", engine_name(1), "here"))
    story.tell(facts.TicketRevoked(4, 1, "left"))
    story.tell(facts.TicketIssued(4, 2, "toy-2", "f", 1, 1))
    story.attempts[4] = 2
    story.accept(4, 1)
    return story.history()


def result_journalled_twice(story: Story) -> History:
    story.tell(next(entry.fact for entry in story.entries if isinstance(entry.fact, facts.GroupAccepted)))
    return story.history()


def orphan_in_a_later_batch(story: Story) -> History:
    story.accept(4, 1, 2)
    story.accept(5, 1)
    story.resume(1, "elsewhere")
    story.train()
    story.tell(facts.VersionOrphaned(2, story.lineage))
    story.publish()
    story.form(4, 5)
    return story.history()


def branch_that_died_unnoticed(story: Story) -> History:
    story.resume(1, "elsewhere")
    story.train()
    story.publish()
    return story.history()


def branch_called_reproduced_and_is_not(story: Story) -> History:
    story.resume(1, "elsewhere")
    story.train()
    story.tell(facts.VersionReproduced(2, story.lineage))
    return story.history()


def good_group_refused(story: Story) -> History:
    story.actor.append(Submitting(ACTOR, 1, 5, 4, 1, "ab" * 32, [1]))
    story.tell(facts.ResultRefused(ACTOR, EPOCH, 5, 4, "stale"))
    return story.history()


def commit_confirmed_and_not_written(story: Story) -> History:
    return story.without(lambda fact: isinstance(fact, facts.StepCommitted) and fact.step == 1)


def version_confirmed_and_not_written(story: Story) -> History:
    return story.without(lambda fact: isinstance(fact, facts.VersionPublished) and fact.version.number == 2)


def learner_that_resumed_from_nowhere(story: Story) -> History:
    story.resume(1)
    resumed = story.learners[-1][0]
    assert isinstance(resumed, Resumed)
    story.learners[-1][0] = msgspec.structs.replace(resumed, chain="00" * 32)
    return story.history()


PLANTS = {
    acknowledged_and_never_written: checker.LOST,
    acknowledged_and_its_row_deleted: checker.LOST,
    accepted_and_dropped_for_a_lease: checker.LOST,
    accepted_and_expired_while_it_was_young: checker.LOST,
    bytes_changed_on_the_disk: checker.LOST,
    bytes_of_another_group: checker.LOST,
    ticket_in_two_batches: ticket_account.TRAINED_TWICE,
    learner_given_a_ticket_again: ticket_account.TRAINED_TWICE,
    group_twice_in_a_batch: ticket_account.TRAINED_TWICE,
    batch_of_other_groups_when_given_again: checker.BATCH_CHANGED,
    a_group_too_old: checker.LAG,
    ticket_issued_too_early: ticket_account.TOO_EARLY,
    lags_that_the_tokens_deny: checker.CONTRADICTION,
    ticket_never_issued_in_between: ticket_account.TICKET_LOST,
    ticket_left_behind_by_its_batch: ticket_account.TICKET_LOST,
    ticket_forgotten_at_the_end: ticket_account.TICKET_LOST,
    ticket_that_ends_twice: ticket_account.NOT_CONSERVED,
    group_for_a_ticket_that_has_one: ticket_account.NOT_CONSERVED,
    tokens_of_other_weights: checker.CONTRADICTION,
    group_by_a_process_that_had_no_ticket: checker.CONTRADICTION,
    result_journalled_twice: checker.CONTRADICTION,
    orphan_in_a_later_batch: checker.ORPHAN_USED,
    branch_that_died_unnoticed: checker.NOT_ORPHANED,
    branch_called_reproduced_and_is_not: checker.NOT_ORPHANED,
    good_group_refused: checker.WRONG_REFUSAL,
    commit_confirmed_and_not_written: checker.COMMIT_LOST,
    version_confirmed_and_not_written: checker.COMMIT_LOST,
    learner_that_resumed_from_nowhere: checker.CHAIN,
}


@pytest.mark.parametrize(("plant", "kind"), PLANTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found_by_its_name(plant: Callable[[Story], History], kind: str) -> None:
    assert check(beginning().history()).findings == [], "the beginning itself is not honest"
    found = check(plant(beginning()))
    assert found.of(kind), f"found only {found.findings}"


def test_a_batch_given_again_as_it_was_is_no_finding() -> None:
    story = beginning()
    story.resume(1)
    story.train()
    story.tell(facts.VersionReproduced(2, story.lineage))
    story.learners[-1].append(Announcing(story.lineage, 3, 2, story.versions[2][0].root, story.thetas[2].chain.hex()))
    found = verdict(story)
    assert found.findings == []
    assert (found.figures["steps_given_again"], found.figures["versions_reproduced"]) == (1, 1)
