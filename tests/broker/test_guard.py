"""The guard touches nothing but connections of its door; marks and limits of what libzmq may hold; refusals are counted and logged sparely."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker import limits
from broker.door import wire_bytes
from broker.guard import _duplicate
from broker.keys import load_key
from broker.server import Server
from broker.sockets import Channel, client_socket, endpoint
from broker.turned_away import LOG_SECONDS, TurnedAway
from protocol import codec, messages
from protocol.config import parse_config
from protocol.groups import MAX_GROUP_BYTES
from protocol.messages import MAX_TEXT

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 20


# --- descriptors


def test_only_a_connection_of_the_doors_port_is_duplicated(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    other = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    pair = socket.socketpair()
    file = (tmp_path / "journal").open("wb")
    port = listener.getsockname()[1]
    try:
        found = _duplicate(far.fileno(), port)
        assert found is not None
        assert os.fstat(found.fileno()).st_ino == os.fstat(far.fileno()).st_ino
        found.close()
        before = sorted(os.listdir("/proc/self/fd"))
        for number in (near.fileno(), pair[0].fileno(), other.fileno(), file.fileno(), 1 << 20):
            assert _duplicate(number, port) is None
        assert sorted(os.listdir("/proc/self/fd")) == before, "nothing stays open"
    finally:
        for opened in (near, far, listener, other, *pair):
            opened.close()
        file.close()


def test_a_connection_that_is_cut_is_made_again_and_served(served: Server, keys: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    asking = client_socket(context, served.address, Channel.CONTROL, load_key(keys / "admin.key"), b"admin/1")
    asking.connect(endpoint(served.address, Channel.CONTROL))
    assert asking.poll(DEADLINE_SECONDS * 1000, zmq.POLLOUT)
    asking.send_multipart([b"x"] * 50)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not asking.poll(100):
        assert time.monotonic() < deadline
        if asking.poll(0, zmq.POLLOUT):
            asking.send_multipart(codec.encode(messages.GetStatus()))
    status, _ = codec.to_control.decode(asking.recv_multipart())
    assert isinstance(status, messages.RunStatus)
    assert status.turned_away["control: frames"] == 1
    asking.close(linger=0)
    context.term()


# --- libzmq

BARE_PEERS = """
import socket, struct, sys, time, zmq
from pathlib import Path
from broker import limits
from broker.keys import load_key
from broker.sockets import server_socket

context = zmq.Context()
like = server_socket(context, "like", load_key(Path(sys.argv[1])), limits.control())
router = context.socket(zmq.ROUTER)  # as the broker's, but for CURVE: the trap is the same, and a peer is a few lines
for option in (zmq.RCVHWM, zmq.SNDHWM, zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL):
    router.setsockopt(option, like.getsockopt(option))
router.setsockopt(zmq.ROUTER_HANDOVER, 1)
port = router.bind_to_random_port("tcp://127.0.0.1")
MESSAGE, PING = b"\\x00\\x01a", b"\\x04\\x07\\x04PING\\x00\\x64"

def connect():
    peer = socket.create_connection(("127.0.0.1", port))
    peer.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00NULL" + bytes(16) + b"\\0" + bytes(31))
    ready = b"\\x05READY\\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\\x08Identity" + struct.pack(">I", 1) + b"x"
    peer.sendall(b"\\x04" + bytes([len(ready)]) + ready)
    answer = b""
    while len(answer) < 64 or b"READY" not in answer:
        answer += peer.recv(1000)
    peer.sendall(MESSAGE)
    assert router.poll(5000)
    router.recv_multipart()
    return peer

def reset(peer):
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    time.sleep(0.2)

def drain(seconds):
    number, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        while router.poll(100):
            router.recv_multipart()
            number += 1
    return number
