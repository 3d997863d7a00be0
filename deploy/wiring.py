"""The composition root: each role put together from its parts, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.core import Broker
from broker.keys import KeyFile, allowed_keys, load_key
from broker.put_off import SAY_SECONDS
from broker.room import MIB, reserves
from deploy.parent import end_now
from deploy.prepare import CLI
from deploy.resume import check_config, not_writable
from deploy.rundir import RunDirectory, is_weights
from protocol.config import Config, parse_config_json
from protocol.errors import ConfigError, EngineDied, SlipstreamError
from protocol.messages import ActorReport, ActorWelcome
from protocol.ports import ActorPort, LearnerPort

if TYPE_CHECKING:
    from actor.engine import Engine

ENGINES = ("auto", "transformers", "vllm")
log = logging.getLogger("deploy")


class SystemClock:
    """The machine's clocks. Implements protocol.ports.Clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


def make_broker(run: RunDirectory, **beside: Any) -> Broker:
    """The broker of a run, recovered from its journal if there is one; `beside` says how it does long work."""
    manifest = run.manifest()
    return Broker(
        run.path, manifest.run, run.config(), manifest.num_prompts, manifest.policy_files, time.monotonic(), time.time(), **beside
    )


def serve_broker(run: RunDirectory, address: str | None) -> None:
    """Run a broker until it is told to shut down. A broker that is started again listens where it did before.

    Raises ConfigError for a run that has a broker, or whose configuration contradicts its journal; JournalError.
    """
    run.manifest()
    try:
        opened = (run.path / "broker.lock").open("w")
    except OSError as error:
        raise not_writable(run, error) from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("--run", str(run.path), "has a broker already", "use that one, or end it first") from None
        check_config(run)
        _serve(run, address)


def _serve(run: RunDirectory, address: str | None) -> None:
    from broker.server import Server, Wakeup

    _raise_open_files()
    _wait_for_room(run)
    key, allowed = load_key(run.keys / "broker.key"), allowed_keys(run.keys)
    where = address or run.broker_address() or run.config().broker.address
    wakeup = Wakeup()
    worker = ThreadPoolExecutor(1, "folds")
    server = Server(make_broker(run, run_beside=worker.submit, wake=wakeup.set), where, key, allowed, wakeup)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    run.announce_broker(server.address)
    log.info("run %s: listening at %s", run.manifest().run, server.address)
    server.serve()
    worker.shutdown(cancel_futures=True)


