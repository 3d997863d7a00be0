"""Groups per second through the broker, against Redis Streams with the same durability and a ZeroMQ relay with none.

    python bench/broker.py [--rounds 5] [--sizes 1024 65536 1048576] [--systems broker redis redis-wide relay relay-curve] [--json FILE]

Needs `redis-server` on the path and the optional group `bench`. Each system is three processes: one that produces, the server, one that consumes;
all use TCP on loopback, and the systems take turns within each round. A group counts as acknowledged when its producer knows that it is kept,
as delivered when the consumer has its payload. Both rates are counted from the first submission, and both sides run at the same time.

broker       `cli.py broker` on a fresh run, CURVE on. Four `ActorClient`s in one process encode and submit a group for each ticket as it comes, a
             `LearnerClient` takes batches and commits steps. The broker decodes and checks every group and commits the journal before it
             acknowledges. max_lag is the whole run, so pacing never holds anything back; every actor has its share of the outstanding groups
             as credit.
redis        appendonly yes, appendfsync always, no snapshots, no rewriting of the append-only file, in the clear. Four connections, each with
             a thread and its share of the outstanding messages as a window of pipelined XADDs, which is refilled by halves: Redis syncs once per
             turn of its loop, so several connections let it commit groups together. The consumer sends XACK, XTRIM and the next XREADGROUP COUNT n
             in one go. Payloads are encoded beforehand, and nobody checks them.
redis-wide   the same with a connection for each outstanding message (64 at most): what a turn of Redis's loop syncs is then as large as can be.
relay        zmq.proxy between a ROUTER and a DEALER, no durability: what this machine can carry through a third process. The consumer
             acknowledges by counts. relay-curve is the same with CURVE on all connections: the difference is what encryption costs.

Payloads are real groups, as near to the size as whole tokens come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import zmq
import zmq.auth.thread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from broker.actor_client import ActorClient  # noqa: E402
from broker.control import ControlClient  # noqa: E402
from broker.keys import load_key, make_keys  # noqa: E402
from broker.learner_client import LearnerClient  # noqa: E402
from deploy.rundir import RunDirectory, RunManifest  # noqa: E402
from protocol.config import parse_config  # noqa: E402
from protocol.groups import FULL, Group, encode_group  # noqa: E402
from protocol.messages import ActorReport, Publish  # noqa: E402
from protocol.weights import PolicyVersion  # noqa: E402

NUM_CONNECTIONS = 4
GROUP_SIZE = 4
DEADLINE_SECONDS = 120.0
STREAM, CONSUMERS = "groups", "learners"


class Load(NamedTuple):
    """How much is sent: `num_groups` of `size` bytes, `outstanding` not acknowledged at any time, taken `per_batch` at a time."""

    size: int
    num_groups: int
    outstanding: int
    per_batch: int


LOADS = {
    1 << 10: Load(1 << 10, 16_384, 192, 256),
    1 << 16: Load(1 << 16, 4_096, 64, 128),
    1 << 20: Load(1 << 20, 320, 16, 16),
}


class Times(NamedTuple):
    """Monotonic seconds of the first submission and of the last thing waited for."""

    begin: float
    end: float


class Found(NamedTuple):
    """What a run of one system shows; `cpu` has the CPU seconds of producer, server and consumer."""

    produced: Times
    consumed: Times
    cpu: tuple[float, float, float]


def template(size: int) -> Group:
    """A group of about `size` bytes on the wire."""
    random = np.random.default_rng(0)

    def make(num_tokens: int) -> Group:
        total = GROUP_SIZE * num_tokens
        return Group(
            ticket=1 << 20,
            prompt=1 << 20,
            seed=1 << 61,
            actor="actor-0",
            engine="bench",
            prompt_ids=random.integers(0, 150_000, 16, dtype=np.int32),
            num_tokens=np.full(GROUP_SIZE, num_tokens, np.int32),
            token_ids=random.integers(0, 150_000, total, dtype=np.int32),
            logprobs=-random.exponential(1.0, total).astype(np.float32),
            versions=np.zeros(total, np.int32),
            rewards=random.random(GROUP_SIZE, dtype=np.float32),
            finish=np.full(GROUP_SIZE, FULL, np.uint8),
        )

    overhead = len(encode_group(make(1))) - 12 * GROUP_SIZE
    return make((size - overhead) // (12 * GROUP_SIZE))


# --- processes

Role = Callable[..., Times]


def child(role: Role, connection: Connection, arguments: tuple[Any, ...]) -> None:
    """The body of a process: `role` is given what to call once it is ready, which returns when all others are."""
    cpu = 0.0

    def ready() -> None:
        nonlocal cpu
        connection.send("ready")
        connection.recv()
        cpu = time.process_time()

    times = role(ready, *arguments)
    connection.send((times, time.process_time() - cpu))


def run_together(server: psutil.Process, *roles: tuple[Role, tuple[Any, ...]]) -> Found:
    """Run the producer and the consumer, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for role, arguments in roles:
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=child, args=(role, theirs, arguments))
            process.start()
            theirs.close()
            connections.append(mine)
            processes.append(process)
        for connection in connections:
            _hear(connection)
        before = server.cpu_times()
        for connection in connections:
            connection.send("go")
        (produced, producer_cpu), (consumed, consumer_cpu) = [_hear(connection) for connection in connections]
        after = server.cpu_times()
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
    return Found(produced, consumed, (producer_cpu, after.user + after.system - before.user - before.system, consumer_cpu))


