"""What a recording holds, at a glance. Counted in SQL over the tables, so a damaged row does not keep the rest from being seen."""

from __future__ import annotations

import msgspec

from analysis.listing import moment
from analysis.recording import Recording


class Overview(msgspec.Struct, frozen=True):
    """See the module. Times are seconds since 1970; `settings` are the fields of the configuration that say what the run is."""

    run: str
    format: str
    settings: dict[str, str | int | float | None]
    first: float | None
    last: float | None
    num_events: int
    facts: dict[str, int]
    steps: int
    num_batches: int
    num_versions: int
    lineages: list[int]
    num_groups: int
    num_tokens: int
    payload_bytes: int
    actors: list[str]
    ended: bool


def look(recording: Recording) -> Overview:
    """The overview of a recording as it is now. Raises JournalDamaged."""
    ask = recording.ask
    counts = dict(ask("SELECT fact, count(*) FROM events WHERE lsn <= ? GROUP BY fact ORDER BY fact", recording.last_lsn))
    ((first, last),) = ask("SELECT min(time), max(time) FROM events WHERE lsn <= ?", recording.last_lsn)
    ((steps,),) = ask("SELECT coalesce(max(step) + 1, 0) FROM steps")
    ((num_groups, num_tokens, payload_bytes),) = ask(
        "SELECT count(*), coalesce(sum(num_tokens), 0), coalesce(sum(length(payload)), 0) FROM groups"
    )
    ends = ask("SELECT fact FROM events WHERE fact IN ('RunEnded', 'LearnerStarted') ORDER BY lsn DESC LIMIT 1")
    return Overview(
        run=recording.meta("run"),
        format=recording.meta("format"),
        settings=_settings(recording),
        first=first,
        last=last,
        num_events=sum(counts.values()),
        facts=counts,
        steps=steps,
        num_batches=counts.get("BatchFormed", 0),
        num_versions=counts.get("VersionPublished", 0),
        lineages=[
            number for (number,) in ask("SELECT DISTINCT body ->> 'lineage' AS n FROM events WHERE fact = 'LearnerStarted' ORDER BY n")
        ],
        num_groups=num_groups,
        num_tokens=num_tokens,
        payload_bytes=payload_bytes,
        actors=[name for (name,) in ask("SELECT DISTINCT body ->> 'actor' AS n FROM events WHERE fact = 'ActorJoined' ORDER BY n")],
        ended=bool(ends) and ends[0][0] == "RunEnded",
    )


def _settings(recording: Recording) -> dict[str, str | int | float | None]:
    config = recording.config()
    return {
        "task": config.task.name,
        "policy": config.policy.path,
        "steps": config.run.steps,
        "seed": config.run.seed,
        "group_size": config.rollout.group_size,
        "groups_per_batch": config.rollout.groups_per_batch,
        "max_tokens": config.rollout.max_tokens,
        "temperature": config.rollout.temperature,
        "max_lag": config.pacing.max_lag,
        "reuse": config.pacing.reuse,
        "sync_every": config.pacing.sync_every,
        "window": config.pacing.window,
        "engine": config.actor.engine,
        "learner_ranks": config.learner.ranks,
        "lr": config.learner.lr,
    }


def overview_lines(found: Overview) -> list[str]:
    """The overview for a person."""
    span = "empty"
    if found.first is not None and found.last is not None:
        span = f"{moment(found.first)} to {moment(found.last)} UTC, {found.last - found.first:.1f} s"
    lineages = f"{len(found.lineages)} lineage{'s' * (len(found.lineages) != 1)}"
    mib = found.payload_bytes / (1 << 20)
    return [
        f"run        {found.run}, journal format {found.format}, {'ended' if found.ended else 'not ended'}",
        "settings   " + ", ".join(f"{name} {value}" for name, value in found.settings.items() if value is not None),
        f"time       {span}",
        f"steps      {found.steps} of {found.settings['steps']}, {found.num_batches} batches, {found.num_versions} versions in {lineages}",
        f"groups     {found.num_groups} accepted, {found.num_tokens} tokens, {mib:.1f} MiB of payload",
        f"actors     {len(found.actors)}: {', '.join(found.actors[:8])}{', …' * (len(found.actors) > 8)}",
        f"events     {found.num_events}",
        *(f"  {name:<20}{count:>9}" for name, count in found.facts.items()),
    ]
