"""ZeroMQ sockets, set up in one place.

Four ROUTER sockets on consecutive ports, one for each kind of traffic, so that none waits behind another: control, actors, learner, blobs.
All are CURVE servers with an authenticator (without one libzmq lets any key in), and each admits only the roles that belong there.
"""

from __future__ import annotations

import random
import re
import time
from enum import IntEnum
from typing import Any, Final

import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from broker import limits
from broker.keys import KeyFile, Role
from broker.limits import SLACK_BYTES, Limits
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.config import Config
from protocol.errors import AccessRefused, AddressInUse, BrokerUnreachable, ConfigError

CLIENT_MARK: Final = 256
"""libzmq counts half a mark late, so this must be more than twice what a client has under way: 64 results, or the tickets for as many."""
DROPS_THAT_MEAN_NO: Final = 8
"""Connections dropped during the handshake, about 100 ms apart, before the key is taken to be the wrong one."""


RENEW_SECONDS: Final = 10.0
"""A peer that was not heard for so long is connected to anew. Longer than heartbeats take to find a dead connection, 8 s at most."""
NO_CONNECTION_SECONDS: Final = 4.0
"""The same for a socket that has no connection at all: libzmq tries again at most 3 s after it began to try."""
BACKLOG: Final = 1024
"""Connections that the kernel keeps for us until they are accepted; a flood of them must not hold up the one that matters."""
_ADDRESS: Final = re.compile(r"^tcp://[^/]+:\d{1,5}$")

FREE_PORTS: Final = range(20000, 32768, 4)
"""Below the ports that Linux gives to outgoing connections. A broker that is started again needs the port it had, and among those a client that
keeps trying to reach it may meanwhile be given that very port and be connected to itself."""


class Channel(IntEnum):
    """The broker's sockets; the value is the offset from the first port."""

    CONTROL = 0
    ACTORS = 1
    LEARNER = 2
    BLOBS = 3


ADMITS: Final[dict[Channel, frozenset[Role]]] = {
    Channel.CONTROL: frozenset({"admin"}),
    Channel.ACTORS: frozenset({"actor"}),
    Channel.LEARNER: frozenset({"learner"}),
    Channel.BLOBS: frozenset({"actor", "learner"}),
}


def endpoint(address: str, channel: Channel) -> str:
    """The endpoint of one channel of the broker at `address` (tcp://host:first_port)."""
    if not _ADDRESS.match(address):
        raise ConfigError("--broker", address, "is not tcp://host:port", "give the address that the broker printed")
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + channel}"


class Authenticator:
    """Answers libzmq's question whether a key may connect to a channel. Counts refusals."""

    def __init__(self, context: zmq.Context[Any], allowed: dict[str, set[str]]) -> None:
        """`allowed` has the public keys that each domain (a server socket's name) admits."""
        self._thread = zmq.auth.thread.ThreadAuthenticator(context)
        self._thread.start()
        self.num_refused = 0
        for domain, keys in allowed.items():
            self._thread.configure_curve_callback(domain=domain, credentials_provider=_Allowed(self, keys))

    def close(self) -> None:
        """Stop answering."""
        self._thread.stop()


def channel_keys(allowed: dict[Role, set[str]]) -> dict[str, set[str]]:
    """The keys that each channel of a broker admits, by the role of their owners."""
    return {channel.name: set().union(*(allowed[role] for role in roles)) for channel, roles in ADMITS.items()}


class _Allowed:
    """pyzmq's CredentialsProvider for one channel."""

    def __init__(self, authenticator: Authenticator, keys: set[str]) -> None:
        self._authenticator, self._keys = authenticator, keys

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        allowed = key.decode("ascii", "replace") in self._keys
        self._authenticator.num_refused += not allowed
        return allowed


def channel_limits(config: Config) -> dict[Channel, Limits]:
    """What each channel of a run's broker takes and gives."""
    return {
        Channel.CONTROL: limits.control(),
        Channel.ACTORS: limits.actors(config),
        Channel.LEARNER: limits.learner(),
        Channel.BLOBS: limits.blobs(),
    }


def bind_all(
    context: zmq.Context[Any], address: str, key: KeyFile, channels: dict[Channel, Limits]
) -> tuple[str, dict[Channel, zmq.Socket[bytes]]]:
    """Bind the four channels at `address`; port 0 takes four free consecutive ports. Returns the address in fact.

    Raises AddressInUse.
    """
    host, _, port = address.rpartition(":")
    first_ports = [int(port)] if int(port) else random.SystemRandom().sample(FREE_PORTS, 64)
    error: zmq.ZMQError | None = None
    for first in first_ports:
        sockets: dict[Channel, zmq.Socket[bytes]] = {}
        try:
            for channel in Channel:
                sockets[channel] = server_socket(context, channel.name, key, channels[channel])
                sockets[channel].bind(f"{host}:{first + channel}")
            return f"{host}:{first}", sockets
        except zmq.ZMQError as caught:
            error = caught
            for opened in sockets.values():
                opened.close(linger=0)
    raise AddressInUse(address, str(error))


