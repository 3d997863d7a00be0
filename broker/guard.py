"""The guard: looks at what libzmq holds for each connection, and cuts those that would fill the memory.

Invariant: nothing is read from or done to a descriptor but through a duplicate that was found to be a TCP connection of the door's port, so a
number that is used again for something else can do no harm; and what turns out to be no socket is never closed (closing any descriptor of a
file that SQLite has open would release its locks).

libzmq puts a whole message together before anybody sees it, and bounds only its frames. The kernel counts the bytes of each connection.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import resource
import socket
import stat
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.accounts import REPLACED, Account, Counts, verdicts
from broker.door import Door
from broker.limits import room_for_all
from protocol.errors import DescriptorsLost

log = logging.getLogger("broker")
LOOK_MILLISECONDS: Final = 10
"""At most so long from a growth of the process's memory to a look at the connections; libzmq decrypts some megabytes meanwhile."""
GROWTH_BYTES: Final = 1 << 20
CALM_SECONDS: Final = 0.25
"""Connections are looked at this often even if the memory does not grow."""
NEWCOMERS: Final = 64
"""So many new connections are a reason to look, too."""
SILENT_MILLISECONDS: Final = 5_500
"""A connection that libzmq gave up after so long without a byte was hung, not hostile (heartbeats time out after 6 s)."""
FAILURES: Final = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED | FAILURES
NO_COMMON_MECHANISM: Final = 0x11000002
_TCP_INFO_BYTES: Final = 136
_LAST_DATA_RECEIVED: Final = 52
_BYTES_ACKED: Final = 120
"""Offsets in the kernel's struct tcp_info; bytes received follow bytes acknowledged."""
_TCP_ESTABLISHED: Final = 1
UNDEAD_SECONDS: Final = 2.0
"""A connection that ended so long ago, and that libzmq still has, it has for ever: it does not notice on one whose name was taken."""


@dataclass(slots=True, eq=False)
class _Connection:
    """One accepted connection: its number with libzmq, our duplicate, and what was counted before it was opened."""

    descriptor: int
    duplicate: socket.socket
    inode: int
    door: Door
    delivered_before: int
    sent_before: int
    account: Account
    ended_at: float = 0.0


