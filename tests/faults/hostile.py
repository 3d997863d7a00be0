"""Hostile peers: each function attacks a running broker for a while and then goes away.

Started by the test as `python -m tests.faults.hostile ATTACK`, in a process of its own: what it suffers itself is its own affair.
None of them is a client of the project's; what libzmq does for them is greet, encrypt and frame.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import blake3
import zmq

from broker.keys import load_key
from broker.sockets import Channel, endpoint
from deploy.parent import die_with_parent
from protocol import codec, facts, messages
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.messages import CHUNK_BYTES, PROTOCOL_VERSION

ROLE_OF: Final = {Channel.CONTROL: "admin", Channel.ACTORS: "actor", Channel.LEARNER: "learner", Channel.BLOBS: "actor"}
REPLAYS: Final = 10


class Target(NamedTuple):
    """A broker: where it listens, and the directory of its run."""

    address: str
    run: Path


@contextlib.contextmanager
def peer(target: Target, channel: Channel, identity: bytes, role: str | None = "", **changes: Any) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER with the key of `role` (empty: the one that belongs there; None: no key), in a context of its own that is gone afterwards."""
    context: zmq.Context[Any] = zmq.Context()
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    options = {"LINGER": 0, "ROUTING_ID": identity, "RECONNECT_IVL": 10, "RECONNECT_IVL_MAX": 10, "SNDHWM": 1000, "IMMEDIATE": 1}
    for name, value in (options | {name: value for name, value in changes.items() if name.isupper()}).items():
        dealer.setsockopt(getattr(zmq, name), value)
    if role is not None:
        key = load_key(target.run / "keys" / f"{role or ROLE_OF[channel]}.key")
        public, secret = changes.get("pair", (key.public.encode(), key.secret.encode()))
        dealer.curve_publickey, dealer.curve_secretkey = public, secret
        dealer.curve_serverkey = changes.get("broker", key.broker.encode())
    dealer.connect(endpoint(target.address, channel))
    try:
        yield dealer
    finally:
        dealer.close(linger=changes.get("linger", 0))
        context.term()


def send(dealer: zmq.Socket[bytes], frames: list[bytes], until: float) -> bool:
    """Send a message as soon as there is a connection; whether there was one in time."""
    if not dealer.poll(max(0, int((until - time.monotonic()) * 1000)), zmq.POLLOUT):
        return False
    with contextlib.suppress(zmq.Again):
        dealer.send_multipart(frames, zmq.NOBLOCK)
    return True


# --- who is not let in


def strangers(target: Target, until: float) -> None:
    """On every channel: peers without a key, with a key that nobody gave them, with another broker's, and with a key of the run where it does not
    belong."""
    wrong = {Channel.CONTROL: "actor", Channel.ACTORS: "learner", Channel.LEARNER: "admin", Channel.BLOBS: "admin"}
    with contextlib.ExitStack() as stack:
        dealers = []
        for channel in Channel:
            for how in ({"role": None}, {"pair": zmq.curve_keypair()}, {"broker": zmq.curve_keypair()[0]}, {"role": wrong[channel]}):
                dealers += [stack.enter_context(peer(target, channel, b"a/b", **how)) for _ in range(2)]
        _never_heard(dealers, until)


def _never_heard(dealers: list[zmq.Socket[bytes]], until: float) -> None:
    poller = zmq.Poller()
    for dealer in dealers:
        poller.register(dealer, zmq.POLLIN)
        with contextlib.suppress(zmq.Again):
            dealer.send_multipart(codec.encode(messages.GetStatus()), zmq.NOBLOCK)
    assert not poller.poll(max(0, int((until - time.monotonic()) * 1000))), "the broker answered somebody whom it must not let in"


def with_garbage(target: Target, until: float) -> None:
    """Bytes that are no ZMTP, half a greeting, a whole one with garbage behind it, on every channel."""
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE" + bytes(15) + b"\0" + bytes(31)
    openings = [
        b"GET / HTTP/1.1\r\n\r\n" * 20,
        greeting[:11],
        greeting + os.urandom(2000),
        greeting + b"\x04\xc8\x05HELLO" + bytes(194),
        b"",
    ]
    number = 0
    while time.monotonic() < until:
        for channel in Channel:
            number += 1
            with contextlib.suppress(OSError), closing(_connect(target, channel)) as opened:
                opened.sendall(openings[number % len(openings)] or random.Random(number).randbytes(4096))
                opened.settimeout(0.05)
                opened.recv(100)