def server_socket(context: zmq.Context[Any], domain: str, key: KeyFile, channel: Limits) -> zmq.Socket[bytes]:
    """A ROUTER that is a CURVE server; whom it admits is what the context's authenticator says for `domain`."""
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    router.setsockopt(zmq.BACKLOG, BACKLOG)
    router.setsockopt(zmq.MAXMSGSIZE, channel.frame + SLACK_BYTES)
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = key.public.encode(), key.secret.encode()
    router.zap_domain = domain.encode()
    _common(router, channel.num_answers)
    # No heartbeats of our own: one that falls due on a connection that was reset while libzmq did not read from it ends the whole process
    # ("Assertion failed: !_io_error", libzmq 4.3.5). A client's heartbeats are answered, and say after how long without one it is gone.
    router.setsockopt(zmq.HEARTBEAT_IVL, 0)
    return router


def client_socket(context: zmq.Context[Any], address: str, channel: Channel, key: KeyFile, identity: bytes) -> zmq.Socket[bytes]:
    """A DEALER connected to one channel. Connecting does not wait; see `wait_connected`."""
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, identity)
    # Queued frames must not outlive a connection: whoever sent them sends again, under a connection that is known to work.
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
    # The kernel asks for a connection at longer and longer intervals, so after an outage of a minute the next time may be half a minute away.
    dealer.setsockopt(zmq.CONNECT_TIMEOUT, 2_000)
    # A connection that was made just before an outage, or to a proxy whose broker is away, may never get as far as heartbeats.
    dealer.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    dealer.curve_publickey, dealer.curve_secretkey = key.public.encode(), key.secret.encode()
    dealer.curve_serverkey = key.broker.encode()
    _common(dealer, CLIENT_MARK)
    return dealer


def _common(socket: zmq.Socket[Any], out_mark: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, out_mark)
    # No mark for what comes in. At a mark libzmq 4.3.5 stops reading; if the peer then resets the connection, the next heartbeat, one that has come
    # already included, ends the whole process. What a peer may have waiting is bounded by `broker.guard`, what a broker sends by credit.
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    # With a full send buffer no heartbeat gets out, so none can be missed: the kernel has to notice that nothing is acknowledged.
    socket.setsockopt(zmq.TCP_MAXRT, 8_000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 6_000)


def wait_connected(dealer: zmq.Socket[Any], address: str, channel: Channel, role: str, seconds: float) -> None:
    """Connect, and wait until the broker has accepted the key.

    Raises AccessRefused if it does not, BrokerUnreachable if nobody answers within `seconds`.
    """
    refusals = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | refusals)
    num_dropped = 0
    try:
        dealer.connect(endpoint(address, channel))
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not monitor.poll(int(left * 1000) + 1):
                continue
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            # A broker with another key pair cannot read our greeting and drops the connection without a word; so does one that is being
            # started again, but not time after time.
            num_dropped += event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            if event & refusals or (num_dropped >= DROPS_THAT_MEAN_NO and time.monotonic() > deadline - seconds + min(5.0, seconds / 2)):
                raise AccessRefused(address, role)
    finally:
        if not dealer.closed:
            dealer.disable_monitor()
        monitor.close(linger=0)  # an open socket, kept alive by a traceback, would hold up the context's end for ever
    raise BrokerUnreachable(address, seconds, f"the {channel.name.lower()} channel")


def made_connections(dealer: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """A socket on which a message comes for each connection that `dealer` makes from now on; to be closed after `dealer.disable_monitor()`."""
    where = f"inproc://connections-{id(dealer)}"
    dealer.monitor(where, zmq.EVENT_HANDSHAKE_SUCCEEDED)
    pair: zmq.Socket[Any] = dealer.context.socket(zmq.PAIR)
    pair.setsockopt(zmq.RCVHWM, 0)  # libzmq waits, all of it, for whoever does not read these events
    pair.setsockopt(zmq.LINGER, 0)
    pair.connect(where)
    return pair


class Renewal:
    """Connects a client's socket anew when its peer has not been heard for long.

    libzmq does so by itself, but gives up for good, without a word, after bytes in a handshake that are not ZMTP or not CURVE: one wrong bit, or a
    line of text from a proxy whose broker is away. Belongs to the thread that has the socket.
    """

    def __init__(self, dealer: zmq.Socket[Any], where: str) -> None:
        """`where` is the endpoint that the socket is connected to."""
        self._dealer, self._where, self._renewed_at = dealer, where, float("-inf")

    def consider(self, heard_at: float, now: float, patience: float = RENEW_SECONDS) -> None:
        """Connect anew if the peer was last heard, or first waited for, more than `patience` seconds ago; at most once in so long."""
        if now - max(heard_at, self._renewed_at) <= patience:
            return
        self._renewed_at = now
        self._dealer.disconnect(self._where)
        self._dealer.connect(self._where)


def send_or_drop(socket: zmq.Socket[Any], frames: list[bytes | memoryview], wait_milliseconds: int = 100) -> bool:
    """Send a message if the peer can take it within a moment; whether it was sent.

    Never blocks beyond the wait: a connection can go away between the question and the send.
    """
    if not socket.poll(wait_milliseconds, zmq.POLLOUT):
        return False
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
