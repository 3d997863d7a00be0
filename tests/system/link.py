"""A slow and unreliable link to a broker, on loopback: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from broker.sockets import Channel

BLOCK_BYTES = 16384
HOST = "127.0.0.1"


class Link:
    """Four consecutive ports that forward to a broker's, sharing one capacity for each direction.

    All connections are cut each time that as many bytes as `cuts` says next have come from the broker in all. What a channel carries is held back
    between `hold` and `release`.
    """

    def __init__(self, address: str, bytes_per_second: float = float("inf"), cuts: Sequence[int] = ()) -> None:
        self._target = int(address.rpartition(":")[2])
        self._rate, self._cuts = bytes_per_second, list(cuts)
        self.num_cuts = 0
        self.num_bytes: Counter[Channel] = Counter()
        """Carried from the broker, by channel."""
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._free_at = {False: 0.0, True: 0.0}
        self._passing = {channel: threading.Event() for channel in Channel}
        for event in self._passing.values():
            event.set()
        self._ends: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        first, self._listeners = _listen()
        self.address = f"tcp://{HOST}:{first}"

    def __enter__(self) -> Link:
        for channel, listener in self._listeners.items():
            self._start(self._accept, channel, listener)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        for channel, listener in self._listeners.items():
            self._passing[channel].set()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def hold(self, channel: Channel) -> None:
        """Carry nothing on this channel, in either direction, until `release`."""
        self._passing[channel].clear()

    def release(self, channel: Channel) -> None:
        """Carry again what a channel was given."""
        self._passing[channel].set()

    def cut(self) -> None:
        """Cut all connections now; new ones are taken."""
        with self._changed:
            ends = list(self._ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    # --- in threads

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, channel: Channel, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection((HOST, self._target + channel))
                except OSError:
                    near.close()
                    continue
                with self._changed:
                    self._ends |= {near, far}
                self._start(self._carry, channel, near, far)

    def _carry(self, channel: Channel, near: socket.socket, far: socket.socket) -> None:
        """Carry one connection until either side ends it."""
        upwards = threading.Thread(target=self._pump, args=(channel, near, far, False), daemon=True)
        upwards.start()
        self._pump(channel, far, near, True)
        upwards.join()
        with self._changed:
            self._ends -= {near, far}
        near.close()
        far.close()

    def _pump(self, channel: Channel, source: socket.socket, sink: socket.socket, is_downwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(BLOCK_BYTES):
                self._passing[channel].wait()
                self._take_time(len(data), is_downwards)
                sink.sendall(data)
                if is_downwards and self._count(channel, len(data)):
                    self.cut()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _take_time(self, num_bytes: int, is_downwards: bool) -> None:
        with self._changed:
            at = max(time.monotonic(), self._free_at[is_downwards]) + num_bytes / self._rate
            self._free_at[is_downwards] = at
        self._stopped.wait(at - time.monotonic())

    def _count(self, channel: Channel, num_bytes: int) -> bool:
        """Count what was carried; whether the link is to be cut here."""
        with self._changed:
            self.num_bytes[channel] += num_bytes
            if not self._cuts or self.num_bytes.total() < self._cuts[0]:
                return False
            del self._cuts[0]
            self.num_cuts += 1
            return True


def _listen() -> tuple[int, dict[Channel, socket.socket]]:
    """The first of four consecutive free ports, and listeners on them."""
    for first in random.SystemRandom().sample(range(20000, 60000, 4), 64):
        listeners: dict[Channel, socket.socket] = {}
        try:
            for channel in Channel:
                listeners[channel] = socket.create_server((HOST, first + channel))
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
