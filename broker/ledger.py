"""The ledger: the only authority on lag and pacing. A pure state machine, `handle(event, now) -> effects`.

Invariants, after every event:
  bounded     a ticket is issued, accepted and delivered only if no use of its batch can have a lag above max_lag;
  conserved   issued = outstanding + queued + consumed + expired + failed + void;
  whole       a ticket has at most one accepted group, and only groups of good or suspect versions are put in a batch. (A batch that was formed
              is history: a resumed learner is given it again as it was, see docs/decisions/002-batches-are-history.md.)

No sockets, no clock, no files. `handle` decides; every change of what must survive a crash is a fact, and facts are applied by `apply` alone, so
feeding a journal's facts to `apply` rebuilds the ledger. Heartbeats, credit and room on the disk are not facts: they come again by themselves.
"""

from __future__ import annotations

from collections import Counter

from broker import events as ev
from broker.publications import Publications, Standing
from broker.room import PLENTY
from broker.state import NUM_NOTES, ActorState, LearnerState, Progress, brief, finite
from broker.tickets import State, Ticket, TicketTable
from protocol import facts, messages
from protocol.messages import HEARTBEAT_SECONDS, LEASE_SECONDS, WireTicket
from protocol.pacing import Pacing
from protocol.sampling import prompt_index, ticket_seed

MAX_FAILURES = 3
"""Attempts at a ticket before it ends as failed."""
RESEND_SECONDS = 2 * HEARTBEAT_SECONDS
"""A ticket that its actor does not report this long after it was sent is sent again."""


