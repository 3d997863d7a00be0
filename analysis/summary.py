"""The summary of a run, from its journal alone. The field names are stable; docs/operations.md explains them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from analysis.lengths import WINDOW, Lengths
from analysis.recount import recount
from protocol import facts
from protocol.config import parse_config_json
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.lag_account import LagAccount, LagParts


class Summary(msgspec.Struct, frozen=True):
    """What a run came to. Held-out rewards are means over prompts, lags count groups over steps, busy shares are of a role's own time."""

    run: str
    outcome: str
    steps: int
    wall_seconds: float
    heldout_reward_before: float | None
    heldout_reward_after: float | None
    """None as well if no later step was evaluated than the first that was."""
    training_reward_first: float | None
    training_reward_last: float | None
    max_lag: int
    largest_lag: int
    lags: dict[int, int]
    lags_by_ledger: dict[int, int]
    largest_lag_by_learner: int
    tickets_issued: int
    tickets_open: int
    tickets_consumed: int
    tickets_expired: int
    tickets_failed: int
    tickets_void: int
    tickets_reissued: int
    results_refused: dict[str, int]
    broken_promises: list[str]
    publications: int
    publication_bytes: float | None
    publication_bytes_full: int
    learner_busy_share: float | None
    actor_busy_share: float | None
    num_actors_seen: int
    num_sampled_tokens: int
    groups_trained: int
    lag_parts: dict[str, float]
    lag_parts_recent: dict[str, float]
    completion_length_trained: float | None
    completion_length_dispatched: float | None
    completion_length_trained_recent: float | None
    completion_length_dispatched_recent: float | None
    completion_length_lowest_ratio: float | None
    tickets_open_without_group: int
    tickets_ended_without_group: int


