"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

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
    config: Annotated[Path, typer.Argument(help="A TOML file, see examples/.")],
    overrides: SetOption = [],  # noqa: B006
    directory: Annotated[Path | None, typer.Option(help="The run's directory. Default: made below run.directory.")] = None,
    serial: Annotated[bool, typer.Option("--serial", help="All roles in this one process, over in-memory ports.")] = False,
) -> None:
    """Train: prepare the policy, start broker, actors and learner on this machine, and show what happens."""
    from rich.console import Console

    from analysis.report import finish_run
    from deploy.local import LocalRun
    from deploy.monitor import Monitor
    from deploy.prepare import prepare_run
    from deploy.wiring import choose_engine
    from protocol.config import load_config
    from protocol.errors import SlipstreamError

    console = Console(highlight=False)
    settings = load_config(config, overrides)
    if settings.actor.num_actors:
        choose_engine(settings.actor.engine)
    with Monitor(console) as monitor:
        run = prepare_run(settings, directory, monitor.say)
        monitor.say(f"run: {run.path}")
        if serial:
            from deploy.wiring import run_serial

            log_to_stderr()
            run_serial(run)
        else:
            try:
                LocalRun(run, monitor).go()
            except (SlipstreamError, KeyboardInterrupt):
                with contextlib.suppress(SlipstreamError):
                    finish_run(run.path)
                    monitor.say(f"what there is: {run.path / 'summary.json'}")
                raise
    for line in finish_run(run.path):
        console.print(line, markup=False, soft_wrap=True)


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
    from deploy.local import torchrun_command
    from deploy.wiring import fetch_run

    start_role(parent)
    if not (folder / "run.json").exists():
        fetch_run(broker, load_key(key), folder)
    command = torchrun_command(folder, broker, key, ranks, nodes, rendezvous)
    os.execv(command[0], command)


@app.command("learner-rank", hidden=True)
def learner_rank(broker: BrokerOption, key: KeyOption, folder: Annotated[Path, typer.Option()]) -> None:
    """One rank of the learner; torchrun starts it."""
    from broker.keys import load_key
    from deploy.rundir import RunDirectory
    from deploy.wiring import run_learner_rank

    start_role(os.getppid())
    run_learner_rank(RunDirectory(folder), broker, load_key(key))


@app.command(hidden=True)
def prepare(settings: Path, folder: Path) -> None:
    """Train the supervised policy of a configuration into a folder."""
    import json

    from learner.supervised import train_supervised
    from protocol.config import parse_config
    from tasks.registry import load_task

    start_role(os.getppid())
    config = parse_config(json.loads(settings.read_text()))
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
    """Write a run's summary and plots again from its journal, and print the summary."""
    from analysis.report import finish_run

    for line in finish_run(find_run(run).path):
        typer.echo(line)


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
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except* SlipstreamError as group:
        error = first(group)
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


def first(group: BaseExceptionGroup[Any]) -> Any:
    """The first single error in a group of groups."""
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
