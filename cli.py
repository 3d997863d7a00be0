"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

app = typer.Typer(
    name="slipstream",
    help="Asynchronous GRPO with a bound on staleness that is enforced, recorded and explained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunOption = Annotated[Path | None, typer.Option("--run", help="The run's directory. Default: the latest run.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a field: section.field=value. May be repeated.")]
BrokerOption = Annotated[str, typer.Option("--broker", help="The broker's address, tcp://host:port.")]
KeyOption = Annotated[Path, typer.Option("--key", help="The key file of this role, from the run's keys/ directory.")]
ParentOption = Annotated[int, typer.Option("--parent", hidden=True)]
RUNS = Path("runs")


@app.command()
def up(
    config: Annotated[Path | None, typer.Argument(help="A TOML file, see examples/. Not with --resume.")] = None,
    overrides: SetOption = [],  # noqa: B006
    directory: Annotated[Path | None, typer.Option(help="The run's directory. Default: made below run.directory.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with the run in this directory.")] = None,
    serial: Annotated[bool, typer.Option("--serial", help="All roles in this one process, over in-memory ports.")] = False,
) -> None:
    """Train: prepare the policy, start broker, actors and learner on this machine, and show what happens. Or go on with a run.

    Exit code 7 if the run that was made breaks a promise, by its journal.
    """
    from rich.console import Console

    from analysis.report import finish_run
    from deploy.local import LocalRun
    from deploy.monitor import Monitor
    from deploy.prepare import prepare_run
    from deploy.resume import NOTHING, go_on, open_run, sole_supervisor, wanted_actors
    from deploy.wiring import choose_engine
    from protocol.config import load_config
    from protocol.errors import ConfigError, SlipstreamError

    if (config is None) == (resume is None) or (resume is not None and (directory is not None or serial)):
        raise ConfigError("up", "", "goes by a configuration or goes on with a run", "give CONFIG, or --resume RUN with nothing but --set")
    console = Console(highlight=False)
    with Monitor(console) as monitor, contextlib.ExitStack() as held:
        past = NOTHING
        if config is not None:
            settings = load_config(config, overrides)
            if settings.actor.num_actors:
                choose_engine(settings.actor.engine)
            run = prepare_run(settings, directory, monitor.say)
            held.enter_context(sole_supervisor(run))
        else:
            run = open_run(resume)
            held.enter_context(sole_supervisor(run))
            found = go_on(run, overrides, monitor.say)
            if found is None:
                return
            past = found
        monitor.say(f"run: {run.path}")
        if serial:
            from deploy.wiring import run_serial

            log_to_stderr()
            run_serial(run)
        else:
            try:
                LocalRun(run, monitor, past, wanted_actors(run, overrides)).go()
            except (SlipstreamError, KeyboardInterrupt):
                with contextlib.suppress(SlipstreamError):
                    finish_run(run.path)
                    monitor.say(f"what there is: {run.path / 'summary.json'}")
                raise
    finished = finish_run(run.path)
    for line in finished.lines:
        console.print(line, markup=False, soft_wrap=True)
    finished.check()


@app.command()
def broker(
    run: RunOption = None,
    address: Annotated[str | None, typer.Option(help="Where to listen. Default: where the run listened before, or its config.")] = None,
    parent: ParentOption = 0,
) -> None:
    """Run a run's broker: ledger, journal and blob store."""
    from deploy.wiring import serve_broker

    start_role(parent)
    serve_broker(find_run(run), address)


@app.command()
def actor(
    broker: BrokerOption,
    key: KeyOption,
    name: Annotated[str | None, typer.Option(help="A name that no other actor of the run has. Default: host and process id.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, transformers or vllm. Default: as the run is configured.")] = None,
    relay: Annotated[
        str | None,
        typer.Option(help="tcp://host:port of an actor beside this one that serves weight files; the broker is asked without it."),
    ] = None,
    serve: Annotated[
        str | None, typer.Option(help="tcp://host:port to serve weight files at, for actors beside this one that have the same key.")
    ] = None,
    parent: ParentOption = 0,
) -> None:
    """Run one actor: it needs the broker's address and a key, and may join and leave at any time."""
    from broker.keys import load_key
    from deploy.wiring import choose_engine, run_actor

    start_role(parent)
    if engine is not None:
        choose_engine(engine)
    run_actor(broker, load_key(key), name, engine, relay, serve)


@app.command()
def learner(
    broker: BrokerOption,
    key: KeyOption,
    folder: Annotated[Path, typer.Option(help="Where checkpoints go and resume from. Filled from the broker where it is empty.")],
    ranks: Annotated[int, typer.Option(help="Ranks on this machine.")] = 1,
    nodes: Annotated[str, typer.Option(help="Machines, for torchrun: a number or min:max. Needs --rendezvous.")] = "1",
    rendezvous: Annotated[str | None, typer.Option(help="host:port that all machines of the learner reach.")] = None,
    parent: ParentOption = 0,
) -> None:
    """Run the learner's ranks on this machine under torchrun."""
    from broker.keys import load_key
    from deploy.rundir import RunDirectory
    from deploy.torchrun import learn, torchrun_arguments
    from deploy.wiring import fetch_run

    start_role(parent)
    if not parent:  # under `up` the folder is the run's own
        fetch_run(broker, load_key(key), folder)
    arguments = torchrun_arguments(folder, broker, key, ranks, nodes, rendezvous, os.getpid())
    raise typer.Exit(learn(arguments, RunDirectory(folder), is_supervised=bool(parent)))


@app.command("learner-rank", hidden=True)
def learner_rank(broker: BrokerOption, key: KeyOption, folder: Annotated[Path, typer.Option()], parent: ParentOption = 0) -> None:
    """One rank of the learner; torchrun starts it."""
    from broker.keys import load_key
    from deploy.rundir import RunDirectory
    from deploy.wiring import run_learner_rank

    start_role(parent or os.getppid())
    run_learner_rank(RunDirectory(folder), broker, load_key(key))


@app.command(hidden=True)
def score(parent: ParentOption = 0) -> None:
    """Compute rewards for an actor, which starts it."""
    from actor.scoring import serve_scores, take_standard_streams
    from tasks.registry import load_task

    start_role(parent)
    serve_scores(*take_standard_streams(), load_task)


@app.command(hidden=True)
def prepare(settings: Path, folder: Path) -> None:
    """Train the supervised policy of a configuration into a folder."""

    from learner.supervised import train_supervised
    from protocol.config import parse_config_json
    from tasks.registry import load_task

    start_role(os.getppid())
    config = parse_config_json(settings.read_text())
    task = load_task(config.task.name, config.task.options)
    threads = min(os.cpu_count() or 1, 4)
    train_supervised(task, config.supervised, config.rollout.max_tokens, config.run.seed, threads, folder)


@app.command()
def status(run: RunOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the state of a run that is going on."""
    with control(run) as client:
        found = client.status()
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    from rich.console import Console

    from deploy.monitor import render

    Console().print(render(found, None))


@app.command()
def scale(
    setting: Annotated[str, typer.Argument(help="actors=N")],
    run: RunOption = None,
) -> None:
    """Change the number of actors that `up` keeps on its machine."""
    from protocol.errors import ConfigError

    role, _, count = setting.partition("=")
    if role != "actors" or not count.isdigit() or int(count) > 4096:
        raise ConfigError("scale", setting, "is not actors=N with N from 0 to 4096", "for example: cli.py scale actors=3")
    with control(run) as client:
        client.set_actors(int(count))
    typer.echo(f"asked for {count} actors")


@app.command()
def down(run: RunOption = None) -> None:
    """End a run in order: the learner finishes its step and writes a checkpoint."""
    with control(run) as client:
        client.stop("asked to stop by `cli.py down`")
    typer.echo("stopping")


@app.command("eval")
def evaluate(
    run: RunOption = None,
    policy: Annotated[Path | None, typer.Option(help="A policy folder. Default: the run's newest checkpoint.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Held-out prompts, at most what the task has. Default: as configured.")] = None,
    show: Annotated[int, typer.Option(help="Also print this many prompts with their completions.")] = 0,
) -> None:
    """Measure the held-out reward of a checkpoint or of any policy folder."""
    from deploy.evaluate import evaluate_policy

    for line in evaluate_policy(find_run(run), policy, prompts, show):
        typer.echo(line)


@app.command()
def report(run: RunOption = None) -> None:
    """Write a run's summary and plots again from its journal, and print the summary. Exit code 7 if a promise is broken."""
    from analysis.report import finish_run

    finished = finish_run(find_run(run).path)
    for line in finished.lines:
        typer.echo(line)
    finished.check()


# --- a run's recording


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, from this machine or another.")],
    first: Annotated[int, typer.Option("--from", min=0, help="The first step of interest: begin at the checkpoint before it.")] = 0,
    end: Annotated[int | None, typer.Option("--to", min=1, help="Stop before this step.")] = None,
    overrides: SetOption = [],  # noqa: B006
    step: Annotated[bool, typer.Option("--step", help="One optimizer step at a time, at a prompt.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Learner ranks. Default: as many as in the run.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Largest drift where roots need not be equal, as a share of what the run moved.")
    ] = None,
    broker: Annotated[
        bool, typer.Option("--broker", help="Instead: the recorded arrivals through the ledger alone, for --set policy.max_lag.")
    ] = False,
    actor: Annotated[
        int | None, typer.Option("--actor", metavar="TICKET", help="Instead: have an actor generate this group again.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="With --actor: transformers or vllm. Default: what made the group.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the metrics and the last checkpoint in this folder.")] = None,
) -> None:
    """Train again on the recorded batches, without actors, and compare every version; or, with --set, see what another learner would do."""
    from protocol.errors import ConfigError, ReplayDiffers

    named = {"--from": first, "--to": end, "--step": step, "--ranks": ranks, "--tolerance": tolerance, "--out": out}
    others = named | ({"--actor": actor, "--engine": engine} if broker else {"--set": overrides, "--broker": broker})
    if (broker or actor is not None) and (given := [name for name, value in others.items() if value]):
        what = "--broker" if broker else "--actor"
        raise ConfigError(given[0], others[given[0]], f"says nothing to {what}", "leave one of them out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started and made is removed
    if broker:
        from deploy.replay_broker import repace_run

        typer.echo("\n".join(repace_run(run, overrides)))
        return
    if actor is not None:
        from deploy.replay_actor import replay_ticket, ticket_lines

        again = replay_ticket(run, actor, engine)
        typer.echo("\n".join(ticket_lines(again)))
        raise typer.Exit(0 if again.is_same else ReplayDiffers.exit_code)
    from deploy.replay import TOLERANCE, ReplayOptions, replay_run
    from deploy.replay_report import side_by_side, summary_lines

    options = ReplayOptions(first, end, overrides, step, ranks, TOLERANCE if tolerance is None else tolerance, out)
    found = replay_run(run, options, typer.echo)
    for line in [*summary_lines(found), *side_by_side(found, first)]:
        typer.echo(line)


@app.command("replay-rank", hidden=True)
def replay_rank(plan: Annotated[Path, typer.Option()]) -> None:
    """One rank of a replaying learner; torchrun starts it."""
    from deploy.replay import replay_rank as run_rank

    start_role(os.getppid())
    run_rank(plan)


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
app.add_typer(inspect, name="inspect")
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


@app.command()
def keys(
    role: Annotated[str, typer.Argument(help="actor, learner or admin")],
    name: Annotated[str, typer.Argument(help="Who the key is for.")],
    run: RunOption = None,
) -> None:
    """Make one more key for a role, as for another machine; the broker accepts it from its next start on."""
    from broker.keys import add_key

    typer.echo(f"wrote {add_key(find_run(run).keys, role, name)}; copy it over a secure channel")


@app.command()
def doctor(config: Annotated[Path | None, typer.Argument(help="Also check this configuration.")] = None) -> None:
    """Say what is missing on this machine and how to mend it."""
    from deploy.doctor import examine

    found = examine(config)
    for line in found.lines:
        typer.echo(line)
    raise typer.Exit(0 if found.is_well else 1)


# --- shared by the commands


def find_run(run: Path | None) -> Any:
    """The run that was named, or the latest one."""
    from deploy.rundir import RunDirectory, latest_run

    return RunDirectory(run) if run is not None else latest_run(RUNS)


def control(run: Path | None) -> Any:
    """A connection to the broker of a run, as a context manager."""
    from broker.control import ControlClient
    from broker.keys import load_key
    from protocol.errors import ConfigError

    found = find_run(run)
    address = found.broker_address()
    if address is None:
        raise ConfigError("--run", str(found.path), "its broker has never run", "start it with `cli.py up` or `cli.py broker`")
    return contextlib.closing(ControlClient(address, load_key(found.keys / "admin.key"), 5.0))


def start_role(parent: int) -> None:
    """What every role's process does first."""
    from deploy.parent import die_with_parent

    log_to_stderr()
    if parent:
        die_with_parent(parent)


def log_to_stderr() -> None:
    """Log lines with time and role; to a file when the supervisor redirects them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def find_tasks_here() -> None:
    """Let `module:object` tasks be found in the folder that the command was given in, by this process and by those it starts."""
    here = os.getcwd()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    sys.path.append(here)


def main() -> NoReturn:
    """Run a command; errors that are meant for a person are printed as one message, with their exit code."""
    from protocol.errors import SlipstreamError

    find_tasks_here()
    try:
        app(standalone_mode=True)
    except* KeyboardInterrupt:
        tell("interrupted")
        sys.exit(130)
    except* SlipstreamError as group:
        error = first(group)
        tell(f"error: {error}")
        sys.exit(error.exit_code)
    sys.exit(0)


def tell(text: str) -> None:
    """A last word on stderr; a log on a full disk must not change the exit code."""
    with contextlib.suppress(OSError):
        typer.echo(text, err=True)


def first(group: BaseExceptionGroup[Any]) -> Any:
    """The first single error in a group of groups."""
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