def summarize(run: Path) -> Summary:
    """The summary of the run in a directory. Raises JournalError."""
    path = run / JOURNAL_NAME
    connection = open_read_only(path)
    try:
        entries = list(read_facts(connection, path))
        (config,) = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        (num_tokens,) = connection.execute("SELECT coalesce(sum(num_tokens), 0) FROM groups").fetchone()
    finally:
        connection.close()
    history = [entry.fact for entry in entries]
    steps = [fact for fact in history if isinstance(fact, facts.StepCommitted)]
    rewards = [reward for fact in steps if (reward := fact.metrics.get("reward")) is not None]
    heldout = [fact for fact in history if isinstance(fact, facts.Evaluated)]
    versions = [fact for fact in history if isinstance(fact, facts.VersionPublished)]
    tenth = max(1, len(rewards) // 10)
    count = recount(path)
    account, lengths = LagAccount(), Lengths(parse_config_json(config).rollout.group_size)
    for fact in history:
        account.add(fact)
        lengths.add(fact)
    return Summary(
        run=run.resolve().name,
        outcome=_outcome(history),
        steps=max((fact.step + 1 for fact in steps), default=0),
        wall_seconds=round(entries[-1].time - entries[0].time, 3) if entries else 0.0,
        heldout_reward_before=heldout[0].reward if heldout else None,
        heldout_reward_after=heldout[-1].reward if heldout and heldout[-1].step > heldout[0].step else None,
        training_reward_first=_mean(rewards[:tenth]),
        training_reward_last=_mean(rewards[-tenth:]),
        max_lag=count.pacing.max_lag,
        largest_lag=count.largest_lag,
        lags=dict(sorted(count.lags.items())),
        lags_by_ledger=dict(sorted(count.ledger_lags.items())),
        largest_lag_by_learner=count.learner_largest_lag,
        tickets_issued=len(count.issued),
        tickets_open=count.num_open,
        tickets_consumed=len(count.consumed),
        tickets_expired=count.num_ended("expired"),
        tickets_failed=count.num_ended("failed"),
        tickets_void=count.num_ended("void"),
        tickets_reissued=count.num_reissued,
        results_refused=dict(count.refused),
        broken_promises=count.broken,
        publications=len(versions),
        publication_bytes=_mean([float(fact.delta.size) for fact in versions if fact.delta is not None]),
        publication_bytes_full=versions[-1].full_bytes if versions else 0,
        learner_busy_share=_learner_busy(history),
        actor_busy_share=_actor_busy(history),
        num_actors_seen=len({fact.actor for fact in history if isinstance(fact, facts.ActorJoined)}),
        num_sampled_tokens=num_tokens,
        groups_trained=len(count.consumed),
        lag_parts=_fields(account.total.mean),
        lag_parts_recent=_fields(account.recent),
        completion_length_trained=lengths.all.mean_trained,
        completion_length_dispatched=lengths.all.mean_all,
        completion_length_trained_recent=lengths.recent.mean_trained,
        completion_length_dispatched_recent=lengths.recent.mean_all,
        completion_length_lowest_ratio=lengths.lowest_ratio,
        tickets_open_without_group=lengths.num_open_without_group,
        tickets_ended_without_group=lengths.num_ended_without_group,
    )


def lines(summary: Summary) -> list[str]:
    """The summary for a person."""
    nothing = "nothing was trained on"
    same = summary.lags == summary.lags_by_ledger and summary.largest_lag == summary.largest_lag_by_learner and not summary.broken_promises
    agree = f"ledger, learner and journal agree: {summary.lags}" if same else "LEDGER, LEARNER AND JOURNAL DISAGREE"
    delta = summary.publication_bytes
    share = (
        f"{delta:.0f} B of {summary.publication_bytes_full} B, {summary.publication_bytes_full / delta:.1f}x smaller" if delta else "none"
    )
    return [
        f"run              {summary.run}: {summary.outcome}, {summary.steps} steps in {summary.wall_seconds:.0f} s",
        f"held-out reward  {_gain(summary.heldout_reward_before, summary.heldout_reward_after)}",
        f"lag              largest {summary.largest_lag}, S = {summary.max_lag}; {agree if summary.lags else nothing}",
        f"lag in parts     {_made_of(summary.lag_parts)}",
        f"tickets          {summary.tickets_issued} issued = {summary.tickets_consumed} consumed + {summary.tickets_expired} expired + "
        f"{summary.tickets_failed} failed + {summary.tickets_void} void + {summary.tickets_open} open",
        f"lengths          {_lengths(summary)}",
        f"publications     {summary.publications}, mean delta {share}",
        f"busy             learner {_percent(summary.learner_busy_share)}, actors {_percent(summary.actor_busy_share)}",
        *(f"BROKEN PROMISE   {text}" for text in summary.broken_promises),
    ]


def _gain(before: float | None, after: float | None) -> str:
    if before is None:
        return "not measured"
    return f"{before:.3f} at first, not evaluated again" if after is None else f"{before:.3f} -> {after:.3f} ({after - before:+.3f})"


def _fields(parts: LagParts | None) -> dict[str, float]:
    return parts._asdict() if parts else {}


def _made_of(parts: dict[str, float]) -> str:
    return f"{LagParts(**parts).in_words()}, mean over groups and steps" if parts else "nothing was trained on"


def _lengths(summary: Summary) -> str:
    """One line about what is lost of the long completions, if any is."""
    trained, dispatched, lowest = (
        summary.completion_length_trained,
        summary.completion_length_dispatched,
        summary.completion_length_lowest_ratio,
    )
    if trained is None or not dispatched:
        return "nothing was trained on"
    share = f"{trained / dispatched:.1%}" + (f", lowest over {WINDOW} steps {lowest:.1%}" if lowest is not None else "")
    return (
        f"{trained:.1f} tokens a completion trained on, {dispatched:.1f} a completion that came back ({share}); "
        f"tickets without a group: {summary.tickets_ended_without_group} ended, {summary.tickets_open_without_group} open"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _outcome(history: list[facts.AnyFact]) -> str:
    ends = [fact for fact in history if isinstance(fact, facts.RunEnded)]
    stops = [fact.reason for fact in history if isinstance(fact, facts.RunStopping)]
    if not ends:
        return "not ended"
    return f"halted: {ends[-1].halted}" if ends[-1].halted else stops[-1]


def _learner_busy(history: list[facts.AnyFact]) -> float | None:
    ends = [fact.summary for fact in history if isinstance(fact, facts.LearnerFinished)]
    busy, elapsed = (ends[-1].get("busy_seconds"), ends[-1].get("elapsed_seconds")) if ends else (None, None)
    return busy / elapsed if busy is not None and elapsed else None


def _actor_busy(history: list[facts.AnyFact]) -> float | None:
    """Busy seconds of all actors over their seconds of presence, as they reported them when they left."""
    left = [fact for fact in history if isinstance(fact, facts.ActorLeft)]
    elapsed = sum(fact.elapsed_seconds for fact in left)
    return sum(fact.busy_seconds for fact in left) / elapsed if elapsed else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