class Guard(threading.Thread):
    """Watches the doors of one process.

    consumes:     libzmq's events about connections, the doors' strikes, the kernel's counts
      waits for:    an event, or the time of the next look
      unblocked by: peers, and time
    produces:     cuts, and counts of who was turned away
    """

    def __init__(self, doors: Sequence[Door], failed: Callable[[], None]) -> None:
        """`failed` is called if the guard dies: nobody may go on without one, because its events would pile up."""
        super().__init__(name="guard", daemon=True)
        self._doors, self._failed = list(doors), failed
        self._connections: dict[int, _Connection] = {}
        self._monitors = {_monitor(door): door for door in self._doors} if sys.platform == "linux" else {}
        if not self._monitors:
            log.warning("on %s the kernel does not say what libzmq holds: peers with a key can fill this process's memory", sys.platform)
        self._ports = {door.name: _port(door) for door in self._doors}
        self._undead: dict[int, int] = {}
        """Inodes by descriptor of connections that libzmq will not let go of; without a duplicate of ours."""
        self._left: list[tuple[Door, int, int]] = []
        """Of connections that have ended: how many bytes may still wait at which door, and how often nothing had waited there by then."""
        self._refused: set[str] = set()
        """Doors whose last event said why a handshake failed; the disconnection that follows is of that connection."""
        self._stopped = threading.Event()
        self._room = room_for_all()
        self._max_connections = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self.failure: BaseException | None = None

    def run(self) -> None:
        """The loop."""
        if not self._monitors:
            return
        try:
            self._watch()
        except BaseException as error:
            self.failure = error
            self._failed()
            raise

    def stop(self) -> None:
        """End the loop, wait for it, and let go of everything; the doors' sockets must be open still."""
        self._stopped.set()
        if self.is_alive():
            self.join()
        for monitor, door in self._monitors.items():
            door.socket.disable_monitor()
            monitor.close(linger=0)
        for connection in self._connections.values():
            connection.duplicate.close()

    def _watch(self) -> None:
        poller = zmq.Poller()
        for monitor in self._monitors:
            poller.register(monitor, zmq.POLLIN)
        looked_at, num_bytes, num_new = 0.0, 0, 0
        with open("/proc/self/statm", "rb", buffering=0) as memory:
            while not self._stopped.is_set():
                for monitor, _ in poller.poll(LOOK_MILLISECONDS):
                    num_new += self._take_events(monitor)
                struck = self._take_strikes()
                now, resident = time.monotonic(), _resident_bytes(memory.fileno())
                if struck or num_new > NEWCOMERS or resident - num_bytes > GROWTH_BYTES or now - looked_at > CALM_SECONDS:
                    self._look(now)
                    looked_at, num_bytes, num_new = now, resident, 0
                num_bytes = min(num_bytes, resident)

    # --- what libzmq says

    def _take_events(self, monitor: zmq.Socket[Any]) -> int:
        """Take in what has come; how many connections are new."""
        door, num_new = self._monitors[monitor], 0
        for _ in range(4 * NEWCOMERS):
            try:
                found = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
            event, value = int(found["event"]), int(found["value"])
            if event == zmq.EVENT_ACCEPTED:
                self._admit(door, value)
                num_new += 1
            elif event == zmq.EVENT_DISCONNECTED:
                self._dismiss(door, value)
            elif event == zmq.EVENT_ACCEPT_FAILED:
                door.turned_away.refuse(door.name, "not accepted", os.strerror(value))
            else:
                self._refused.add(door.name)
                door.turned_away.refuse(door.name, *_handshake_failure(event, value))
        return num_new

    def _admit(self, door: Door, descriptor: int) -> None:
        gone = self._connections.get(descriptor)
        if gone is not None and _inode(descriptor) == gone.inode:
            return  # each door has its own events, and this one is about an earlier connection of the same number
        if gone is not None:  # closed without an event, as happens to a connection whose name another has taken
            del self._connections[descriptor]
            self._release(gone)
            gone.duplicate.close()
        duplicate = _duplicate(descriptor, self._ports[door.name])
        if duplicate is None:
            return  # closed already
        inode = os.fstat(duplicate.fileno()).st_ino
        delivered, sent = door.delivered.get(descriptor, 0), door.sent.get(descriptor, 0)
        account = Account(door.limits.held, time.monotonic())
        self._connections[descriptor] = _Connection(descriptor, duplicate, inode, door, delivered, sent, account)

    def _dismiss(self, door: Door, descriptor: int) -> None:
        was_refused = door.name in self._refused
        self._refused.discard(door.name)
        connection = self._connections.get(descriptor)
        if connection is None or connection.door is not door:  # each door has its own events: another may have the number by now
            return
        del self._connections[descriptor]
        info = _tcp_info(connection.duplicate)
        self._count(connection, info, time.monotonic())
        self._release(connection)
        is_ours = info[0] == _TCP_ESTABLISHED and not connection.account.cut_for and not was_refused
        (silent,) = struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)
        if is_ours and silent < SILENT_MILLISECONDS:  # libzmq closed it: it could not go on with what came
            reason = "oversized or broken frame" if connection.account.has_greeted else "not this protocol"
            door.turned_away.refuse(door.name, reason, f"a connection from {_peer(connection.duplicate)}")
        connection.duplicate.close()

    def _release(self, connection: _Connection) -> None:
        """What came of a connection that has ended may still wait to be handed over."""
        if connection.account.held_in > 0:
            self._left.append((connection.door, connection.door.num_drained, connection.account.held_in))

    def _take_strikes(self) -> bool:
        """Enter what the doors refused; whether there was any."""
        found = False
        for door in self._doors:
            while door.replaced:
                descriptor, delivered = door.replaced.popleft()
                connection = self._connections.get(descriptor)
                if connection is not None and connection.door is door and delivered > connection.delivered_before:
                    self._cut(connection, REPLACED)
            while door.strikes:
                descriptor, weight = door.strikes.popleft()
                connection = self._connections.get(descriptor)
                if connection is not None and connection.door is door:
                    connection.account.num_strikes += weight
                    found = True
        return found

    # --- what the kernel says

    def _look(self, now: float) -> None:
        """Count everybody's bytes, and cut whoever must go."""
        for connection in list(self._connections.values()):
            if _inode(connection.descriptor) != connection.inode:
                del self._connections[connection.descriptor]  # closed without an event
                self._release(connection)
                connection.duplicate.close()
                continue
            info = _tcp_info(connection.duplicate)
            self._count(connection, info, now)
            self._bury(connection, info, now)
        self._undead = {descriptor: inode for descriptor, inode in self._undead.items() if _inode(descriptor) == inode}
        if len(self._undead) > self._max_connections:
            raise DescriptorsLost(len(self._undead))
        owners = {connection.account: connection for connection in self._connections.values()}
        self._left = [left for left in self._left if left[0].num_drained == left[1]]
        room = self._room - sum(num_bytes for _, _, num_bytes in self._left)
        for account, reason in verdicts(owners.keys(), room, self._max_connections):
            if not account.cut_for:
                self._cut(owners[account], reason)

    def _cut(self, connection: _Connection, reason: str) -> None:
        account, door = connection.account, connection.door
        account.cut_for = reason
        detail = f"cut {_peer(connection.duplicate)}, holding {account.held_in} bytes from it and {account.held_out} for it"
        door.turned_away.refuse(door.name, reason, detail)
        with contextlib.suppress(OSError):  # it has gone by itself
            connection.duplicate.shutdown(socket.SHUT_RDWR)

    def _bury(self, connection: _Connection, info: bytes, now: float) -> None:
        """Give up our duplicate of a connection that has ended, so that it costs one descriptor and not two."""
        if info[0] == _TCP_ESTABLISHED:
            return
        connection.ended_at = connection.ended_at or now
        if now - connection.ended_at > UNDEAD_SECONDS:
            self._undead[connection.descriptor] = connection.inode
            del self._connections[connection.descriptor]
            self._release(connection)
            connection.duplicate.close()

    def _count(self, connection: _Connection, info: bytes, now: float) -> None:
        acked, received = struct.unpack_from("=QQ", info, _BYTES_ACKED)
        unread = array.array("i", [0])
        fcntl.ioctl(connection.duplicate, termios.FIONREAD, unread)
        delivered = connection.door.delivered.get(connection.descriptor, 0) - connection.delivered_before
        sent = connection.door.sent.get(connection.descriptor, 0) - connection.sent_before
        connection.account.observe(Counts(received - unread[0], delivered, sent, acked, unread[0]), now)


