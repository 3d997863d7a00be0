"""A connection whose name another has taken is missed within seconds and made anew, and what it lost goes out at once on the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.accounts import REPLACED
from broker.actor_client import ActorClient
from broker.keys import load_key
from broker.server import Server
from broker.sockets import Channel, client_socket, endpoint
from protocol import codec, messages
from protocol.messages import ActorReport, WireTicket
from tests.broker.conftest import Proxy

DEADLINE_SECONDS = 20
REPORT = ActorReport(-1, 0, [], 0.0, 0.0, 0, "testing")


@pytest.mark.skipif("sys.platform != 'linux'")
@pytest.mark.parametrize(
    ("was_heard", "is_other_heard"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["heard, by one that speaks", "heard, by one that is silent", "not heard, by one that speaks", "not heard, by one that is silent"],
)
def test_a_connection_whose_name_was_taken_is_cut_before_its_heartbeats_tell(
    served: Server, keys: Path, was_heard: bool, is_other_heard: bool
) -> None:
    """However new it is: an actor whose name is taken again and again must get through in between."""
    context: zmq.Context[Any] = zmq.Context()
    where = endpoint(served.address, Channel.ACTORS)
    honest, other = (client_socket(context, served.address, Channel.ACTORS, load_key(keys / "actor.key"), b"toy/1") for _ in range(2))
    monitor = honest.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    others = other.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    honest.connect(where)
    assert monitor.poll(DEADLINE_SECONDS * 1000)
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
    if was_heard:
        _ask(honest)
    other.connect(where)
    assert others.poll(DEADLINE_SECONDS * 1000)
    if is_other_heard:
        _ask(other)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not monitor.poll(100):
        assert time.monotonic() < deadline
        if honest.poll(0, zmq.POLLOUT):
            honest.send_multipart(codec.encode(REPORT))
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
    assert served._turned_away.counts().get(f"actors: {REPLACED}") == 1
    for socket, its_monitor in ((honest, monitor), (other, others)):
        socket.disable_monitor()
        its_monitor.close(linger=0)
        socket.close(linger=0)
    context.term()


def _ask(dealer: zmq.Socket[bytes]) -> None:
    assert dealer.poll(DEADLINE_SECONDS * 1000, zmq.POLLOUT)
    dealer.send_multipart(codec.encode(REPORT))
    assert dealer.poll(DEADLINE_SECONDS * 1000)
    message, _ = codec.to_actor.decode(dealer.recv_multipart())
    assert isinstance(message, messages.HelloWanted)


async def test_a_result_lost_with_its_connection_is_sent_at_once_on_the_next(
    served: Server, keys: Path, make_proxy: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.actor_client.HEARTBEAT_SECONDS", 3600.0)
    host, _, port = endpoint(served.address, Channel.ACTORS).removeprefix("tcp://").rpartition(":")
    assert host == "127.0.0.1"
    proxy = make_proxy(int(port))
    actor = ActorClient(f"tcp://127.0.0.1:{proxy.port - Channel.ACTORS}", load_key(keys / "actor.key"), "a")
    await actor.join("fake", lambda: REPORT)
    for _ in range(3):
        proxy.cut()
        await actor.fail(WireTicket(0, 1, 0, 0), "on purpose")
        await actor._until(lambda: not actor._session.unacked, "the acknowledgement", DEADLINE_SECONDS)
    await actor.leave()
