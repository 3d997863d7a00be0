"""Lists of what a recording holds: groups, refused results, batches and events. Rows come one at a time, so lists may be long."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from analysis.fates import read_fates
from analysis.recording import FACT_NAMES, Recording
from analysis.text import printable
from protocol import facts
from protocol.errors import ConfigError, InvalidGroup
from protocol.groups import decode_group
from protocol.journal import JournalEntry
from protocol.lag_account import LagAccount

GROUP_HEADER: Final = "ticket try actor              engine             versions    step   lag  tokens  reward outcome"
BATCH_HEADER: Final = "batch  step used at     tickets         groups  versions    lag publish+flight+queued  tokens  reward formed (UTC)"


class GroupFilter(msgspec.Struct, frozen=True):
    """Which groups to list; None and False leave out a condition. `step` is any step that used the group, `version` any of its tokens'."""

    ticket: int | None = None
    batch: int | None = None
    step: int | None = None
    actor: str | None = None
    version: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    min_lag: int | None = None
    refused: bool = False


class GroupRow(msgspec.Struct, frozen=True):
    """One accepted group, or one refused result, of which only ticket, actor, outcome and time are recorded.

    `step` is the first step that uses the group and `lag` its lag at the last one so far; None while it is in no batch.
    """

    lsn: int
    time: float
    ticket: int
    attempt: int | None
    actor: str
    engine: str | None
    oldest_version: int | None
    newest_version: int | None
    batch: int | None
    step: int | None
    lag: int | None
    num_tokens: int | None
    reward: float | None
    outcome: str


class BatchRow(msgspec.Struct, frozen=True):
    """One batch. `lag` is the largest of its groups at the last step that used it so far.

    `lag_parts` are the fields of LagParts: the mean over its groups at its first use; empty if the recording does not tell them.
    """

    batch: int
    step: int
    steps: list[int]
    num_repeated: int
    tickets: list[int]
    oldest_version: int | None
    newest_version: int | None
    lag: int | None
    lag_parts: dict[str, float]
    num_tokens: int
    reward: float | None
    consumed: bool
    formed: float


# --- groups


def list_groups(recording: Recording, wanted: GroupFilter) -> Iterator[GroupRow]:
    """The groups (or refused results) that fulfil all conditions, in the order they were accepted. Raises ConfigError, JournalDamaged."""
    if wanted.refused:
        yield from _refused(recording, wanted)
        return
    fates = read_fates(recording)
    _check_version(recording, wanted.version)
    conditions: list[str] = ["g.lsn <= ?"]
    values: list[Any] = [recording.last_lsn]
    for condition, value in (
        ("g.ticket = ?", wanted.ticket),
        ("g.actor = ?", wanted.actor),
        ("g.reward >= ?", wanted.min_reward),
        ("g.reward <= ?", wanted.max_reward),
        ("? BETWEEN g.oldest_version AND g.newest_version", wanted.version),
    ):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    query = (
        "SELECT g.lsn, e.time, g.ticket, g.attempt, g.actor, g.oldest_version, g.newest_version, g.oldest_step, g.num_tokens, g.reward, "
        f"e.body FROM groups g JOIN events e USING (lsn) WHERE {' AND '.join(conditions)} ORDER BY g.lsn"
    )
    for lsn, time, ticket, attempt, actor, oldest, newest, oldest_step, num_tokens, reward, body in recording.each(query, *values):
        outcome = fates.outcome(ticket, lsn)
        batch = None if outcome == "sampled again" else fates.batch(ticket)
        lag = None if batch is None else batch.last_use - oldest_step
        if wanted.version is not None and not _has_version(recording.decode(lsn, body), wanted.version):
            continue
        if wanted.batch is not None and (batch is None or batch.number != wanted.batch):
            continue
        if wanted.step is not None and (batch is None or wanted.step not in batch.steps):
            continue
        if wanted.min_lag is not None and (lag is None or lag < wanted.min_lag):
            continue
        yield GroupRow(
            lsn=lsn,
            time=time,
            ticket=ticket,
            attempt=attempt,
            actor=actor,
            engine=_engine(recording, lsn),
            oldest_version=oldest,
            newest_version=newest,
            batch=None if batch is None else batch.number,
            step=None if batch is None else batch.first_step,
            lag=lag,
            num_tokens=num_tokens,
            reward=reward,
            outcome=outcome,
        )


