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

from broker.keys import KeyFile, Role
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import AccessRefused, AddressInUse, BrokerUnreachable, ConfigError

DROPS_THAT_MEAN_NO: Final = 8
"""Connections dropped during the handshake, about 100 ms apart, before the key is taken to be the wrong one."""


_ADDRESS: Final = re.compile(r"^tcp://[^/]+:\d{1,5}$")


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


def bind_all(context: zmq.Context[Any], address: str, key: KeyFile) -> tuple[str, dict[Channel, zmq.Socket[bytes]]]:
    """Bind the four channels at `address`; port 0 takes four free consecutive ports. Returns the address in fact.

    Raises AddressInUse.
    """
    host, _, port = address.rpartition(":")
    first_ports = [int(port)] if int(port) else random.SystemRandom().sample(range(20000, 60000, 4), 64)
    error: zmq.ZMQError | None = None
    for first in first_ports:
        sockets: dict[Channel, zmq.Socket[bytes]] = {}
        try:
            for channel in Channel:
                sockets[channel] = server_socket(context, channel.name, key)
                sockets[channel].bind(f"{host}:{first + channel}")
            return f"{host}:{first}", sockets
        except zmq.ZMQError as caught:
            error = caught
            for opened in sockets.values():
                opened.close(linger=0)
    raise AddressInUse(address, str(error))


def server_socket(context: zmq.Context[Any], domain: str, key: KeyFile) -> zmq.Socket[bytes]:
    """A ROUTER that is a CURVE server; whom it admits is what the context's authenticator says for `domain`."""
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = key.public.encode(), key.secret.encode()
    router.zap_domain = domain.encode()
    _common(router)
    return router


def client_socket(context: zmq.Context[Any], address: str, channel: Channel, key: KeyFile, identity: bytes) -> zmq.Socket[bytes]:
    """A DEALER connected to one channel. Connecting does not wait; see `wait_connected`."""
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, identity)
    # Queued frames must not outlive a connection: whoever sent them sends again, under a connection that is known to work.
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    dealer.curve_publickey, dealer.curve_secretkey = key.public.encode(), key.secret.encode()
    dealer.curve_serverkey = key.broker.encode()
    _common(dealer)
    return dealer


def _common(socket: zmq.Socket[Any]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 64)
    socket.setsockopt(zmq.RCVHWM, 64)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
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


def receive(socket: zmq.Socket[Any]) -> list[bytes]:
    """The frames of one waiting message; of more than four only four are kept, which is enough to refuse it."""
    frames = [socket.recv(zmq.NOBLOCK)]
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv()
        if len(frames) < 4:
            frames.append(frame)
    return frames
