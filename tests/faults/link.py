"""A network that misbehaves on demand between a broker and its peers, on loopback: for tests and benchmarks.

Invariant: what is carried arrives in order and, unless `flip_every` says otherwise, as it was sent; a fault holds from the call that makes it to the
one that ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from broker.sockets import Channel

BLOCK_BYTES = 16384
NUM_ON_THE_WAY = 256
"""Blocks that one way of a connection holds at most, for as long as they are delayed."""
HOST = "127.0.0.1"


class Way(Enum):
    """A direction."""

    UP = "to the broker"
    DOWN = "from the broker"


@dataclass
class Road:
    """What one direction is like now, for all connections together. Plain numbers may be set from any thread."""

    bytes_per_second: float = float("inf")
    delay: float = 0.0
    jitter: float = 0.0
    """Seconds; each block takes `delay` and up to `jitter` more, and none overtakes another."""
    flip_every: int = 0
    """One block of so many arrives with one bit changed, beginning with the next; 0 for none."""
    num_since: int = 0
    """Blocks since `flip_every` was set."""
    flipped: list[tuple[float, Channel]] = field(default_factory=list)
    """Seconds since 1970 at which each bit was changed, and on which channel."""
    free_at: float = 0.0
    passing: dict[Channel, asyncio.Event] = field(default_factory=dict)


@dataclass(eq=False)
class _Connection:
    near: socket.socket
    far: socket.socket | None = None
    task: asyncio.Task[None] | None = None

    def ends(self) -> list[socket.socket]:
        return [end for end in (self.near, self.far) if end is not None]


class Link:
    """Four consecutive ports that forward to a broker's, sharing one capacity for each direction.

    All connections are cut each time that as many bytes as `cuts` says next have come from the broker in all.
    """

    def __init__(self, address: str, bytes_per_second: float = float("inf"), cuts: Sequence[int] = ()) -> None:
        self._target = int(address.rpartition(":")[2])
        self._cuts = list(cuts)
        self.num_cuts = 0
        self.num_bytes: Counter[Channel] = Counter()
        """Carried from the broker, by channel."""
        self.opened: list[tuple[float, Channel]] = []
        """Seconds since 1970 at which each connection was taken."""
        self.is_black_hole = False
        """Whether connections are taken and then never carried anything, not even once this is over."""
        self.accept_delay = 0.0
        """Seconds from taking a connection to going on with it."""
        self.roads = {way: Road(bytes_per_second) for way in Way}
        self._random = random.Random(7)
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._accepting: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        first, self._listeners = _listen()
        self.address = f"tcp://{HOST}:{first}"

    def __enter__(self) -> Link:
        self._thread.start()
        self._do(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # --- faults

    def hold(self, *channels: Channel, ways: Sequence[Way] = tuple(Way)) -> None:
        """Carry nothing on these channels (none named: on all), in these directions, until `release`; connections stay open."""
        self._do(lambda: [self.roads[way].passing[channel].clear() for way in ways for channel in channels or Channel])

    def release(self, *channels: Channel) -> None:
        """Carry again what these channels (none named: all) were given."""
        self._do(lambda: [road.passing[channel].set() for road in self.roads.values() for channel in channels or Channel])

    def cut(self, *ways: Way) -> None:
        """End all connections now, or only these directions of them; new ones are taken."""
        self._do(lambda: self._cut(ways))

    def reset(self) -> None:
        """End all connections with a reset; new ones are taken."""
        self._do(self._reset)

    # --- in the loop's thread

    def _do(self, change: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10), "the link's thread does not answer"

    def _open(self) -> None:
        for channel, listener in self._listeners.items():
            for road in self.roads.values():
                road.passing[channel] = asyncio.Event()
                road.passing[channel].set()
            self._accepting.append(self._loop.create_task(self._accept(channel, listener)))

    async def _close(self) -> None:
        tasks = [*self._accepting, *(connection.task for connection in self._connections if connection.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners.values():
            listener.close()

    def _cut(self, ways: Sequence[Way]) -> None:
        for connection in self._connections:
            for way in ways:
                sink = connection.far if way is Way.UP else connection.near
                with contextlib.suppress(OSError):
                    if sink is not None:
                        sink.shutdown(socket.SHUT_WR)
            if not ways and connection.task is not None:
                for end in connection.ends():
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                connection.task.cancel()

    def _reset(self) -> None:
        for connection in self._connections:
            for end in connection.ends():
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if connection.task is not None:
                connection.task.cancel()

    async def _accept(self, channel: Channel, listener: socket.socket) -> None:
        """Consumes connections, waits for the next; produces a task for each."""
        while True:
            near, _ = await self._loop.sock_accept(listener)
            self.opened.append((time.time(), channel))
            connection = _Connection(near)
            self._connections.add(connection)
            connection.task = self._loop.create_task(self._carry(channel, connection))

    async def _carry(self, channel: Channel, connection: _Connection) -> None:
        """Carry one connection until either side ends it."""
        try:
            with contextlib.suppress(OSError):
                if self.is_black_hole:
                    while await self._loop.sock_recv(connection.near, BLOCK_BYTES):
                        pass
                    return
                await asyncio.sleep(self.accept_delay)
                connection.far = far = socket.socket()
                far.setblocking(False)
                await self._loop.sock_connect(far, (HOST, self._target + channel))
                await self._both_ways(channel, connection.near, far)
        finally:
            self._connections.discard(connection)
            for end in connection.ends():
                end.close()

    async def _both_ways(self, channel: Channel, near: socket.socket, far: socket.socket) -> None:
        tasks = []
        for way, source, sink in ((Way.UP, near, far), (Way.DOWN, far, near)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(NUM_ON_THE_WAY)
            tasks.append(self._loop.create_task(self._take_in(way, source, queue)))
            tasks.append(self._loop.create_task(self._hand_over(channel, way, queue, sink)))
        try:
            await asyncio.wait([tasks[1], tasks[3]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_in(self, way: Way, source: socket.socket, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Consumes bytes of one end, waits for more and for the road's capacity; produces blocks and when they arrive, an empty one at the end."""
        road, due, data = self.roads[way], 0.0, b"."
        while data:
            try:
                data = await self._loop.sock_recv(source, BLOCK_BYTES)
            except OSError:
                data = b""
            road.free_at = max(time.monotonic(), road.free_at) + len(data) / road.bytes_per_second
            await asyncio.sleep(road.free_at - time.monotonic())
            due = max(due, time.monotonic() + road.delay + self._random.uniform(0, road.jitter))
            await queue.put((due, data))

    async def _hand_over(self, channel: Channel, way: Way, queue: asyncio.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        """Consumes blocks, waits until each is due and may pass; produces bytes at the other end, and ends with them."""
        road = self.roads[way]
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await road.passing[channel].wait()
            if not data:
                return
            if road.flip_every and road.num_since % road.flip_every == 0:
                place = self._random.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 1 << self._random.randrange(8)]) + data[place + 1 :]
                road.flipped.append((time.time(), channel))
            road.num_since += 1
            await self._loop.sock_sendall(sink, data)
            if way is Way.DOWN:
                self.num_bytes[channel] += len(data)
                if self._cuts and self.num_bytes.total() >= self._cuts[0]:
                    del self._cuts[0]
                    self.num_cuts += 1
                    self._cut(())


def _listen() -> tuple[int, dict[Channel, socket.socket]]:
    """The first of four consecutive free ports, and listeners on them."""
    for first in random.SystemRandom().sample(range(20000, 32768, 4), 64):
        listeners: dict[Channel, socket.socket] = {}
        try:
            for channel in Channel:
                listeners[channel] = socket.create_server((HOST, first + channel))
                listeners[channel].setblocking(False)
        except OSError:
            for listener in listeners.values():
                listener.close()
        else:
            return first, listeners
    raise OSError("no four consecutive ports are free")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server((HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