def _check_version(recording: Recording, version: int | None) -> None:
    if version is not None and not recording.ask("SELECT 1 FROM versions WHERE number = ?", version):
        ((last,),) = recording.ask("SELECT max(number) FROM versions")
        raise ConfigError("--version", version, "was never published", "leave it out" if last is None else f"a number from 0 to {last}")


def _has_version(fact: facts.AnyFact, version: int) -> bool:
    """Whether a token of an accepted group was sampled from a version: it may lie between the oldest and the newest without."""
    return isinstance(fact, facts.GroupAccepted) and version in fact.versions


def _engine(recording: Recording, lsn: int) -> str | None:
    """Who sampled a group, by its payload; None if that is damaged."""
    ((payload,),) = recording.ask("SELECT payload FROM groups WHERE lsn = ?", lsn)
    try:
        return decode_group(payload).engine
    except InvalidGroup:
        return None


def _refused(recording: Recording, wanted: GroupFilter) -> Iterator[GroupRow]:
    unknown = [
        f"--{name.replace('_', '-')}"
        for name in ("batch", "step", "version", "min_reward", "max_reward", "min_lag")
        if getattr(wanted, name) is not None
    ]
    if unknown:
        problem = "a refused result has no payload in the recording, only its ticket, actor and reason"
        raise ConfigError(unknown[0], getattr(wanted, unknown[0][2:].replace("-", "_")), problem, "leave out this condition or --refused")
    for lsn, time, fact in recording.facts(facts.ResultRefused, ticket=wanted.ticket):
        assert isinstance(fact, facts.ResultRefused)
        if wanted.actor in (None, fact.actor):
            outcome = f"refused: {fact.reason}"
            yield GroupRow(lsn, time, fact.ticket, None, fact.actor, None, None, None, None, None, None, None, None, outcome)


def group_line(row: GroupRow) -> str:
    """A row under GROUP_HEADER."""
    versions = "-" if row.oldest_version is None else f"{row.oldest_version}..{row.newest_version}"
    reward = "-" if row.reward is None else f"{row.reward:.3f}"
    return (
        f"{row.ticket:>6} {_or_dash(row.attempt):>3} {row.actor:<18} {row.engine or '-':<18} {versions:<10} {_or_dash(row.step):>5} "
        f"{_or_dash(row.lag):>5} {_or_dash(row.num_tokens):>7} {reward:>7} {row.outcome}"
    )


# --- batches


def list_batches(recording: Recording) -> Iterator[BatchRow]:
    """All batches, in the order they were formed. Raises JournalDamaged."""
    fates, account = read_fates(recording), _lag_account(recording)
    for batch in fates.batches.values():
        parts = account.at_first_use(batch.number)
        rows = []
        for ticket in batch.tickets:
            rows += recording.ask(
                "SELECT oldest_version, newest_version, oldest_step, num_tokens, reward FROM groups WHERE ticket = ? AND lsn < ? "
                "ORDER BY lsn DESC LIMIT 1",
                ticket,
                batch.formed_lsn,
            )
        oldest, newest, steps, tokens, rewards = list(zip(*rows, strict=True)) or [()] * 5
        yield BatchRow(
            batch=batch.number,
            step=batch.first_step,
            steps=batch.steps,
            num_repeated=batch.num_repeated,
            tickets=batch.tickets,
            oldest_version=min(oldest, default=None),
            newest_version=max(newest, default=None),
            lag=batch.last_use - min(steps) if steps else None,
            lag_parts=parts._asdict() if parts else {},
            num_tokens=sum(tokens),
            reward=sum(rewards) / len(rewards) if rewards else None,
            consumed=batch.consumed,
            formed=batch.formed_time,
        )