def saying_nothing(target: Target, until: float, num_connections: int = 3000) -> None:
    """Thousands of connections that never say a word."""
    opened: list[socket.socket] = []
    try:
        for number in range(num_connections):
            with contextlib.suppress(OSError):
                opened.append(_connect(target, Channel(number % 4)))
        time.sleep(max(0.0, until - time.monotonic()))  # the attack itself: to be there and say nothing
    finally:
        for one in opened:
            one.close()


def _connect(target: Target, channel: Channel) -> socket.socket:
    host, _, port = endpoint(target.address, channel).removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=2.0)


# --- who has a key


def oversized_frames(target: Target, until: float) -> None:
    """One frame of 8 MB, again and again, on every channel."""
    frame = bytes(8_000_000)
    _on_every_channel(target, until, lambda dealer: send(dealer, [frame], until))


def messages_of_100_000_frames(target: Target, until: float) -> None:
    """Empty frames, a hundred thousand to a message, on the actors' channel."""
    with peer(target, Channel.ACTORS, b"evil/1", linger=1000, SNDHWM=2) as dealer:
        while time.monotonic() < until and send(dealer, [b""] * 100_000, until):
            pass


def endless_messages(target: Target, until: float) -> None:
    """Messages of 200 MB in frames of a size that is allowed, on one channel after the other, until each has cut the connection. Libzmq sends
    nothing of a message before its end is there, so these have one; whoever waits for it cannot tell."""
    for channel in Channel:
        with peer(target, channel, b"evil/1", SNDHWM=1) as dealer:
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            send(dealer, [bytes(60_000)] * 3500, until + 10)
            assert monitor.poll(20_000), f"the {channel.name.lower()} channel took all of it"
            dealer.disable_monitor()
            monitor.close(linger=0)


def endless_messages_of_tiny_frames(target: Target, until: float) -> None:
    """The same with one byte a frame, which costs most memory for each byte on the wire."""
    with peer(target, Channel.ACTORS, b"evil/1", linger=1000, SNDHWM=2) as dealer:
        while time.monotonic() < until and send(dealer, [b"x"] * 500_000, until):
            pass


def malformed_messages(target: Target, until: float) -> None:
    """Messages that nobody can decode, as fast as they will go, on every channel."""
    wrong = [[b""], [b"\xff" * 100, b""], [b"x"] * 3, [b"\x81\xa4type\xa3No!", b""], [b"\xdd\xff\xff\xff\xff", b""]]
    _on_every_channel(target, until, lambda dealer: all(send(dealer, frames, until) for frames in wrong))


def heartbeats(target: Target, until: float, per_second: int = 10_000) -> None:
    """Reports of an actor, ten thousand a second, whose answers are never read."""
    frames = codec.encode(messages.ActorReport(-1, 0, [], 0.0, 0.0, 0, "flooding"))
    with peer(target, Channel.ACTORS, b"evil-1/e") as dealer:
        send(dealer, codec.encode(messages.ActorHello(PROTOCOL_VERSION, "evil-1", "e", "none", "nowhere", 1, [])), until)
        begun, number = time.monotonic(), 0
        while (now := time.monotonic()) < until:
            for _ in range(number, int((now - begun) * per_second)):
                number += 1
                send(dealer, frames, until)
            dealer.poll(1)
        send(dealer, codec.encode(messages.ActorBye()), until + 1)
        dealer.poll(100)