class Ledger:
    """See the module."""

    def __init__(self, pacing: Pacing, run_seed: int, num_prompts: int, desired_actors: int) -> None:
        self.pacing = pacing
        self.tickets = TicketTable(pacing)
        self.versions = Publications()
        self.progress = Progress()
        self.actors: dict[str, ActorState] = {}
        self.learner: LearnerState | None = None
        self.desired_actors, self.room = desired_actors, PLENTY
        self._run_seed, self._num_prompts = run_seed, num_prompts
        self.noise: Counter[str] = Counter()
        """Results that came twice or out of turn since this process started; harmless, and not journalled."""
        self._acked: dict[tuple[str, str], int] = {}
        self._failed_in_a_row = 0
        self._effects: list[ev.Effect] = []
        self._now = 0.0

    # --- deciding -------------------------------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """What follows from `event` at `now` (monotonic seconds)."""
        self._effects, self._now = [], now
        if not self.room.allows_commits and self._put_off(event):
            return self._effects
        match event:
            case ev.ActorHere():
                self._actor_here(event)
            case ev.ActorReported():
                self._actor_reported(event)
            case ev.ActorGone():
                if self._present(event.actor, event.epoch):
                    self._lose(event.actor, "left")
            case ev.GroupArrived():
                self._group_arrived(event)
            case ev.AttemptGivenUp():
                self._attempt_given_up(event)
            case ev.LearnerHere():
                self._learner_here(event)
            case ev.BatchWanted() | ev.StepDone() | ev.VersionReady() | ev.EvaluationDone() | ev.LearnerGone():
                self._from_learner(event)
            case ev.ActorsWanted():
                self._record(facts.ActorsDesired(event.num_actors))
            case ev.StopWanted():
                self._stop(event.reason)
            case ev.AnchorMade():
                self._anchor_made(event)
            case ev.RoomMeasured(room):
                if room.allows_commits and not self.room.allows_commits:
                    self.recovered(now)  # meanwhile nobody's lease could end
                self.room = room
            case ev.Tick():
                self._expire_leases()
        self._issue()
        self._deliver()
        return self._effects

    def _put_off(self, event: ev.Event) -> bool:
        """Whether an event can lead to facts, for which there is no room: it is left undone, and comes again from whoever caused it."""
        match event:
            case ev.ActorHere():
                if self._present(event.actor, event.epoch) is not None:
                    return False
                self._send(event.actor, event.epoch, messages.NotNow("hello", self.room.shortage))
            case ev.LearnerHere():
                if self.learner is not None and self.learner.session == event.session:
                    return False
                self._answer(event.session, messages.NotNow("hello", self.room.shortage))
            case ev.StepDone() | ev.VersionReady() | ev.EvaluationDone() | ev.LearnerGone():
                if self.learner is None or self.learner.session != event.session:
                    return False
                self._answer(event.session, messages.NotNow(ev.REQUESTS[type(event)], self.room.shortage))
            case ev.ActorReported() | ev.BatchWanted() | ev.RoomMeasured():
                return False
        return True

    def _record(self, fact: facts.AnyFact, payload: bytes = b"") -> None:
        self._effects.append(ev.Record(fact, payload))
        self.apply(fact)

    def _send(self, actor: str, epoch: str, message: messages.ToActor) -> None:
        self._effects.append(ev.SendActor(actor, epoch, message))

    # actors

    def _actor_here(self, event: ev.ActorHere) -> None:
        known = self.actors.get(event.actor)
        if known is not None and known.epoch != event.epoch:
            self._lose(event.actor, "replaced by a newer process")
            known = None
        if known is None:
            self._record(facts.ActorJoined(event.actor, event.epoch, event.engine, event.host))
        self.actors[event.actor].is_heard(self._now)
        self._effects.append(ev.WelcomeActor(event.actor, event.epoch, self._acked.get((event.actor, event.epoch), 0)))
        if self.progress.stopping:
            self._send(event.actor, event.epoch, messages.Stop(self.progress.stopping))

    def _actor_reported(self, event: ev.ActorReported) -> None:
        actor = self._present(event.actor, event.epoch)
        if actor is None:
            self._send(event.actor, event.epoch, messages.HelloWanted())
            return
        actor.is_heard(self._now)
        actor.report = event.report
        actor.version, actor.num_wanted = event.report.version, event.report.num_wanted
        self._send(event.actor, event.epoch, messages.Ack(self._acked.get((event.actor, event.epoch), 0)))
        self._remind(actor)
        in_hand = set(event.report.tickets)
        for number in sorted(actor.tickets - in_hand):
            ticket = self.tickets.open[number]
            if self._now - ticket.sent_at > RESEND_SECONDS:
                self._send_ticket(ticket)

    def _remind(self, actor: ActorState) -> None:
        """Say again what an actor does not act on: announcements are sent once, and a connection can lose them."""
        newest = self.versions.newest
        if newest is not None and newest.number > actor.version:
            self._send(actor.name, actor.epoch, messages.NewVersion(newest))
        if self.progress.stopping:
            self._send(actor.name, actor.epoch, messages.Stop(self.progress.stopping))

    def _present(self, name: str, epoch: str) -> ActorState | None:
        actor = self.actors.get(name)
        return actor if actor is not None and actor.epoch == epoch else None

    def _lose(self, name: str, reason: str) -> None:
        actor = self.actors[name]
        for number in sorted(actor.tickets):
            self._record(facts.TicketRevoked(number, self.tickets.open[number].attempt, reason))
        report = actor.report
        figures = (report.busy_seconds, report.elapsed_seconds, report.num_tokens) if report else (0.0, 0.0, 0)
        self._record(facts.ActorLeft(name, actor.epoch, reason, *figures))

    def _expire_leases(self) -> None:
        for actor in list(self.actors.values()):
            if self._now - actor.seen_at > LEASE_SECONDS:
                self._lose(actor.name, f"silent for more than {LEASE_SECONDS:.0f} s")

    # results

    def _in_sequence(self, actor: str, epoch: str, seq: int) -> bool:
        """Whether a result is the next of its actor epoch. Duplicates are acknowledged again; a gap is filled by the actor resending."""
        present = self._present(actor, epoch)
        if present is None:
            self._send(actor, epoch, messages.HelloWanted())
            return False
        present.is_heard(self._now)
        acked = self._acked.get((actor, epoch), 0)
        if seq == acked + 1:
            return True
        reason = "duplicate" if seq <= acked else "gap"
        self.noise[reason] += 1
        self._send(actor, epoch, messages.Ack(acked))
        return False

    def _group_arrived(self, event: ev.GroupArrived) -> None:
        if not self._in_sequence(event.actor, event.epoch, event.seq):
            return
        oldest_step = self.versions.oldest_step(event.versions)
        ticket = self.tickets.open.get(event.ticket)
        refusal = self._refusal(event, ticket, oldest_step)
        if refusal:
            self._refuse(event, ticket, refusal)
        elif oldest_step is not None:
            self._record(
                facts.GroupAccepted(
                    actor=event.actor,
                    epoch=event.epoch,
                    seq=event.seq,
                    ticket=event.ticket,
                    attempt=event.attempt,
                    versions=event.versions,
                    oldest_step=oldest_step,
                    num_tokens=event.num_tokens,
                    reward=event.reward,
                ),
                event.payload,
            )
        self._send(event.actor, event.epoch, messages.Ack(event.seq))

    def _refusal(self, event: ev.GroupArrived, ticket: Ticket | None, oldest_step: int | None) -> str:
        """Why a group is refused, or nothing. A group for a ticket that was revoked meanwhile is as good as any other."""
        if event.invalid:
            return event.invalid
        if ticket is None or event.attempt > ticket.attempt:
            return "not issued" if event.ticket >= self.tickets.counts.issued or ticket is not None else "already ended"
        if ticket.state in (State.QUEUED, State.BATCHED):
            return "already done"
        if oldest_step is None:
            return "orphaned" if all(number in self.versions.by_number for number in event.versions) else "unknown version"
        if oldest_step < self.pacing.oldest_step(self.tickets.batch_of(event.ticket)):
            return "stale"
        return ""

    def _refuse(self, event: ev.GroupArrived, ticket: Ticket | None, reason: str) -> None:
        self._record(facts.ResultRefused(event.actor, event.epoch, event.seq, event.ticket, reason))
        self._send(event.actor, event.epoch, messages.Refused(event.seq, event.ticket, reason))
        if ticket is None or not self._holds(ticket, event.actor, event.epoch):
            return
        if reason == "stale":
            self._end(ticket.number, "expired", "its group arrived too old for its batch")
        elif event.invalid or reason == "unknown version":
            self._record(facts.AttemptFailed(event.actor, event.epoch, event.seq, event.ticket, ticket.attempt, reason))
            self._failed(ticket, reason)
        else:
            self._record(facts.TicketRevoked(ticket.number, ticket.attempt, reason))

    @staticmethod
    def _holds(ticket: Ticket, actor: str, epoch: str) -> bool:
        """Whether a ticket is with this process of this actor."""
        return ticket.state is State.OUTSTANDING and (ticket.actor, ticket.epoch) == (actor, epoch)

    def _attempt_given_up(self, event: ev.AttemptGivenUp) -> None:
        if not self._in_sequence(event.actor, event.epoch, event.seq):
            return
        self._record(facts.AttemptFailed(event.actor, event.epoch, event.seq, event.ticket, event.attempt, event.reason))
        ticket = self.tickets.open.get(event.ticket)
        if ticket is not None and ticket.attempt == event.attempt and self._holds(ticket, event.actor, event.epoch):
            self._failed(ticket, event.reason)
        self._send(event.actor, event.epoch, messages.Ack(event.seq))

    def _failed(self, ticket: Ticket, reason: str) -> None:
        """Reissue a ticket whose attempt failed, or end it; end the run when nothing but failures comes."""
        if ticket.num_failures < MAX_FAILURES:
            self._record(facts.TicketRevoked(ticket.number, ticket.attempt, f"failed: {reason}"))
            return
        self._end(ticket.number, "failed", reason)
        if self._failed_in_a_row >= max(2, self.pacing.groups_per_batch):
            self._halt(f"{self._failed_in_a_row} tickets in a row failed {MAX_FAILURES} times each; the last reason was: {reason}")

    def _end(self, number: int, outcome: facts.Outcome, reason: str) -> None:
        self._record(facts.TicketEnded(number, outcome, reason))

    # tickets

    def _issue(self) -> None:
        """Issue whatever pacing allows, to the actors with credit, those with the fewest tickets in hand first."""
        if self.progress.stopping or self.progress.lineage < 0 or not self.room.allows_credit:
            return
        while (due := self.tickets.next_issue()) is not None:
            number, batch = due
            actor = self._actor_for(self.pacing.oldest_step(batch))
            if actor is None:
                return
            attempt = self.tickets.open[number].attempt + 1 if number in self.tickets.open else 1
            step = self.versions.by_number[actor.version].version.step
            self._record(facts.TicketIssued(number, attempt, actor.name, actor.epoch, actor.version, step))
            self._send_ticket(self.tickets.open[number])

    def _actor_for(self, oldest_step: int) -> ActorState | None:
        able = [
            actor
            for actor in self.actors.values()
            if len(actor.tickets) < actor.num_wanted and (step := self.versions.step_of(actor.version)) is not None and step >= oldest_step
        ]
        return min(able, key=lambda actor: len(actor.tickets), default=None)

    def _send_ticket(self, ticket: Ticket) -> None:
        ticket.sent_at = self._now
        number = ticket.number
        wire = WireTicket(
            number, ticket.attempt, prompt_index(self._run_seed, number, self._num_prompts), ticket_seed(self._run_seed, number)
        )
        self._send(ticket.actor, ticket.epoch, messages.IssueTicket(wire))

    # learner

    def _learner_here(self, event: ev.LearnerHere) -> None:
        if self.learner is None or self.learner.session != event.session:
            if event.step > self.progress.step:
                at = f"it starts from step {event.step}, but this run's journal ends at step {self.progress.step}"
                self._answer(event.session, messages.LearnerRefused("hello", f"{at}; start it from a checkpoint of this run"))
                return
            self._record(facts.LearnerStarted(event.session, self.progress.lineage + 1, event.step, event.world_size, event.environment))
        lineage, number = self.progress.lineage, self.versions.next_number
        self._effects.append(ev.WelcomeLearner(event.session, lineage, number))

    def _answer(self, session: str, message: messages.ToLearner) -> None:
        self._effects.append(ev.SendLearner(session, message))

    def _from_learner(self, event: ev.BatchWanted | ev.StepDone | ev.VersionReady | ev.EvaluationDone | ev.LearnerGone) -> None:
        if self.learner is None or self.learner.session != event.session:
            about = "publish" if isinstance(event, ev.VersionReady) else "request"
            self._answer(event.session, messages.LearnerRefused(about, messages.TAKEN_OVER))
            return
        match event:
            case ev.BatchWanted():
                self._batch_wanted(self.learner, event.step)
            case ev.StepDone():
                self._step_done(event)
            case ev.VersionReady():
                self._version_ready(event)
            case ev.EvaluationDone():
                if (event.step, event.reward) not in self.progress.evaluations[-1:]:
                    self._record(facts.Evaluated(event.step, event.reward, event.num_prompts))
                self._answer(event.session, messages.EvaluationNoted(event.step))
            case ev.LearnerGone():
                self._learner_gone(event)

    def _batch_wanted(self, learner: LearnerState, step: int) -> None:
        if self.progress.stopping:
            self._answer(learner.session, messages.Stop(self.progress.stopping))
            return
        batch = self.pacing.batch_of_step(step)
        if step > self.progress.step:
            self._answer(learner.session, messages.BatchPending(step, 0, self.room.shortage or f"the commit of step {self.progress.step}"))
            return
        if step != self.progress.step or batch > self.tickets.next_batch:
            reason = f"step {step} was asked for, the next one is {self.progress.step}"
            self._answer(learner.session, messages.LearnerRefused("batch", reason))
            return
        if learner.waiting_step != step:
            learner.waiting_step, learner.waiting_since = step, self._now
        if batch == self.tickets.next_batch and (self.tickets.complete() is None or not self.room.allows_commits):
            missing = self.pacing.groups_per_batch - self.tickets.num_queued_for_next()
            self._answer(learner.session, messages.BatchPending(step, missing, self.why_waiting()))

    def _deliver(self) -> None:
        """Give the learner the batch it waits for, once it is complete; what would break the bound is expired first."""
        learner = self.learner
        if learner is None or learner.waiting_step is None or self.progress.stopping:
            return
        number = self.pacing.batch_of_step(learner.waiting_step)
        if number == self.tickets.next_batch:
            if not self.room.allows_commits:
                return
            for ticket in self.tickets.complete() or []:
                if ticket.oldest_step < self.pacing.oldest_step(number):
                    self._end(ticket.number, "expired", "older than max_lag at delivery")
            ready = self.tickets.complete()
            if ready is None:
                return
            self._record(facts.BatchFormed(number, learner.waiting_step, [ticket.number for ticket in ready]))
        batch = self.tickets.batches[number]
        steps = self.versions.steps_from(batch.oldest_version)
        message = messages.BatchReady(learner.waiting_step, number, batch.tickets, steps)
        learner.waiting_step = None
        self._answer(learner.session, message)

    def _step_done(self, event: ev.StepDone) -> None:
        if event.step < self.progress.step:
            self._answer(event.session, messages.Committed(event.step))
            return
        if event.step > self.progress.step:  # a commit before it was lost on the way; the learner sends them all again
            self._answer(event.session, messages.BatchPending(event.step, 0, f"the commit of step {self.progress.step}"))
            return
        batch = self.tickets.batches.get(event.batch)
        if batch is None or event.batch != self.pacing.batch_of_step(event.step):
            self._answer(event.session, messages.LearnerRefused("commit", f"step {event.step} does not use batch {event.batch}"))
            return
        lags = [event.step - oldest for oldest in batch.oldest_steps]
        self._record(facts.StepCommitted(event.step, event.batch, self.progress.lineage, lags, finite(event.metrics)))
        for note in event.notes:
            self._record(facts.LearnerNoted(event.step, note.kind, note.text, finite(note.values)))
            if note.ends_run:
                self._stop(note.text)
        if lags != event.lags or max(lags) > self.pacing.max_lag:
            counted = f"lags at step {event.step} are {lags} by the ledger and {event.lags} by the learner"
            self._halt(f"{counted}, max_lag is {self.pacing.max_lag}")
        self._answer(event.session, messages.Committed(event.step))

    def _version_ready(self, event: ev.VersionReady) -> None:
        version = event.version
        number = self.versions.reproduced_by(version)
        impossible = self._impossible(event)
        if impossible:
            self._answer(event.session, messages.LearnerRefused("publish", impossible))
            return
        if number is not None:
            if self.versions.by_number[number].standing is Standing.SUSPECT:
                self._record(facts.VersionReproduced(number, self.progress.lineage))
            needed = self.versions.files()
            again = [blob for blob in (event.delta, event.compact, event.snapshot) if blob is not None and blob.digest not in needed]
            self._effects.append(ev.RemoveBlobs(again))
        elif version.number != self.versions.next_number:
            reason = f"version {version.number} was offered, the next number is {self.versions.next_number}"
            self._answer(event.session, messages.LearnerRefused("publish", reason))
            return
        else:
            for doubtful in self.versions.in_doubt_from(version.step):
                self._orphan(doubtful)
            number = version.number
            self._record(
                facts.VersionPublished(
                    version=version,
                    parent=event.parent,
                    delta=event.delta,
                    snapshot=event.snapshot,
                    full_bytes=event.full_bytes,
                    bound_bytes=event.bound_bytes,
                    compact=event.compact,
                    is_base=event.is_base,
                    seconds=event.seconds,
                )
            )
            self._effects.append(ev.SendAllActors(messages.NewVersion(version)))
        self._answer(event.session, messages.Published(version.step, number, self.versions.next_number))

    def _impossible(self, event: ev.VersionReady) -> str:
        """Why a publication cannot be what it says, or nothing. A false step would falsify every lag counted from it."""
        step, lineage = event.version.step, event.version.lineage
        if not 0 <= step <= self.progress.step + self.pacing.reuse or lineage != self.progress.lineage:
            return f"step {step} of lineage {lineage} is not possible at step {self.progress.step} of lineage {self.progress.lineage}"
        if event.delta is None and event.snapshot is None and not event.is_base:
            return "it has neither a delta nor a snapshot"
        if event.delta is not None and event.parent not in self.versions.by_number:
            return f"its delta starts from version {event.parent}, which is not known"
        return ""

    def _anchor_made(self, event: ev.AnchorMade) -> None:
        """Newcomers get one folded delta; deltas that it covers may go once the store holds more than its share."""
        before = self.versions.anchor
        self._record(facts.VersionAnchored(event.number, event.root, event.delta))
        if before is not None and before.delta != event.delta:
            self._effects.append(ev.RemoveBlobs([before.delta]))
        through = self.versions.excess()
        if through is not None:
            files = self.versions.delta_files(through)
            self._record(facts.DeltasDropped(through))
            self._effects.append(ev.RemoveBlobs(files))

    def _orphan(self, number: int) -> None:
        """A version's branch is dead: its queued groups are sampled again."""
        self._record(facts.VersionOrphaned(number, self.progress.lineage))
        for ticket in self.tickets.unbatched():
            if ticket.state is State.QUEUED and number in ticket.versions:
                self._record(facts.TicketRevoked(ticket.number, ticket.attempt, "orphaned"))

    def _learner_gone(self, event: ev.LearnerGone) -> None:
        if event.step != self.progress.step:
            reason = f"it says it ends at step {event.step}, the journal is at step {self.progress.step}"
            self._answer(event.session, messages.LearnerRefused("done", reason))
            return
        if not self.progress.ended:
            self._record(facts.LearnerFinished(event.step, finite(event.summary)))
            self._stop("the last step is done" if event.step >= self.pacing.num_steps else "the learner has left")
            self._close("")
        self._answer(event.session, messages.Goodbye())

    def _stop(self, reason: str) -> None:
        if self.progress.stopping:
            return
        reason = brief(reason) or "somebody asked for it"  # an empty reason is how a run that goes on looks
        self._record(facts.RunStopping(reason))
        self._effects.append(ev.SendAllActors(messages.Stop(reason)))
        if self.learner is not None:
            self._answer(self.learner.session, messages.Stop(reason))

    def _halt(self, reason: str) -> None:
        if not self.progress.ended:
            self._stop(reason)
            self._close(brief(reason))

    def _close(self, halted: str) -> None:
        """Nothing more will be sampled; what is queued stays so only if the run can still go on from there."""
        finished = self.progress.step >= self.pacing.num_steps
        for ticket in self.tickets.unbatched():
            if ticket.state is not State.QUEUED or finished:
                self._end(ticket.number, "void", "the run ended")
        self._record(facts.RunEnded(halted))

    # --- applying -------------------------------------------------------------------------------------------------------------------

    def apply(self, fact: facts.AnyFact) -> None:
        """Bring the state up to a fact. Used by `handle` and, on its own, by recovery."""
        match fact:
            case facts.ActorJoined():
                self.actors[fact.actor] = ActorState(fact.actor, fact.epoch, fact.engine, fact.host, self._now)
            case facts.ActorLeft():
                self.actors.pop(fact.actor, None)
            case facts.TicketIssued():
                self.tickets.issue(fact.ticket, fact.attempt, fact.actor, fact.epoch, self._now)
                self.actors[fact.actor].tickets.add(fact.ticket)
            case facts.TicketRevoked():
                was_queued = self.tickets.open[fact.ticket].state is State.QUEUED
                self.progress.refused["orphaned"] += was_queued and fact.reason == "orphaned"
                self._leave_hand(fact.ticket)
                self.tickets.revoke(fact.ticket)
            case facts.GroupAccepted():
                self._leave_hand(fact.ticket)
                self.tickets.accept(fact.ticket, fact.versions, fact.oldest_step)
                self._acked[fact.actor, fact.epoch] = fact.seq
                self._failed_in_a_row = 0
            case facts.ResultRefused():
                self._acked[fact.actor, fact.epoch] = fact.seq
                self.progress.refused[fact.reason] += 1
            case facts.AttemptFailed():
                self._acked[fact.actor, fact.epoch] = fact.seq
                ticket = self.tickets.open.get(fact.ticket)
                if ticket is not None and ticket.attempt == fact.attempt and self._holds(ticket, fact.actor, fact.epoch):
                    ticket.num_failures += 1
            case facts.TicketEnded():
                self._leave_hand(fact.ticket)
                self.tickets.end(fact.ticket, fact.outcome)
                self._failed_in_a_row += fact.outcome == "failed"
            case facts.BatchFormed():
                self.tickets.form(fact.batch, fact.tickets)
            case _:
                self._apply_progress(fact)

    def _apply_progress(self, fact: facts.AnyFact) -> None:
        progress = self.progress
        match fact:
            case facts.StepCommitted():
                progress.step = fact.step + 1
                progress.lags.update(fact.lags)
                progress.metrics = fact.metrics
                if fact.step == self.pacing.last_use(fact.batch) or fact.step + 1 == self.pacing.num_steps:
                    self.tickets.consume(fact.batch)
            case facts.Evaluated():
                progress.evaluations.append((fact.step, fact.reward))
            case facts.LearnerNoted():
                progress.notes = [*progress.notes, (fact.step, fact.text)][-NUM_NOTES:]
            case facts.VersionPublished():
                self.versions.add(fact)
            case facts.VersionAnchored():
                self.versions.set_anchor(fact)
            case facts.DeltasDropped():
                self.versions.drop(fact)
            case facts.VersionReproduced() | facts.VersionOrphaned():
                is_good = isinstance(fact, facts.VersionReproduced)
                self.versions.by_number[fact.number].standing = Standing.GOOD if is_good else Standing.ORPHANED
            case facts.LearnerStarted():
                progress.lineage, progress.step = fact.lineage, fact.step
                if progress.ended:  # a run that had ended goes on; a run that is being stopped keeps stopping
                    progress.ended, progress.stopping, progress.halted = False, "", ""
                    self._failed_in_a_row = 0
                self.versions.suspect_after(fact.step)
                self.learner = LearnerState(fact.session, fact.lineage, fact.step, fact.world_size)
            case facts.LearnerFinished():
                progress.summary = fact.summary
            case facts.ActorsDesired():
                self.desired_actors = fact.num_actors
            case facts.RunStopping():
                progress.stopping = fact.reason
            case facts.RunEnded():
                progress.ended, progress.halted = True, fact.halted

    def _leave_hand(self, number: int) -> None:
        holder = self.actors.get(self.tickets.open[number].actor)
        if holder is not None:
            holder.tickets.discard(number)

    # --- looking --------------------------------------------------------------------------------------------------------------------

    def recovered(self, now: float) -> None:
        """The journal has been applied: whoever was present has a lease from `now`, and has not been heard."""
        self._now = now
        for actor in self.actors.values():
            actor.seen_at = now
        for ticket in self.tickets.open.values():
            ticket.sent_at = now

    def why_waiting(self) -> str:
        """Who the learner's next batch waits for, in words."""
        missing = self.tickets.missing()
        held = Counter(ticket.actor or "nobody" for ticket in missing)
        parts = [self.room.shortage] if self.room.shortage else []
        parts += [
            f"{count} with {name}" + (f" ({self.actors[name].when_heard(self._now)})" if name in self.actors else "")
            for name, count in sorted(held.items())
        ]
        unissued = self.pacing.groups_per_batch - self.tickets.num_queued_for_next() - len(missing)
        if unissued > 0:
            able = "no actor is connected" if not self.actors else "no actor has credit and a new enough version"
            parts.append(f"{unissued} not issued: {able}")
        return brief("; ".join(parts) or "nothing")