def _handshake_failure(event: int, value: int) -> tuple[str, str]:
    """Reason and detail of a handshake that failed."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "key refused", "it is of another run or of another role"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == NO_COMMON_MECHANISM:
            return "no key", "the peer does not speak CURVE"
        return "broken handshake", f"code {value:#x}: the peer takes us for a broker with another key, or speaks nonsense"
    return "handshake unfinished", f"{os.strerror(value) if value else 'no detail'}: it went away, or said too little in 10 s"


def _monitor(door: Door) -> zmq.Socket[Any]:
    address = f"inproc://guard-{door.name}-{id(door)}"
    door.socket.monitor(address, EVENTS)
    pair: zmq.Socket[Any] = door.socket.context.socket(zmq.PAIR)
    pair.setsockopt(zmq.RCVHWM, 0)  # libzmq waits, all of it, for whoever does not read these events
    pair.setsockopt(zmq.LINGER, 0)
    pair.connect(address)
    return pair


def _port(door: Door) -> int:
    return int(door.socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _duplicate(descriptor: int, port: int) -> socket.socket | None:
    """Our own descriptor of a connection of `port`, None if the number is not one (any more)."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        number = os.dup(descriptor)
    except OSError:
        return None
    try:
        found = socket.socket(fileno=number)
    except OSError:
        return None  # became a file between two lines: `number` stays open, see above
    try:
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM and found.getsockname()[1] == port:
            return found
    except OSError:
        pass
    found.close()
    return None


def _inode(descriptor: int) -> int:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return -1


def _tcp_info(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)


def _peer(connection: socket.socket) -> str:
    try:
        host, port, *_ = connection.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{host}:{port}"


def _resident_bytes(statm: int) -> int:
    return int(os.pread(statm, 128, 0).split()[1]) * resource.getpagesize()
