"""What a person wants to know about a run, kept up from facts and heartbeats.

Invariant: nothing here decides anything; forgetting it all would change no promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from broker.ledger import Ledger
from broker.state import UNHEARD
from protocol import facts, messages
from protocol.lag_account import LagAccount

STARTING: Final = "starting"
"""What a peer is doing that has joined and not reported yet."""
SILENT_SECONDS: Final = 5.0
"""A peer that was not heard for this long is worth a line."""


@dataclass(slots=True)
class _Rate:
    """Tokens per second of one peer between its last two heartbeats at least a second apart."""

    num_tokens: int = 0
    at: float = 0.0
    per_second: float = 0.0

    def observe(self, num_tokens: int, now: float) -> None:
        if now - self.at >= 1.0:
            elapsed = now - self.at
            self.per_second = max(0, num_tokens - self.num_tokens) / elapsed if self.at else 0.0
            self.num_tokens, self.at = num_tokens, now


class StatusBook:
    """The status of one run."""

    def __init__(self, run: str, num_steps: int, now: float) -> None:
        self._run, self._num_steps, self._started = run, num_steps, now
        self._rates: dict[str, _Rate] = {}
        self._learner: messages.LearnerReport | None = None
        self._learner_seen: float | None = None
        """When this broker heard the learner last."""
        self._delta_bytes = self._full_bytes = 0
        self._lags = LagAccount()

    def observe(self, fact: facts.AnyFact, now: float) -> None:
        """A fact was recorded, now or in an earlier life of the broker."""
        self._lags.add(fact)
        if isinstance(fact, facts.LearnerStarted):
            self._learner, self._learner_seen = None, now
        if isinstance(fact, facts.VersionPublished):
            self._full_bytes = fact.full_bytes
            if fact.delta is not None:
                self._delta_bytes = fact.delta.size

    def recovered(self) -> None:
        """The facts so far were those of earlier lives: nobody has been heard yet."""
        self._learner_seen = None

    def actor_reported(self, actor: str, report: messages.ActorReport, now: float) -> None:
        """A heartbeat of an actor."""
        self._rates.setdefault(actor, _Rate()).observe(report.num_tokens, now)

    def learner_reported(self, report: messages.LearnerReport, now: float) -> None:
        """A heartbeat of the learner."""
        self._learner, self._learner_seen = report, now

    def status(self, ledger: Ledger, now: float) -> messages.RunStatus:
        """The state of the run at `now`."""
        progress, counts = ledger.progress, ledger.tickets.counts
        newest, parts = ledger.versions.newest, self._lags.recent
        return messages.RunStatus(
            run=self._run,
            phase=_phase(ledger),
            step=progress.step,
            num_steps=self._num_steps,
            max_lag=ledger.pacing.max_lag,
            elapsed_seconds=now - self._started,
            issued=counts.issued,
            outstanding=counts.outstanding,
            queued=counts.queued,
            consumed=counts.consumed,
            expired=counts.expired,
            failed=counts.failed,
            void=counts.void,
            refused=dict(progress.refused + ledger.noise),
            lags=dict(sorted(progress.lags.items())),
            largest_lag=max(progress.lags, default=0),
            num_versions=len(ledger.versions.by_number),
            newest_step=newest.step if newest else -1,
            delta_bytes=self._delta_bytes,
            full_bytes=self._full_bytes,
            actors=[self._actor(ledger, name, now) for name in sorted(ledger.actors)],
            learner=self._learner_status(ledger, now),
            desired_actors=ledger.desired_actors,
            metrics={name: value for name, value in progress.metrics.items() if value is not None},
            evaluations=progress.evaluations[-64:],
            waits=self._waits(ledger, now),
            notes=progress.notes,
            halted=progress.halted,
            lineage=progress.lineage,
            shortage="" if ledger.room.allows_commits else ledger.room.shortage,
            lag_parts=parts._asdict() if parts else {},
        )

    def _actor(self, ledger: Ledger, name: str, now: float) -> messages.PeerStatus:
        actor = ledger.actors[name]
        report = actor.report
        return messages.PeerStatus(
            name=name,
            host=actor.host,
            engine=actor.engine,
            version=actor.version,
            step=ledger.versions.step_of(actor.version) or 0,
            tickets=sorted(actor.tickets),
            busy_share=report.busy_seconds / max(report.elapsed_seconds, 1e-9) if report else 0.0,
            tokens_per_second=self._rates[name].per_second if name in self._rates else 0.0,
            last_seen=now - (self._started if actor.heard_at is None else actor.heard_at),
            doing=_doing(report, actor.heard_at),
            was_heard=actor.heard_at is not None,
        )

    def _learner_status(self, ledger: Ledger, now: float) -> messages.PeerStatus | None:
        if ledger.learner is None:
            return None
        report = self._learner
        return messages.PeerStatus(
            name=f"learner ({ledger.learner.world_size} ranks)",
            host="",
            engine="",
            version=-1,
            step=report.step if report else ledger.progress.step,
            tickets=[],
            busy_share=report.busy_seconds / max(report.elapsed_seconds, 1e-9) if report else 0.0,
            tokens_per_second=0.0,
            last_seen=now - (self._started if self._learner_seen is None else self._learner_seen),
            doing=_doing(report, self._learner_seen),
            was_heard=self._learner_seen is not None,
        )

    def _waits(self, ledger: Ledger, now: float) -> list[str]:
        waits = [ledger.room.shortage] if ledger.room.shortage else []
        learner = ledger.learner
        if learner is None:
            waits.append(f"everybody waits for the learner, for {now - self._started:.0f} s")
        elif learner.waiting_step is not None:
            since = now - learner.waiting_since
            waits.append(f"learner waits for the batch of step {learner.waiting_step}, for {since:.1f} s: {ledger.why_waiting()}")
        silent = now - (self._started if self._learner_seen is None else self._learner_seen)
        if learner is not None and silent > SILENT_SECONDS and not ledger.progress.ended:
            if self._learner_seen is None:
                heard = f"{UNHEARD}, {silent:.0f} s ago"
            else:
                heard = f"last heard {silent:.0f} s ago: {_doing(self._learner, self._learner_seen)}"
            waits.append(f"everybody waits for the learner, {heard}")
        absent = ledger.desired_actors - len(ledger.actors)
        if absent > 0 and not ledger.progress.stopping:
            waits.append(
                f"{absent} of {ledger.desired_actors} actors are not there; their tickets are with others, or wait for one with credit"
            )
        for actor in ledger.actors.values():
            if not actor.tickets:
                version = "a version" if actor.version < 0 else f"a version newer than {actor.version}"
                waits.append(f"{actor.name} waits for a ticket ({actor.when_heard(now)}); pacing may want {version} first")
        return waits


def _doing(report: messages.ActorReport | messages.LearnerReport | None, heard_at: float | None) -> str:
    """What a peer does, by its last report; what is known of it without one."""
    if report is not None:
        return report.doing
    return UNHEARD if heard_at is None else STARTING


def _phase(ledger: Ledger) -> str:
    progress = ledger.progress
    if progress.halted:
        return "halted"
    if progress.ended:
        return "finished"
    if progress.stopping:
        return "stopping"
    return "training" if progress.lineage >= 0 else "starting"