def _lag_account(recording: Recording) -> LagAccount:
    account = LagAccount()
    for entry in recording.facts(facts.TicketIssued, facts.GroupAccepted, facts.BatchFormed, facts.StepCommitted, facts.LearnerStarted):
        account.add(entry.fact)
    return account


def batch_line(row: BatchRow) -> str:
    """A row under BATCH_HEADER."""
    used = "not yet" if not row.steps else _span(row.steps[0], row.steps[-1]) + (f" +{row.num_repeated}" if row.num_repeated else "")
    reward = "-" if row.reward is None else f"{row.reward:.3f}"
    versions = "-" if row.oldest_version is None else f"{row.oldest_version}..{row.newest_version}"
    parts = "+".join(f"{part:.1f}" for name, part in row.lag_parts.items() if name != "reuse") or "-"
    return (
        f"{row.batch:>5} {row.step:>5} {used:<11} {_span(min(row.tickets), max(row.tickets)):<15} {len(row.tickets):>6}  {versions:<10} "
        f"{_or_dash(row.lag):>4} {parts:>21} {row.num_tokens:>7} {reward:>7} {moment(row.formed)}"
    )


# --- events


def list_events(recording: Recording, fact: str | None, since: int, until: int | None, ticket: int | None) -> Iterator[JournalEntry]:
    """The facts of a name (all, if None) from lsn `since` to `until`, about one ticket if it is given. Raises ConfigError, JournalDamaged."""
    return recording.facts(*_kinds(fact), ticket=ticket, since=since, until=until)


def follow_events(
    recording: Recording, fact: str | None, since: int, ticket: int | None, wait: Callable[[], None]
) -> Iterator[JournalEntry]:
    """The facts that are there, and then each new one as it is committed.

    consumes:      what the broker commits to the journal
    produces:      the facts that are asked for, in order
    waits for:     the journal to grow, by `wait`, which returns when it is time to look again
    unblocked by:  the next look; it ends after a look that found the run ended
    """
    kinds = _kinds(fact)
    while True:
        recording.refresh()
        last = recording.last_lsn
        yield from recording.facts(*kinds, ticket=ticket, since=since)
        ends = list(recording.facts(facts.RunEnded, facts.LearnerStarted))
        if ends and isinstance(ends[-1].fact, facts.RunEnded):
            return
        since = max(since, last + 1)
        wait()


def event_fields(entry: JournalEntry) -> dict[str, Any]:
    """A fact as one flat record: lsn, time, and the fact's own fields with its name in `fact`."""
    return {"lsn": entry.lsn, "time": entry.time, **msgspec.to_builtins(entry.fact)}


def event_line(event: dict[str, Any]) -> str:
    """A fact on one line: number, time, name, fields."""
    shown = " ".join(f"{key}={_brief(value)}" for key, value in event.items() if key not in ("lsn", "time", "fact"))
    return f"{event['lsn']:>7} {moment(event['time'])} {event['fact']:<16} {printable(shown)}".rstrip()


def _kinds(name: str | None) -> list[type[facts.AnyFact]]:
    if name is None:
        return []
    if name not in FACT_NAMES:
        close = difflib.get_close_matches(name, FACT_NAMES, n=1, cutoff=0.4)
        fix = f"did you mean {close[0]}?" if close else f"one of {', '.join(FACT_NAMES)}"
        raise ConfigError("--fact", name, "there is no such fact", fix)
    return [getattr(facts, name)]


# --- shared


def moment(time: float) -> str:
    """Seconds since 1970 for a person, in UTC to the millisecond."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_brief(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_brief(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:16]}… ({len(text)} characters)"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