def blobs_never_read(target: Target, until: float, num_peers: int = 1) -> None:
    """Asks for a file of a mebibyte again and again, and never reads an answer."""
    data = random.Random(1).randbytes(CHUNK_BYTES)
    digest = blake3.blake3(data).hexdigest()
    with peer(target, Channel.BLOBS, b"giver/1") as dealer:
        send(dealer, codec.encode(messages.PutChunk(digest, len(data), 0), data), until)
        assert dealer.poll(10_000), "the file was not taken"
    frames = codec.encode(messages.GetChunk(digest, 0))
    with contextlib.ExitStack() as stack:
        dealers = [stack.enter_context(peer(target, Channel.BLOBS, b"deaf/%d" % n, RCVHWM=1, RCVBUF=65536)) for n in range(num_peers)]
        while time.monotonic() < until:
            for dealer in dealers:
                for _ in range(20):
                    send(dealer, frames, time.monotonic() + 0.02)
            dealers[0].poll(10, zmq.POLLERR)


def _on_every_channel(target: Target, until: float, attack: Callable[[zmq.Socket[bytes]], object]) -> None:
    with contextlib.ExitStack() as stack:
        dealers = [stack.enter_context(peer(target, channel, b"evil/1", SNDHWM=2)) for channel in Channel]
        while time.monotonic() < until:
            for dealer in dealers:
                attack(dealer)


# --- who repeats what others have said


def replays(target: Target, until: float) -> None:
    """Old results, commits and publications of a run, each ten times: as another epoch or session, and as the very one that sent them."""
    with closing(open_read_only(target.run / JOURNAL_NAME)) as journal:
        recorded = [entry.fact for entry in read_facts(journal, target.run / JOURNAL_NAME)]
        rows = journal.execute("SELECT actor, epoch, ticket, attempt, payload FROM groups ORDER BY lsn LIMIT 6").fetchall()
    numbers = {(fact.ticket, fact.attempt): fact.seq for fact in recorded if isinstance(fact, facts.GroupAccepted)}
    session = next(fact.session for fact in reversed(recorded) if isinstance(fact, facts.LearnerStarted))
    said = [message for fact in recorded[:200] for message in _of_the_learner(fact)]
    for identity in (b"learner/other", f"replayer/{session}".encode()):
        with peer(target, Channel.LEARNER, identity) as dealer:
            for message in said:
                for _ in range(REPLAYS):
                    send(dealer, codec.encode(message), until)
            _drain(dealer)
    for number, (actor, epoch, ticket, attempt, payload) in enumerate(rows):
        # Under the very name it takes the honest one's connection, which that one then takes back; once is enough.
        for name in (f"{actor}/other", f"replayer-9/{epoch}", *([f"{actor}/{epoch}"] if number == 0 else [])):
            with peer(target, Channel.ACTORS, name.encode()) as dealer:
                for _ in range(REPLAYS):
                    seq = numbers[ticket, attempt]
                    send(dealer, codec.encode(messages.SubmitGroup(seq, ticket, attempt), payload), until)
                _drain(dealer)


def _drain(dealer: zmq.Socket[bytes]) -> None:
    while dealer.poll(50):
        dealer.recv_multipart()


def _of_the_learner(fact: facts.AnyFact) -> list[messages.Message]:
    match fact:
        case facts.StepCommitted():
            metrics = {name: value for name, value in fact.metrics.items() if value is not None}
            return [messages.CommitStep(fact.step, fact.batch, fact.lags, metrics)]
        case facts.VersionPublished():
            return [
                messages.Publish(
                    fact.version,
                    fact.parent,
                    fact.delta,
                    fact.snapshot,
                    fact.full_bytes,
                    fact.bound_bytes,
                    fact.compact,
                    fact.is_base,
                    fact.seconds,
                )
            ]
    return []


def main() -> None:
    """The process: it says that it is ready, attacks once it is told to, and again and again until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("attack")
    for name in ("--address", "--run"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seconds", required=True, type=float)
    parser.add_argument("--parent", required=True, type=int)
    given = parser.parse_args()
    die_with_parent(given.parent)
    attack: Callable[[Target, float], None] = globals()[given.attack]
    target = Target(given.address, Path(given.run))
    os.write(1, b"ready\n")
    os.read(0, 1)
    attack(target, time.monotonic() + given.seconds)
    while not select.select([0], [], [], 0)[0]:
        attack(target, time.monotonic() + given.seconds)


if __name__ == "__main__":
    main()
