"""Closed: whatever authenticated peers send, the server goes on serving; whoever is not let in gets nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.control import ControlClient
from broker.keys import load_key
from broker.server import Server
from broker.sockets import Channel, client_socket, endpoint, send_or_drop
from protocol import codec, messages
from protocol.weights import PolicyVersion

ROLE_OF = {Channel.CONTROL: "admin", Channel.ACTORS: "actor", Channel.LEARNER: "learner", Channel.BLOBS: "actor"}


def still_serves(served: Server, folder: Path) -> messages.RunStatus:
    client = ControlClient(served.address, load_key(folder / "keys" / "admin.key"))
    try:
        return client.status()
    finally:
        client.close()


GARBAGE: list[list[bytes]] = [
    [b""],
    [b"", b""],
    [b"\xff" * 100, b""],
    [b"x"] * 5,
    [b"x"] * 1000,
    [b"\x81\xa4type\xa3No!", b""],
    [b"\x93" * 3000, b""],
    [b"\xdd\xff\xff\xff\xff", b""],
    [b"h" * (codec.MAX_HEADER_BYTES + 1), b""],
]


@pytest.mark.parametrize("channel", list(Channel))
def test_garbage_from_a_peer_with_a_valid_key_is_refused_and_the_server_goes_on(served: Server, tmp_path: Path, channel: Channel) -> None:
    context: zmq.Context[Any] = zmq.Context()
    for identity in (b"a/b", b"\xff\xfe/x", b"noslash", b"x" * 200, b"a/"):
        socket = client_socket(context, served.address, channel, load_key(tmp_path / "keys" / f"{ROLE_OF[channel]}.key"), identity)
        socket.connect(endpoint(served.address, channel))
        for frames in GARBAGE:
            assert socket.poll(10_000, zmq.POLLOUT)
            socket.send_multipart(frames)
        # An answer to a proper request shows that everything before it was dealt with. After so much garbage the connection was cut, and this
        # one may have gone down with it.
        if channel is Channel.BLOBS:
            deadline = time.monotonic() + 10
            while not socket.poll(200):
                assert time.monotonic() < deadline
                send_or_drop(socket, codec.encode(messages.GetChunk("ab" * 32, 1 << 50)))
        socket.close(linger=2000)
    context.term()
    assert still_serves(served, tmp_path).run == "frames"


def test_messages_out_of_any_order_are_answered_or_ignored_and_the_server_goes_on(served: Server, tmp_path: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    wild: dict[Channel, list[Any]] = {
        Channel.ACTORS: [
            messages.SubmitGroup(1, 1, 1),
            messages.TicketFailed(9, 9, 9, "no"),
            messages.GetRoute(1 << 50),
            messages.GetRoute(-7, "no way"),
            messages.ActorBye(),
            messages.ActorReport(-7, 4096, [1, 2, 3], 0.0, 0.0, 0, "x"),
            messages.ActorHello(99, "other", "e", "engine", "host", 1, []),
        ],
        Channel.LEARNER: [
            messages.NextBatch(1 << 60),
            messages.GetGroup(1 << 40),
            messages.CommitStep(5, 5, [1], {}),
            messages.LearnerDone(7, {}),
            messages.LearnerHello(99, "s", 0, 1),
            messages.LearnerHello(messages.PROTOCOL_VERSION, "s", 0, 1),
            messages.CommitStep(0, 0, [], {}),
            messages.CommitStep(0, 1 << 40, [1], {}),
            messages.Publish(PolicyVersion(1 << 40, -5, 9, "x"), 5, None, None, 1, 1),
            messages.GetGroup(0),
            messages.LearnerDone(1 << 60, {}),
            messages.LearnerDone(0, {}),
        ],
        Channel.BLOBS: [
            messages.PutChunk("ab" * 32, 1 << 60, 0),
            messages.PutChunk("cd" * 32, 3, 1 << 60),
            messages.GetChunk("ef" * 32, 1 << 60),
            messages.GetChunk("ef" * 32, 0, 0, 1 << 60),
        ],
    }
    for channel, sent in wild.items():
        socket = client_socket(context, served.address, channel, load_key(tmp_path / "keys" / f"{ROLE_OF[channel]}.key"), b"a/b")
        socket.connect(endpoint(served.address, channel))
        for message in sent:
            assert socket.poll(10_000, zmq.POLLOUT)
            socket.send_multipart(codec.encode(message, b"payload"))
        socket.close(linger=2000)
    context.term()
    status = still_serves(served, tmp_path)
    assert status.issued == status.outstanding + status.queued + status.consumed + status.expired + status.failed + status.void


@pytest.mark.parametrize("channel", list(Channel))
def test_a_peer_without_a_key_or_with_the_key_of_another_role_gets_nothing(served: Server, tmp_path: Path, channel: Channel) -> None:
    context: zmq.Context[Any] = zmq.Context()
    plain = context.socket(zmq.DEALER)
    sockets = [plain]
    plain.connect(endpoint(served.address, channel))
    for role in ("actor", "learner", "admin"):
        if role == ROLE_OF[channel] or (channel is Channel.BLOBS and role == "learner"):
            continue
        socket = client_socket(context, served.address, channel, load_key(tmp_path / "keys" / f"{role}.key"), b"a/b")
        socket.connect(endpoint(served.address, channel))
        sockets.append(socket)
    deadline = time.monotonic() + 10
    while served._authenticator.num_refused < len(sockets) - 1 and time.monotonic() < deadline:
        time.sleep(0.02)  # the authenticator's count has no event to wait for
    assert served._authenticator.num_refused >= len(sockets) - 1
    for socket in sockets:
        # IMMEDIATE: nothing can be sent where no handshake succeeded; the plain one may queue, and gets no answer.
        if socket.poll(0, zmq.POLLOUT):
            assert socket is plain
            send_or_drop(socket, codec.encode(messages.GetStatus()))
        assert not socket.poll(100)
        socket.close(linger=0)
    context.term()
    assert still_serves(served, tmp_path).run == "frames"
