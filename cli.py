"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from analysis.commands import inspect

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
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to start outside the safe region, see `advise`.")] = False,
    parent: ParentOption = 0,
) -> None:
    """Train: prepare the policy, start broker, actors and learner on this machine, and show what happens. Or go on with a run.

    Exit code 7 if the run that was made breaks a promise, by its journal.
    """
    from rich.console import Console

    from analysis.advise import advice_lines, check_strict
    from analysis.advise import advise as advise_on
    from analysis.report import finish_run
    from deploy.local import LocalRun
    from deploy.monitor import Monitor
    from deploy.parent import die_with_parent
    from deploy.prepare import prepare_run
    from deploy.resume import NOTHING, go_on, open_run, sole_supervisor, wanted_actors
    from deploy.wiring import choose_engine
    from learner.stability.files import calibration_of
    from protocol.config import load_config
    from protocol.errors import ConfigError, SlipstreamError

    if parent:  # one run of a sweep
        die_with_parent(parent)
    if (config is None) == (resume is None) or (resume is not None and (directory is not None or serial or strict)):
        raise ConfigError("up", "", "goes by a configuration or goes on with a run", "give CONFIG, or --resume RUN with nothing but --set")
    console = Console(highlight=False)
    with Monitor(console) as monitor, contextlib.ExitStack() as held:
        past = NOTHING
        if config is not None:
            settings = load_config(config, overrides)
            advice = advise_on(settings, calibration_of(settings))
            for line in advice_lines(advice, is_brief=True):
                monitor.say(line)
            if strict:
                check_strict(advice)
            if settings.actor.num_actors:
                choose_engine(settings.actor.engine)
            run = prepare_run(settings, directory, monitor.say, is_latest=not parent)
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

    from deploy.prepare import supervised_seed
    from deploy.wiring import learner_device
    from learner.supervised import train_supervised
    from protocol.config import parse_config_json
    from tasks.registry import load_task

    start_role(os.getppid())
    config = parse_config_json(settings.read_text())
    task = load_task(config.task.name, config.task.options)
    threads = min(os.cpu_count() or 1, 4)
    seed, device = supervised_seed(config), learner_device(config)
    train_supervised(task, config.supervised, config.rollout.max_tokens, seed, threads, folder, device)


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
def report(
    sweeps: Annotated[
        list[Path] | None, typer.Argument(metavar="[SWEEP]...", help="Sweeps' folders, their TOML files, or tables (cells.jsonl.zst).")
    ] = None,
    run: RunOption = None,
    out: Annotated[Path | None, typer.Option(help="Where the report of a sweep is written. Default: report/ in its folder.")] = None,
) -> None:
    """Of a sweep: the paper's figures, tables and claims as one page. Of a run: its summary and plots again; exit code 7 if it broke a promise."""
    if sweeps:
        from analysis.sweep_reading import report_sweep

        typer.echo("\n".join(report_sweep(sweeps, out)))
        return
    from analysis.report import finish_run

    finished = finish_run(find_run(run).path)
    for line in finished.lines:
        typer.echo(line)
    finished.check()


@app.command()
def advise(
    config: Annotated[Path, typer.Argument(help="A TOML file, see examples/.")],
    sources: Annotated[list[Path], typer.Option("--from", metavar="RUN", help="A run or a sweep to calibrate from. May be repeated.")] = [],  # noqa: B006
    overrides: SetOption = [],  # noqa: B006
    write: Annotated[Path | None, typer.Option(help="Keep the calibration in this file, for stability.calibration.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a configuration stands between too stale and too fast, by what other runs have shown; or which runs would tell."""
    from analysis.advise import advice_json, advice_lines, calibrate_from
    from analysis.advise import advise as look
    from learner.stability.files import calibration_of, write_calibration
    from protocol.config import load_config
    from protocol.errors import ConfigError

    settings = load_config(config, overrides)
    calibration = calibrate_from(sources, settings) if sources else calibration_of(settings)
    if write is not None:
        if calibration is None:
            raise ConfigError("--write", str(write), "there is nothing to write yet", "give runs to calibrate from: --from RUN")
        write_calibration(calibration, write)
    found = look(settings, calibration)
    typer.echo(advice_json(found) if as_json else "\n".join(advice_lines(found)))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A TOML file, see examples/paper.toml.")],
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Make all runs of a sweep over staleness, learning rate and seed that are not made yet."""
    from deploy.sweep import Sweep
    from protocol.sweep import load_sweep

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs in progress are ended
    settings, plans = load_sweep(file, overrides)
    Sweep(settings, plans, settings.folder, typer.echo).go()


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


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN")], step: int | None = None, lags: str | None = None, prompts: int = 16, rounds: int = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Measure the staleness bias (paper Eq. 17) of the version of --step N against those of --lags 1,2,4 steps before, by sampling again."""
    from deploy.probe import probe_command

    typer.echo(probe_command(run, step, lags, prompts, rounds, seed, as_json=as_json))


app.add_typer(inspect, name="inspect")


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