def _hear(connection: Connection) -> Any:
    if not connection.poll(DEADLINE_SECONDS):
        raise SystemExit(f"a process of the bench has said nothing for {DEADLINE_SECONDS:.0f} s")
    return connection.recv()


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[psutil.Process]:
    """A server's process, ended afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield psutil.Process(process.pid)
    except BaseException:
        code = process.poll()
        sys.stderr.write(
            f"the server {'is there' if code is None else f'ended with code {code}'}; its output ends:\n{log.read_text()[-4000:]}\n"
        )
        raise
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(what: str, condition: Callable[[], bool]) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {what} for {DEADLINE_SECONDS:.0f} s")
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- ours


def measure_broker(load: Load, folder: Path) -> Found:
    """The real broker with its real clients."""
    num_steps = load.num_groups // load.per_batch
    config = {
        "run": {"name": "bench", "steps": num_steps},
        "policy": {"max_lag": num_steps},
        "rollout": {"group_size": GROUP_SIZE, "groups_per_batch": load.per_batch, "max_tokens": load.size // 12 // GROUP_SIZE},
        "actor": {"num_actors": NUM_CONNECTIONS},
    }
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    make_keys(run.keys)
    run.create(parse_config(config), RunManifest("bench", "", "none", 4096, [], {}, {}))
    with started([sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(run.path)], folder / "broker.txt") as server:
        wait("the broker", lambda: run.broker_address() is not None)
        address = run.broker_address()
        found = run_together(server, (actors, (address, run.keys, load)), (learner, (address, run.keys, load)))
        control = ControlClient(address, load_key(run.keys / "admin.key"))
        status = control.status()
        control.close()
        if (status.consumed, status.step) != (load.num_groups, num_steps):
            raise SystemExit(f"the broker counts {status.consumed} groups consumed, {load.num_groups} were sent: {status}")
    return found


def actors(ready: Callable[[], None], address: str, keys: Path, load: Load) -> Times:
    """Toy actors: a group for every ticket, at once."""
    return asyncio.run(_actors(ready, address, keys, load))


async def _actors(ready: Callable[[], None], address: str, keys: Path, load: Load) -> Times:
    credit = 0
    key, group = load_key(keys / "actor.key"), template(load.size)
    clients = [ActorClient(address, key, f"actor-{index}") for index in range(NUM_CONNECTIONS)]

    def reporter(client: ActorClient) -> Callable[[], ActorReport]:
        return lambda: ActorReport(0 if credit else -1, credit, client.held_tickets(), 0.0, 0.0, 0, "bench")

    for client in clients:
        await client.join("bench", reporter(client))
    await asyncio.gather(*(client.new_version(-1) for client in clients))
    await asyncio.to_thread(ready)
    credit = load.outstanding // NUM_CONNECTIONS
    num_submitted, begin = 0, float("inf")

    async def work(client: ActorClient) -> None:
        nonlocal num_submitted, begin
        while (ticket := await client.next_ticket()) is not None:
            begin = min(begin, time.monotonic())
            made = msgspec.structs.replace(group, ticket=ticket.number, prompt=ticket.prompt, seed=ticket.seed)
            await client.submit(made, ticket.attempt)
            num_submitted += 1

    async def all_acknowledged() -> float:
        while num_submitted < load.num_groups or any(client.held_tickets() for client in clients):  # noqa: ASYNC110 - ports tell nobody
            await asyncio.sleep(0.002)
        return time.monotonic()

    for client in clients:
        client.report_now()
    *_, end = await asyncio.gather(*map(work, clients), all_acknowledged())
    for client in clients:
        await client.leave()
    return Times(begin, end)


def learner(ready: Callable[[], None], address: str, keys: Path, load: Load) -> Times:
    """A toy learner: takes batches and commits steps; the weights stay as they are."""
    client = LearnerClient(address, load_key(keys / "learner.key"))
    client.join(0, 1, {})
    client.publish(Publish(PolicyVersion(0, 0, 0, "0" * 64), -1, None, None, 0, 0, is_base=True))
    ready()
    end, num_steps = 0.0, load.num_groups // load.per_batch
    for step in range(num_steps):
        batch = client.next_batch(step, lambda: None)
        assert batch is not None
        end = time.monotonic()
        client.commit(step, batch.number, [step] * load.per_batch, {})
    client.done(num_steps, {})
    client.close()
    return Times(0.0, end)


# --- Redis


def measure_redis(load: Load, folder: Path, num_connections: int = NUM_CONNECTIONS) -> Found:
    """A Redis server of its own, with a stream and one consumer group."""
    import redis

    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("redis-server is not on the path; install it, or leave redis out with --systems")
    port = free_port()
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "auto-aof-rewrite-percentage": "0",
        "save": "",
    }
    command = [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]
    with started(command, folder / "redis.txt") as server:
        client = redis.Redis(port=port)

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        wait("redis-server", answers)
        client.xgroup_create(STREAM, CONSUMERS, id="0", mkstream=True)
        found = run_together(server, (redis_producers, (port, num_connections, load)), (redis_consumer, (port, load)))
        client.close()
    return found


def redis_producers(ready: Callable[[], None], port: int, num_connections: int, load: Load) -> Times:
    """Threads that each keep a window of XADDs under way."""
    from redis.connection import Connection as RedisConnection

    payload = encode_group(template(load.size))
    window, share = load.outstanding // num_connections, load.num_groups // num_connections

    def produce() -> None:
        connection = RedisConnection(port=port)
        connection.connect()
        barrier.wait()
        num_sent = num_acked = 0
        while num_acked < share:
            batch = min(share - num_sent, window - (num_sent - num_acked))
            if batch:
                connection.send_packed_command(connection.pack_commands([("XADD", STREAM, "*", "g", payload)] * batch))
                num_sent += batch
            for _ in range(min(num_sent - num_acked, max(1, window // 2))):
                connection.read_response()
                num_acked += 1
        connection.disconnect()

    barrier = threading.Barrier(num_connections + 1)
    threads = [threading.Thread(target=produce) for _ in range(num_connections)]
    for thread in threads:
        thread.start()
    ready()
    begin = time.monotonic()
    barrier.wait()
    for thread in threads:
        thread.join()
    return Times(begin, time.monotonic())


def redis_consumer(ready: Callable[[], None], port: int, load: Load) -> Times:
    """A member of the consumer group; what it has acknowledged is trimmed, so memory stays bounded."""
    import redis

    client = redis.Redis(port=port)
    client.ping()
    ready()
    num_received, done, end = 0, [], 0.0
    while num_received < load.num_groups:
        pipeline = client.pipeline(transaction=False)
        if done:
            pipeline.xack(STREAM, CONSUMERS, *done)
            pipeline.xtrim(STREAM, minid=done[-1], approximate=True)
        pipeline.xreadgroup(CONSUMERS, "learner", {STREAM: ">"}, count=load.per_batch, block=1000)
        answer = pipeline.execute()[-1]
        entries = answer[0][1] if answer else []
        end = time.monotonic()
        done = [number for number, _ in entries]
        num_received += len(entries)
    client.xack(STREAM, CONSUMERS, *done)
    client.close()
    return Times(0.0, end)


# --- the relay


def measure_relay(load: Load, folder: Path, curve: bool = False) -> Found:
    """A proxy that keeps nothing."""
    ports = free_port(), free_port()
    keys = zmq.curve_keypair() if curve else None
    command = f"from bench.broker import relay; relay({ports!r}, {keys!r})"
    with started([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {command}"], folder / "relay.txt") as server:
        return run_together(server, (relay_producer, (ports[0], keys, load)), (relay_consumer, (ports[1], keys, load)))


Keys = tuple[bytes, bytes] | None


def relay(ports: tuple[int, int], keys: Keys) -> None:
    """The proxy itself."""
    context: zmq.Context[Any] = zmq.Context()
    authenticator = zmq.auth.thread.ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain="*", location=zmq.auth.CURVE_ALLOW_ANY)
    ends = []
    for kind, port in zip((zmq.ROUTER, zmq.DEALER), ports, strict=True):
        ends.append(context.socket(kind))
        if keys:
            ends[-1].curve_server = True
            ends[-1].curve_publickey, ends[-1].curve_secretkey = keys
        ends[-1].bind(f"tcp://127.0.0.1:{port}")
    zmq.proxy(*ends)


def _relay_client(port: int, keys: Keys) -> zmq.Socket[bytes]:
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    if keys:
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = keys[0]
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def relay_producer(ready: Callable[[], None], port: int, keys: Keys, load: Load) -> Times:
    """Keeps a window of groups under way."""
    dealer, payload = _relay_client(port, keys), encode_group(template(load.size))
    dealer.send_multipart([b"hello", b""])  # the proxy is there, and so is the consumer
    dealer.recv_multipart()
    ready()
    begin, num_sent, num_acked = time.monotonic(), 0, 0
    while num_acked < load.num_groups:
        while num_sent < min(load.num_groups, num_acked + load.outstanding):
            dealer.send_multipart([b"group", payload], copy=False)
            num_sent += 1
        num_acked = int(dealer.recv_multipart()[0])
    end = time.monotonic()
    dealer.close()
    return Times(begin, end)


def relay_consumer(ready: Callable[[], None], port: int, keys: Keys, load: Load) -> Times:
    """Acknowledges by counts, four times a window."""
    dealer = _relay_client(port, keys)
    identity, *_ = dealer.recv_multipart()
    dealer.send_multipart([identity, b"0", b""])
    ready()
    for number in range(1, load.num_groups + 1):
        identity, _, _ = dealer.recv_multipart(copy=load.size < 1 << 16)
        if number % (load.outstanding // 4) == 0 or number == load.num_groups:
            dealer.send_multipart([identity, b"%d" % number, b""])
    end = time.monotonic()
    dealer.close()
    return Times(0.0, end)


# --- figures

PROCESSES = ("producer", "server", "consumer")
SYSTEMS: dict[str, Callable[[Load, Path], Found]] = {
    "broker": measure_broker,
    "redis": measure_redis,
    "redis-wide": lambda load, folder: measure_redis(load, folder, min(64, load.outstanding)),
    "relay": measure_relay,
    "relay-curve": lambda load, folder: measure_relay(load, folder, curve=True),
}


def measure(system: str, load: Load) -> dict[str, float]:
    """One run of one system: rates in groups per second, and CPU microseconds of each process for one group."""
    with tempfile.TemporaryDirectory() as folder:
        produced, consumed, cpu = SYSTEMS[system](load, Path(folder))
    rates = {"acked": produced.end - produced.begin, "delivered": consumed.end - produced.begin}
    return {name: load.num_groups / seconds for name, seconds in rates.items()} | {
        name: seconds / load.num_groups * 1e6 for name, seconds in zip(PROCESSES, cpu, strict=True)
    }


def summary(size: int, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians and spread of one size, and of each round the ratio to Redis."""
    num_bytes = len(encode_group(template(size)))
    lines = [f"{num_bytes} bytes a group, {LOADS[size]}"]
    for system, runs in found.items():
        cells = []
        for what in ("acked", "delivered"):
            rates = [run[what] for run in runs]
            middle = statistics.median(rates)
            cells.append(f"{what} {middle:9.0f}/s ({min(rates):.0f} to {max(rates):.0f}) {middle * num_bytes / 1e9:6.3f} GB/s")
        cpu = "  ".join(f"{name} {statistics.median(run[name] for run in runs):.0f}" for name in PROCESSES)
        lines.append(f"  {system:<12} {'   '.join(cells)}   CPU us/group: {cpu}")
    for other in found if "broker" in found else ():
        for what in ("acked", "delivered") if other != "broker" else ():
            ratios = [ours[what] / theirs[what] for ours, theirs in zip(found["broker"], found[other], strict=True)]
            lines.append(f"  broker / {other}, {what}: {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[int, dict[str, list[dict[str, float]]]] = {size: {system: [] for system in options.systems} for size in options.sizes}
    for number in range(options.rounds):
        for size in options.sizes:
            for system in options.systems[:: -1 if number % 2 else 1]:
                found[size][system].append(measure(system, LOADS[size]))
    for size in options.sizes:
        print("\n".join(summary(size, found[size])))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