"""
MESSAGES_WAIT = """
peer = connect()
peer.sendall(MESSAGE * 300 + PING)
time.sleep(0.2)
reset(peer)
assert drain(0.3) == 300
"""
NAME_IS_TAKEN = """
peer, other = connect(), connect()
peer.sendall(MESSAGE * 10 + PING)
time.sleep(0.2)
reset(peer)
drain(2.5)
other.sendall(MESSAGE)
assert drain(0.3) == 1
"""


@pytest.mark.parametrize("fate", [MESSAGES_WAIT, NAME_IS_TAKEN], ids=["its messages wait", "another has taken its name"])
def test_a_peer_that_resets_its_connection_does_not_end_the_process(keys: Path, fate: str) -> None:
    """With a mark, or with heartbeats of the broker's own, libzmq 4.3.5 fails an assertion. The sleeps stand for a broker that is busy."""
    command = [sys.executable, "-c", BARE_PEERS + fate, str(keys / "broker.key")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernel_and_the_door_count_the_same_bytes(served: Server, keys: Path) -> None:
    """To the byte, for frames with a short and with a long size field: what is left are the handshake and a heartbeat or two."""
    context: zmq.Context[Any] = zmq.Context()
    asking = client_socket(context, served.address, Channel.ACTORS, load_key(keys / "actor.key"), b"one/1")
    asking.connect(endpoint(served.address, Channel.ACTORS))
    sent = 0
    for length in range(600):
        assert asking.poll(DEADLINE_SECONDS * 1000, zmq.POLLOUT)
        frames = codec.encode(messages.ActorReport(-1, 0, [], 0.0, 0.0, 0, "x" * length), bytes(length % 7))
        asking.send_multipart(frames)
        sent += sum(wire_bytes(len(frame)) for frame in frames)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not any(one.account.counts.delivered == sent for one in list(served._guard._connections.values())):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the guard looks four times a second, and says nothing
    (account,) = [one.account for one in served._guard._connections.values() if one.account.counts.delivered == sent]
    assert 400 < account.counts.read - sent < 1500
    asking.close(linger=0)
    context.term()


# --- limits


def test_a_channel_takes_the_largest_message_of_its_protocol() -> None:
    config = parse_config({"rollout": {"group_size": 64, "max_tokens": 8192}})
    assert 64 * 8192 * 12 < limits.largest_group(config) < 64 * 8192 * 12 + (2 << 20)
    assert limits.largest_group(parse_config({"rollout": {"group_size": 4096, "max_tokens": 1 << 20}})) == MAX_GROUP_BYTES
    most = [1 << 60] * (1 << 16)
    report = codec.encode(messages.ActorReport(1, 1, most, 0.0, 0.0, 0, "\U0001f600" * MAX_TEXT))[0]
    commit = codec.encode(messages.CommitStep(1, 1, [1 << 50] * (1 << 16), {f"metric {n}": float(n) for n in range(1000)}))[0]
    put = codec.encode(messages.PutChunk("ab" * 32, 1 << 60, 1 << 60))[0]
    assert len(report) < limits.actors(config).frame
    assert len(commit) < limits.learner().frame
    assert len(put) < limits.HEADER_BYTES
    for channel in (limits.control(), limits.actors(config), limits.learner(), limits.blobs(), limits.relay()):
        assert channel.held > 2 * channel.frame


def test_the_room_for_all_is_a_part_of_the_memory_there_is() -> None:
    assert 1 << 24 < limits.room_for_all() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


# --- counting


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_refusal_is_counted_and_one_in_ten_seconds_of_each_kind_is_logged_with_how_many_were_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    turned_away = TurnedAway(logging.getLogger("broker"), clock)
    for number in range(1000):
        turned_away.refuse("actors", "frames", f"from peer {number}")
        turned_away.count("blobs", "answer not taken")
    turned_away.refuse("learner", "frames", "from another")
    assert len(caplog.records) == 2
    clock.now = LOG_SECONDS
    turned_away.refuse("actors", "frames", "x" * 10_000)
    last = caplog.records[-1].getMessage()
    assert "999 more" in last
    assert len(last) < 700
    assert turned_away.counts() == {"actors: frames": 1001, "blobs: answer not taken": 1000, "learner: frames": 1}
