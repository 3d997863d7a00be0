"""One ticket in full: everything that happened to it, and its group with every completion."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from analysis.fates import BatchFate, read_fates
from analysis.listing import event_fields, event_line, moment
from analysis.recording import Recording
from analysis.text import PolicyText
from protocol import facts
from protocol.errors import ConfigError
from protocol.groups import STOPPED, Group, decode_group
from protocol.journal import JournalEntry, read_payload

FINISH: Final = {STOPPED: "stopped"}


class Token(msgspec.Struct, frozen=True):
    """One sampled token: id, its text if there is a tokenizer, behaviour log-probability (nats), and the version it was sampled from."""

    id: int
    text: str | None
    logprob: float
    version: int


class CompletionText(msgspec.Struct, frozen=True):
    """One completion. `text` is None where there is no tokenizer; `tokens` is empty unless tokens were asked for."""

    reward: float
    finish: str
    num_tokens: int
    text: str | None
    token_ids: list[int]
    tokens: list[Token]


class TicketRecord(msgspec.Struct, frozen=True):
    """A ticket in full. The group is the one that counts: accepted last. Times are seconds since 1970; None is what has not happened."""

    ticket: int
    outcome: str
    history: list[dict[str, Any]]
    without_text: str
    """Why there is no text, empty if there is."""
    actor: str | None = None
    engine: str | None = None
    attempt: int | None = None
    issued: float | None = None
    accepted: float | None = None
    prompt: int | None = None
    seed: int | None = None
    prompt_text: str | None = None
    prompt_ids: list[int] = []
    oldest_version: int | None = None
    newest_version: int | None = None
    oldest_step: int | None = None
    batch: int | None = None
    steps: list[int] = []
    lags: list[int] = []
    reward: float | None = None
    completions: list[CompletionText] = []


def read_ticket(recording: Recording, ticket: int, text: PolicyText, *, with_tokens: bool) -> TicketRecord:
    """Everything recorded about a ticket. Raises ConfigError if it was never issued, JournalDamaged, and InvalidGroup."""
    history = list(recording.facts(ticket=ticket))
    if not any(isinstance(entry.fact, facts.TicketIssued | facts.GroupAccepted) for entry in history):
        ((last,),) = recording.ask("SELECT max(body ->> 'ticket') FROM events WHERE fact = 'TicketIssued'")
        fix = "wait for the first ticket" if last is None else f"a ticket from 0 to {last}"
        raise ConfigError("TICKET", ticket, "was never issued", fix)
    accepted = [(entry, entry.fact) for entry in history if isinstance(entry.fact, facts.GroupAccepted)]
    payload = read_payload(recording.connection, recording.path, ticket) if accepted else None
    fates, events = read_fates(recording), [event_fields(entry) for entry in history]
    if not accepted or payload is None:
        ended = fates.ended.get(ticket)
        return TicketRecord(ticket, "open" if ended is None else ended.outcome, events, text.missing)
    entry, fact = accepted[-1]
    group, outcome = decode_group(payload), fates.outcome(ticket, entry.lsn)
    batch = None if outcome == "sampled again" else fates.batch(ticket)
    return TicketRecord(
        ticket=ticket,
        outcome=outcome,
        actor=fact.actor,
        engine=group.engine,
        attempt=fact.attempt,
        issued=_issued(history, fact.attempt),
        accepted=entry.time,
        prompt=group.prompt,
        seed=group.seed,
        prompt_text=text.text(group.prompt_ids.tolist()),
        prompt_ids=group.prompt_ids.tolist(),
        oldest_version=group.oldest_version,
        newest_version=group.newest_version,
        oldest_step=fact.oldest_step,
        batch=None if batch is None else batch.number,
        steps=[] if batch is None else batch.steps,
        lags=_lags(batch, fact.oldest_step),
        reward=fact.reward,
        completions=_completions(group, text, with_tokens),
        history=events,
        without_text=text.missing,
    )


def ticket_lines(record: TicketRecord, text: PolicyText) -> list[str]:
    """A ticket for a person."""
    found = [f"ticket {record.ticket}: {record.outcome}"]
    if record.accepted is not None:
        took = "" if record.issued is None else f", issued {moment(record.issued)}, {record.accepted - record.issued:.3f} s before"
        uses = ", ".join(f"{step} (lag {lag})" for step, lag in zip(record.steps, record.lags, strict=True)) or "none so far"
        found += [
            f"made by    {record.actor} ({record.engine}), attempt {record.attempt}, from versions {record.oldest_version}.."
            f"{record.newest_version}, the oldest of step {record.oldest_step}",
            f"accepted   {moment(record.accepted)}{took}",
            f"used       batch {'-' if record.batch is None else record.batch}, at steps {uses}",
            f"prompt     number {record.prompt}, seed {record.seed}, {len(record.prompt_ids)} tokens",
            *_indented(text.shown(record.prompt_ids)),
            f"reward     {record.reward:.4g} over {len(record.completions)} completions",
        ]
    for place, completion in enumerate(record.completions):
        found.append(f"completion {place}: reward {completion.reward:.4g}, {completion.num_tokens} tokens, {completion.finish}")
        found += _indented(text.shown(completion.token_ids))
        found += [
            f"        {token.id:>7} {'' if token.text is None else repr(token.text):<14} logprob {token.logprob:>9.5f}  version {token.version}"
            for token in completion.tokens
        ]
    found += ["history", *(event_line(event) for event in record.history)]
    return found + ([f"token ids are shown, not text: {record.without_text}"] if record.without_text else [])


def finish_name(reason: int) -> str:
    """stopped: by an end token; full: the token budget was used up."""
    return FINISH.get(reason, "full")


def _completions(group: Group, text: PolicyText, with_tokens: bool) -> list[CompletionText]:
    found = []
    for place, part in enumerate(group.completions()):
        ids, logprobs, versions = group.token_ids[part].tolist(), group.logprobs[part].tolist(), group.versions[part].tolist()
        tokens = [Token(i, text.text([i]), p, v) for i, p, v in zip(ids, logprobs, versions, strict=True)] if with_tokens else []
        finish = finish_name(int(group.finish[place]))
        found.append(CompletionText(float(group.rewards[place]), finish, len(ids), text.text(ids), ids, tokens))
    return found


def _issued(history: list[JournalEntry], attempt: int) -> float | None:
    return next((e.time for e in history if isinstance(e.fact, facts.TicketIssued) and e.fact.attempt == attempt), None)


def _lags(batch: BatchFate | None, oldest_step: int) -> list[int]:
    return [] if batch is None else [step - oldest_step for step in batch.steps]


def _indented(text: str) -> list[str]:
    return [f"    | {line}" for line in text.split("\n")]
