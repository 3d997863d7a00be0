"""`cli.py inspect`: looks into a run's recording. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class InspectGroup(TyperGroup):
    """`inspect RUN` stands beside `inspect groups RUN` and its like: what is no command's name is a run's directory."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["overview", *args]
        return super().parse_args(ctx, args)


inspect = typer.Typer(
    cls=InspectGroup,
    no_args_is_help=True,
    help="Look into a run's recording, while the run goes on or later: `inspect RUN` says what it holds. Needs only journal.sqlite, and "
    "run.json with blobs/ for texts.",
)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/latest.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
TicketOption = Annotated[int | None, typer.Option(min=0, help="Only this ticket.")]
TokenizerOption = Annotated[Path | None, typer.Option(help="A tokenizer.json for texts. Default: that of the run's policy.")]


@inspect.command()
def overview(run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What the recording holds; `inspect RUN` for short."""
    import msgspec

    from analysis.overview import look, overview_lines
    from analysis.recording import Recording

    with Recording(run) as recording:
        found = look(recording)
    typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else "\n".join(overview_lines(found)))


@inspect.command()
def groups(
    run: RunArgument,
    ticket: TicketOption = None,
    batch: Annotated[int | None, typer.Option(min=0, help="Only groups of this batch.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only groups that this step used.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only groups of this actor.")] = None,
    version: Annotated[int | None, typer.Option(min=0, help="Only groups with a token sampled from this version.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="Only groups whose mean reward is at least this.")] = None,
    max_reward: Annotated[float | None, typer.Option(help="Only groups whose mean reward is at most this.")] = None,
    min_lag: Annotated[int | None, typer.Option(min=0, help="Only groups whose lag at their last use is at least this.")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="List the results that were refused instead.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 50,
    as_json: JsonLines = False,
) -> None:
    """List groups: step is their first use, lag that of their oldest token at their last use."""
    from analysis.listing import GROUP_HEADER, GroupFilter, group_line, list_groups
    from analysis.recording import Recording

    wanted = GroupFilter(ticket, batch, step, actor, version, min_reward, max_reward, min_lag, refused)
    with Recording(run) as recording:
        print_rows(list_groups(recording, wanted), GROUP_HEADER, group_line, limit, as_json)


@inspect.command()
def group(
    run: RunArgument,
    ticket: Annotated[int, typer.Argument(min=0)],
    tokens: Annotated[bool, typer.Option("--tokens", help="Also each token: id, text, log-probability, version.")] = False,
    tokenizer: TokenizerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one ticket in full: prompt, completions, rewards, who made it, and everything that happened to it."""
    import msgspec

    from analysis.recording import Recording
    from analysis.text import find_text
    from analysis.ticket import read_ticket, ticket_lines

    with Recording(run) as recording:
        text = find_text(recording, tokenizer)
        found = read_ticket(recording, ticket, text, with_tokens=tokens)
    typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else "\n".join(ticket_lines(found, text)))


@inspect.command()
def batches(
    run: RunArgument, limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 0, as_json: JsonLines = False
) -> None:
    """List batches: the steps that used them, their tickets, versions, lag and reward."""
    from analysis.listing import BATCH_HEADER, batch_line, list_batches
    from analysis.recording import Recording

    with Recording(run) as recording:
        print_rows(list_batches(recording), BATCH_HEADER, batch_line, limit, as_json)


@inspect.command()
def events(
    run: RunArgument,
    fact: Annotated[str | None, typer.Option(help="Only facts of this name, for example TicketIssued.")] = None,
    since: Annotated[int, typer.Option(min=1, help="From this event number (lsn) on.")] = 1,
    until: Annotated[int | None, typer.Option(min=1, help="Up to this event number.")] = None,
    ticket: TicketOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new events until the run has ended.")] = False,
    as_json: JsonLines = False,
) -> None:
    """List what happened, in order: number, time (UTC), fact and its fields."""
    import time

    import msgspec

    from analysis.listing import event_fields, event_line, follow_events, list_events
    from analysis.recording import Recording
    from protocol.errors import ConfigError

    if follow and until is not None:
        raise ConfigError("--until", until, "contradicts --follow", "leave out one of them")
    with Recording(run) as recording:
        wait = functools.partial(time.sleep, 0.5)
        found = follow_events(recording, fact, since, ticket, wait) if follow else list_events(recording, fact, since, until, ticket)
        for event in map(event_fields, found):
            typer.echo(msgspec.json.encode(event).decode() if as_json else event_line(event))


@inspect.command()
def verify(run: RunArgument) -> None:
    """Check the recording: checksums, gaps, tables, conservation, lags, blobs. Exit code 4 if anything is broken."""
    from analysis.verify import verify as check_recording

    checks = check_recording(run)
    for check in checks:
        typer.echo("\n".join(check.lines()))
    raise typer.Exit(4 if any(check.num_findings for check in checks) else 0)


@inspect.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A name that ends in .parquet or .jsonl.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write all completions into one file, a row for each, with tokens, log-probabilities, versions, texts and rewards."""
    from analysis.export import export as write_export
    from analysis.recording import Recording
    from analysis.text import find_text

    with Recording(run) as recording:
        text = find_text(recording, tokenizer)
        num_rows = write_export(recording, out, text, force=force)
    typer.echo(f"wrote {out}: {num_rows} completions" + (f"; no texts: {text.missing}" if text.missing else ""))


def print_rows(rows: Iterable[Any], header: str, line: Callable[[Any], str], limit: int, as_json: bool) -> None:
    """Rows under a header, or as JSON lines; says so where there are more than `limit`."""
    import msgspec

    place = -1
    for place, row in enumerate(rows):
        if place == 0 and not as_json:
            typer.echo(header)
        if limit and place == limit:
            typer.echo(f"there are more than {limit}; --limit 0 shows all", err=True)
            break
        typer.echo(msgspec.json.encode(row).decode() if as_json else line(row))
    if place < 0:
        typer.echo("there is none", err=True)