def _wait_for_room(run: RunDirectory) -> None:
    """Wait until a broker can journal anything at all, and say so; one that has died of a full disk is not to die of it again and again."""
    needed = reserves(run.config(), 0).commit
    for num_waited in itertools.count():
        free = shutil.disk_usage(run.path).free
        if free >= needed:
            break
        if num_waited % SAY_SECONDS == 0:
            log.warning(
                "waiting for room before the journal is opened: %d MiB free at %s, %d MiB needed; free space there, it goes on by itself",
                free // MIB, run.path, -(-needed // MIB),
            )  # fmt: skip
        time.sleep(1.0)
    if num_waited:
        log.info("there is room again: %d MiB free", free // MIB)


def _raise_open_files() -> None:
    """Every peer costs the broker descriptors; the soft limit of a login is low."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- actors


def run_actor(
    address: str, key: KeyFile, name: str | None, engine: str | None = None, relay: str | None = None, serve: str | None = None
) -> None:
    """Run one actor until the run ends. Address and key are all it needs.

    `engine` overrides the run's choice on this machine; `relay` is an actor beside this one to fetch weights from, `serve` where to be one.
    """
    from broker.actor_client import ActorClient
    from broker.downloads import Sources

    name = name or f"{platform.node() or 'actor'}-{os.getpid()}"
    asyncio.run(_run_actor(ActorClient(address, key, name, Sources(relay, serve)), name, engine))


async def _run_actor(port: Any, name: str, engine: str | None) -> None:
    # Heavy imports come before the broker hears of us: they hold up the event loop, and with it the heartbeat.
    from actor import transformers_engine  # noqa: F401

    reporter, died = _Reporter(port), None
    welcome = await port.join(engine or "any engine", reporter)
    with tempfile.TemporaryDirectory(prefix="slipstream-policy-") as folder:
        actor = await build_actor(port, welcome, Path(folder), name, engine, scores_beside=True)
        reporter.report = actor.report
        working = asyncio.ensure_future(actor.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, working.cancel)
        try:
            await working
        except asyncio.CancelledError:
            log.info("leaving; tickets in hand go back to the broker")
        except BaseExceptionGroup as group:
            died = _first_of(group, EngineDied)
            if died is None:
                raise
    if died is not None:
        end_now(died)


def _first_of(group: BaseExceptionGroup[Any], kind: type[EngineDied]) -> EngineDied | None:
    """The first error of a kind in a group of groups."""
    found: Any = group.subgroup(kind)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if isinstance(found, kind) else None


class _Reporter:
    """What an actor reports: nothing wanted until it is built, then what it says itself."""

    def __init__(self, port: ActorPort) -> None:
        self._port = port
        self.report: Callable[[], ActorReport] | None = None

    def __call__(self) -> ActorReport:
        if self.report is not None:
            return self.report()
        return ActorReport(-1, 0, self._port.held_tickets(), 0.0, 0.0, 0, "building the engine")


async def build_actor(
    port: ActorPort, welcome: ActorWelcome, folder: Path, name: str, engine_name: str | None = None, *, scores_beside: bool = False
) -> Any:
    """An actor from what the broker's welcome says; the policy's files are put in `folder`. `scores_beside`: rewards in another process."""
    from transformers import AutoTokenizer

    from actor.loop import Actor
    from actor.scoring import ScoringProcess
    from tasks.registry import load_task

    config = parse_config_json(welcome.config)
    for file in welcome.policy_files:
        if not is_weights(file.name):
            shutil.copyfile(await port.fetch(file.blob), folder / file.name)
    engine = await build_engine(engine_name or config.actor.engine, config, folder)
    tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, folder)
    task = load_task(config.task.name, config.task.options)
    scorer = None
    if scores_beside:
        command = [sys.executable, str(CLI), "score", "--parent", str(os.getpid())]
        scorer = ScoringProcess(command, config.task.name, config.task.options)
        await scorer.start()
    ends = stop_ids(folder, tokenizer)
    return Actor(name, port, engine, task, tokenizer, ends, config.rollout, welcome.policy_files, scorer=scorer)


async def build_engine(name: str, config: Config, folder: Path) -> Engine:
    """The engine called `name` (auto: vLLM where it is installed, otherwise transformers) for the policy in `folder`."""
    from actor.transformers_engine import TransformersEngine
    from actor.vllm_engine import VllmEngine, installed_build, why_unfit

    settings, chosen, build = config.actor, choose_engine(name), installed_build()
    unfit = why_unfit(folder, build) if chosen == "vllm" and name == "auto" and build is not None else ""
    if unfit:
        log.warning("using transformers: %s", unfit)
    elif chosen == "vllm":
        return await VllmEngine.start(folder, settings, config.rollout)
    return await asyncio.to_thread(TransformersEngine, folder, settings.device, settings.threads, settings.groups_per_forward)


def choose_engine(name: str) -> str:
    """`name`, or what `auto` means on this machine. Raises ConfigError for one that is not installed here."""
    if name not in ENGINES:
        raise ConfigError("--engine", name, "is not an engine", f"one of {', '.join(ENGINES)}")
    from actor.vllm_engine import installed_build

    build = installed_build()
    if name == "auto":
        return "vllm" if build is not None else "transformers"
    if name == "vllm" and build is None:
        raise ConfigError(
            "actor.engine",
            name,
            "vLLM is not installed here",
            "`make vllm` for the CPU build, pip install 'slipstream-rl[vllm]' with a GPU, or auto",
        )
    return name


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion, by the tokenizer and the policy's generation settings. Raises ConfigError if there are none."""
    from transformers import GenerationConfig

    from tasks.prompts import end_token

    settings = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    return end_token(tokenizer, settings.eos_token_id if settings else None)


# --- learner


def fetch_run(address: str, key: KeyFile, folder: Path) -> None:
    """Put what a learner needs (configuration, run id, policy) in `folder`, from the broker alone; what is there is kept.

    The configuration is taken anew each time: a run that goes on may have changed it. Checkpoints after the end of the broker's journal
    are set aside. Raises ConfigError for a folder of another run.
    """
    from broker.blobs import BlobStore
    from broker.learner_client import LearnerClient
    from deploy.rundir import RunManifest
    from learner.damage import set_aside_ahead

    run = RunDirectory(folder)
    client = LearnerClient(address, key)
    try:
        info = client.run_info()
        is_known = (folder / "run.json").exists()
        if is_known:
            if (known := run.manifest().run) != info.run:
                raise ConfigError("--folder", str(folder), f"is of run {known}, the broker's is {info.run}", "give another folder")
            run.change_config(parse_config_json(info.config))
            if info.step >= 0:
                set_aside_ahead(run.checkpoints, info.step, log.error)
            if (run.policy() / "config.json").exists():
                return
        policy = folder / "policy"
        policy.mkdir(parents=True, exist_ok=True)
        for file in info.policy_files:
            target = policy / file.name
            if not (target.exists() and target.stat().st_size == file.blob.size):
                shutil.copyfile(client.fetch(file.blob, BlobStore(folder / "blobs")), target)
    finally:
        client.close()
    if is_known:
        return
    manifest = RunManifest(info.run, "", str(policy.resolve()), 0, info.policy_files, {}, {})
    run.create(parse_config_json(info.config), manifest)


def run_learner_rank(run: RunDirectory, address: str, key: KeyFile) -> None:
    """Run this process's rank of the learner, under torchrun or alone."""
    import torch

    from broker.learner_client import LearnerClient
    from learner.damage import set_aside_damaged
    from learner.ranks import OneRank, TorchRanks, under_torchrun
    from learner.rollback import RolledBack

    config = run.config()
    device = learner_device(config)
    torch.set_num_threads(config.learner.threads)
    ranks = TorchRanks(device) if under_torchrun() else OneRank()
    if ranks.rank == 0:
        set_aside_damaged(run.checkpoints, log.error)
    ranks.barrier()
    is_done = False
    while not is_done:
        port = LearnerClient(address, key) if ranks.rank == 0 else None
        if port is not None and isinstance(ranks, TorchRanks):
            port.note(lambda: ranks.waits)
        with contextlib.suppress(RolledBack):
            build_learner(config, run.manifest().run, run.policy(), run.checkpoints, ranks, port, device).run()
            is_done = True
    if isinstance(ranks, TorchRanks):
        ranks.close()


def build_learner(
    config: Config,
    run: str,
    policy: Path,
    checkpoints: Path,
    ranks: Any,
    port: LearnerPort | None,
    device: Any,
    *,
    evaluates: bool = True,
    **how: Any,
) -> Any:
    """One rank's learner on a policy, or on the newest of the checkpoints; `how` is passed on to it."""
    from transformers import AutoTokenizer

    from learner.loop import Learner
    from learner.stability.files import calibration_of
    from tasks.registry import load_task

    tokenizer = AutoTokenizer.from_pretrained(policy)
    return Learner(
        config=config,
        policy=policy,
        run=run,
        folder=checkpoints,
        task=load_task(config.task.name, config.task.options) if evaluates else None,
        tokenizer=tokenizer,
        stop_ids=stop_ids(policy, tokenizer),
        ranks=ranks,
        port=port,
        device=device,
        calibration=calibration_of(config),
        **how,
    )


def learner_device(config: Config) -> Any:
    import torch

    name = config.learner.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("learner.device", name, "torch sees no such device here", "auto, or cpu")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError("learner.device", name, "is no device that torch knows", "auto, cpu, cuda, or cuda:1 and so on") from None


# --- all in one process


def run_serial(run: RunDirectory) -> None:
    """The whole loop in one process and one event loop, over the in-memory ports: for debugging, and to compare with."""
    from broker.memory import MemoryBroker
    from learner.ranks import OneRank
    from learner.rollback import RolledBack

    config = run.config()
    if config.learner.ranks != 1:
        raise ConfigError("learner.ranks", config.learner.ranks, "serial mode has one rank", "--set learner.ranks=1")
    loop = asyncio.new_event_loop()
    broker = make_broker(run)
    memory = MemoryBroker(broker, SystemClock())
    actors: list[asyncio.Task[None]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-policy-") as folder:
            for index in range(max(1, config.actor.num_actors)):
                actors.append(loop.create_task(_serial_actor(memory.actor_port(f"actor-{index}"), Path(folder), f"actor-{index}")))
            is_done, device = False, learner_device(config)
            while not is_done:
                port = memory.learner_port(loop, lambda: _raise_failure(actors))
                with contextlib.suppress(RolledBack):
                    build_learner(config, run.manifest().run, run.policy(), run.checkpoints, OneRank(), port, device, beside=False).run()
                    is_done = True
            loop.run_until_complete(asyncio.wait_for(asyncio.gather(*actors), 60))
    finally:
        for task in actors:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*actors, return_exceptions=True))
        loop.close()
        broker.close()
    if broker.ledger.progress.halted:
        raise SlipstreamError(broker.ledger.progress.halted)


async def _serial_actor(port: Any, folder: Path, name: str) -> None:
    reporter = _Reporter(port)
    welcome = await port.join("any engine", reporter)
    actor = await build_actor(port, welcome, folder, name)
    reporter.report = actor.report
    await actor.run()


def _raise_failure(actors: list[asyncio.Task[None]]) -> None:
    """Let the failure of an actor end the learner's wait."""
    for task in actors:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error
