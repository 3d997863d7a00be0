"""A relay and the actors beside it: each file crosses to the site once, to those with the same key only, and never with other bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.downloads import KEPT_SECONDS, NUM_RELAYED, Downloads, Sources
from broker.keys import KeyFile, load_key, make_keys
from broker.relay import Relay
from broker.server import Server
from broker.sockets import Channel, client_socket, send_or_drop
from protocol import codec, messages
from protocol.errors import AddressInUse, BrokerUnreachable, DamagedDelta, RequestRefused
from protocol.weights import BlobRef

DEADLINE_SECONDS = 30
NOWHERE = "tcp://127.0.0.1:1"
MakeDownloads = Callable[..., Downloads]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng([size, seed]).bytes(size)


def ref(data: bytes) -> BlobRef:
    return BlobRef(blake3.blake3(data).hexdigest(), len(data))


def proxied(served: Server, make_proxy: Callable[..., Any], **options: Any) -> tuple[Any, str]:
    """A proxy in front of the broker's blobs, and the broker's address by it."""
    proxy = make_proxy(int(served.address.rpartition(":")[2]) + Channel.BLOBS, **options)
    return proxy, f"tcp://127.0.0.1:{proxy.port - Channel.BLOBS}"


@pytest.fixture
def key(keys: Path) -> KeyFile:
    return load_key(keys / "actor.key")


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.term()


@pytest.fixture
def make_downloads(served: Server, key: KeyFile, context: zmq.Context[Any], tmp_path: Path) -> Iterator[MakeDownloads]:
    """The files of one actor after another, each with a cache of its own unless told otherwise."""
    made: list[Downloads] = []

    def make(address: str | None = None, *, relay: str | None = None, serve: str | None = None, cache: Path | None = None) -> Downloads:
        number = len(made)
        sources = Sources(relay, serve, cache or tmp_path / f"cache-{number}")
        made.append(Downloads(context, address or served.address, key, f"actor-{number}/e".encode(), sources))
        return made[-1]

    yield make
    for downloads in made:
        downloads.stop()
        downloads.close()


class Slow:
    """Where a relay gets its files: each comes when the test says so."""

    def __init__(self) -> None:
        self.asked: dict[str, Future[Any]] = {}
        self.num_asked = 0

    def obtain(self, blob: BlobRef) -> Future[Any]:
        self.num_asked += 1
        return self.asked.setdefault(blob.digest, Future())


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """What a bare relay has."""
    return BlobStore(tmp_path / "relay")


@pytest.fixture
def relay(key: KeyFile, store: BlobStore, slow: Slow) -> Iterator[Relay]:
    relay = Relay("tcp://127.0.0.1:0", key, [store], slow.obtain)
    relay.start()
    yield relay
    relay.stop()


@pytest.fixture
def ask(relay: Relay, key: KeyFile, context: zmq.Context[Any]) -> Iterator[zmq.Socket[bytes]]:
    """A neighbour's bare connection to the relay."""
    socket = client_socket(context, relay.address, Channel.BLOBS, key._replace(broker=key.public), b"neighbour/e")
    socket.connect(relay.address)
    assert socket.poll(DEADLINE_SECONDS * 1000, zmq.POLLOUT)
    yield socket
    socket.close(linger=0)


def answer(socket: zmq.Socket[bytes]) -> tuple[messages.ToBlobClient, bytes]:
    assert socket.poll(DEADLINE_SECONDS * 1000), "no answer and no sign of life"
    message, payload = codec.to_blob_client.decode(socket.recv_multipart())
    return message, bytes(payload)


# --- neighbours


def test_however_many_neighbours_ask_at_once_the_broker_serves_each_file_once(
    served: Server, make_downloads: MakeDownloads, make_proxy: Callable[..., Any]
) -> None:
    files = [noise(1_000_000, seed) for seed in range(3)]
    blobs = [served._broker.blobs.add(data) for data in files]
    proxy, address = proxied(served, make_proxy, bytes_per_second=8e6)
    relay = make_downloads(address, serve="tcp://127.0.0.1:0")
    neighbours = [make_downloads(NOWHERE, relay=relay.served_at) for _ in range(4)]
    coming = [(downloads.start(blob), data) for blob, data in zip(blobs, files, strict=True) for downloads in [*neighbours, relay]]
    for future, data in coming:
        assert future.result(DEADLINE_SECONDS).read_bytes() == data
    assert proxy.num_bytes < 1.3 * sum(map(len, files)), "a file crossed the slow link twice"


def test_a_relay_may_itself_have_a_relay(served: Server, make_downloads: MakeDownloads) -> None:
    data = noise(300_000)
    blob = served._broker.blobs.add(data)
    first = make_downloads(serve="tcp://127.0.0.1:0")
    second = make_downloads(NOWHERE, relay=first.served_at, serve="tcp://127.0.0.1:0")
    third = make_downloads(NOWHERE, relay=second.served_at)
    assert third.start(blob).result(DEADLINE_SECONDS).read_bytes() == data


def test_an_actor_without_a_relay_gets_its_files_from_the_broker(served: Server, make_downloads: MakeDownloads) -> None:
    data = noise(300_000)
    downloads = make_downloads()
    assert downloads.served_at == ""
    assert downloads.start(served._broker.blobs.add(data)).result(DEADLINE_SECONDS).read_bytes() == data


def test_a_file_that_the_broker_does_not_have_is_refused_through_the_relay_too(make_downloads: MakeDownloads) -> None:
    relay = make_downloads(serve="tcp://127.0.0.1:0")
    neighbour = make_downloads(relay=relay.served_at)
    with pytest.raises(RequestRefused, match="does not have it"):
        neighbour.start(BlobRef("ab" * 32, 10)).result(DEADLINE_SECONDS)


def test_an_address_that_is_taken_is_said_so(make_downloads: MakeDownloads, key: KeyFile, store: BlobStore, slow: Slow) -> None:
    relay = make_downloads(serve="tcp://127.0.0.1:0")
    with pytest.raises(AddressInUse):
        Relay(relay.served_at, key, [store], slow.obtain)


# --- who is let in


def test_another_actor_key_is_refused_and_so_is_none(
    relay: Relay, key: KeyFile, store: BlobStore, context: zmq.Context[Any], tmp_path: Path
) -> None:
    blob = store.add(b"weights")
    make_keys(tmp_path / "others")
    other = load_key(tmp_path / "others" / "actor.key")
    socket = client_socket(context, relay.address, Channel.BLOBS, other._replace(broker=key.public), b"stranger/e")
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    socket.connect(relay.address)
    assert monitor.poll(DEADLINE_SECONDS * 1000)
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert not socket.poll(0, zmq.POLLOUT)
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)
    plain = context.socket(zmq.DEALER)
    plain.connect(relay.address)
    plain.send_multipart(codec.encode(messages.GetChunk(blob.digest, 0, 10, blob.size)))
    assert not plain.poll(200)
    plain.close(linger=0)
    with pytest.raises(BrokerUnreachable):
        client = BlobClient(context, relay.address, other, b"stranger/e", relay=True, give_up_seconds=0.5)
        try:
            client.get(blob, BlobStore(tmp_path / "files"))
        finally:
            client.close()
    assert relay.num_bytes == 0


# --- relays that fail


def test_a_relay_that_is_not_there_is_passed_over(served: Server, make_downloads: MakeDownloads, monkeypatch: Any) -> None:
    monkeypatch.setattr("broker.downloads.RELAY_SECONDS", 0.5)
    data = noise(300_000)
    blob = served._broker.blobs.add(data)
    assert make_downloads(relay=NOWHERE).start(blob).result(DEADLINE_SECONDS).read_bytes() == data


def test_a_relay_that_dies_in_the_middle_of_a_file_is_passed_over(
    served: Server, make_downloads: MakeDownloads, make_proxy: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("broker.downloads.RELAY_SECONDS", 1.0)
    data = noise(4_000_000)
    blob = served._broker.blobs.add(data)
    relay = make_downloads(serve="tcp://127.0.0.1:0")
    relay.start(blob).result(DEADLINE_SECONDS)
    slow_link = make_proxy(int(relay.served_at.rpartition(":")[2]), bytes_per_second=2e6)
    coming = make_downloads(relay=f"tcp://127.0.0.1:{slow_link.port}").start(blob)
    slow_link.wait_for(1_000_000)
    relay.stop()
    slow_link.cut()
    assert coming.result(DEADLINE_SECONDS).read_bytes() == data


def test_a_relay_that_cannot_reach_the_broker_is_passed_over(
    served: Server, make_downloads: MakeDownloads, relay: Relay, slow: Slow
) -> None:
    data = noise(300_000)
    blob = served._broker.blobs.add(data)
    gone: Future[Any] = Future()
    gone.set_exception(BrokerUnreachable("tcp://far:1", 300, "blob"))
    slow.asked[blob.digest] = gone
    assert make_downloads(relay=relay.address).start(blob).result(DEADLINE_SECONDS).read_bytes() == data
    assert slow.num_asked >= 1


@pytest.mark.parametrize("wrong", [noise(300_000, 1), noise(10, 1), b""])
def test_wrong_bytes_of_a_relay_are_never_handed_out(
    served: Server, make_downloads: MakeDownloads, relay: Relay, store: BlobStore, wrong: bytes
) -> None:
    data = noise(300_000)
    blob = served._broker.blobs.add(data)
    store.path(blob.digest).write_bytes(wrong)
    neighbour = make_downloads(relay=relay.address)
    assert neighbour.start(blob).result(DEADLINE_SECONDS).read_bytes() == data


def test_a_client_of_a_relay_with_wrong_bytes_says_that_they_are_damaged(
    relay: Relay, store: BlobStore, key: KeyFile, context: zmq.Context[Any], tmp_path: Path
) -> None:
    blob = ref(noise(300_000))
    store.path(blob.digest).write_bytes(noise(300_000, 1))
    client = BlobClient(context, relay.address, key, b"neighbour/e", relay=True)
    with pytest.raises(DamagedDelta):
        client.get(blob, BlobStore(tmp_path / "files"))
    client.close()


# --- the relay's answers


def test_whoever_waits_hears_that_a_file_is_coming_and_then_gets_it(
    relay: Relay, ask: zmq.Socket[bytes], slow: Slow, store: BlobStore
) -> None:
    data = b"weights"
    blob = ref(data)
    ask.send_multipart(codec.encode(messages.GetChunk(blob.digest, 2, 3, blob.size)))
    for _ in range(2):
        assert answer(ask) == (messages.Chunk(blob.digest, 2, blob.size), b"")
    store.add(data)
    slow.asked[blob.digest].set_result(None)
    while (found := answer(ask)) == (messages.Chunk(blob.digest, 2, blob.size), b""):
        pass
    assert found == (messages.Chunk(blob.digest, 2, blob.size), data[2:5])
    assert slow.num_asked == 1
    assert relay.num_bytes == 3


def test_a_sign_of_life_keeps_a_neighbour_waiting_and_is_never_taken_for_a_piece(
    relay: Relay, key: KeyFile, context: zmq.Context[Any], tmp_path: Path
) -> None:
    blob = ref(noise(100_000))
    client = BlobClient(context, relay.address, key, b"neighbour/e", relay=True, give_up_seconds=1.5 * messages.HEARTBEAT_SECONDS)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(client.get, blob, BlobStore(tmp_path / "files"))
        with pytest.raises(TimeoutError):
            coming.result(2.5 * messages.HEARTBEAT_SECONDS)
        client.stop()
        assert isinstance(coming.exception(DEADLINE_SECONDS), RequestRefused)
    client.close()
    assert not (tmp_path / "files" / blob.digest).exists()


def test_what_cannot_be_had_is_refused_with_the_reason(relay: Relay, ask: zmq.Socket[bytes], slow: Slow) -> None:
    for number, (error, reason) in enumerate(
        [(RequestRefused("blob", "the store does not have it"), "does not have it"), (OSError("disk"), "could not fetch it")]
    ):
        blob = ref(b"%d" % number)
        slow.asked[blob.digest] = Future()
        slow.asked[blob.digest].set_exception(error)
        ask.send_multipart(codec.encode(messages.GetChunk(blob.digest, 0, 1, 1)))
        while isinstance(found := answer(ask)[0], messages.Chunk):
            pass
        assert isinstance(found, messages.BlobRefused)
        assert reason in found.reason


def test_a_relay_takes_no_files_and_goes_on_after_garbage(ask: zmq.Socket[bytes], store: BlobStore) -> None:
    blob = store.add(b"weights")
    ask.send_multipart(codec.encode(messages.PutChunk("ab" * 32, 3, 0), b"abc"))
    message, _ = answer(ask)
    assert message == messages.BlobRefused("ab" * 32, "a relay takes no files")
    for frames in ([b""], [b"\xff" * 100, b""], [b"x"] * 5, [b"x"] * 1000):
        ask.send_multipart(frames)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not ask.poll(200):  # the connection was cut after three of these, and a question may have gone down with it
        assert time.monotonic() < deadline
        send_or_drop(ask, codec.encode(messages.GetChunk(blob.digest, 0, 7, 7)))
    assert answer(ask) == (messages.Chunk(blob.digest, 0, 7), b"weights")


# --- what is kept


def test_an_actor_that_is_no_relay_keeps_nothing_that_it_does_not_need(served: Server, make_downloads: MakeDownloads) -> None:
    downloads = make_downloads()
    blob = served._broker.blobs.add(b"delta")
    path = downloads.start(blob).result(DEADLINE_SECONDS)
    downloads.forget(blob)
    assert not path.exists()


def test_a_relay_keeps_the_last_files_for_its_neighbours(served: Server, make_downloads: MakeDownloads) -> None:
    downloads = make_downloads(serve="tcp://127.0.0.1:0")
    paths = []
    for number in range(NUM_RELAYED + 2):
        blob = served._broker.blobs.add(b"delta %d" % number)
        paths.append(downloads.start(blob).result(DEADLINE_SECONDS))
        downloads.forget(blob)
    assert [path.exists() for path in paths] == [False, False] + [True] * NUM_RELAYED


def test_a_relay_does_not_keep_for_ever_what_only_its_neighbours_wanted(served: Server, make_downloads: MakeDownloads) -> None:
    relay = make_downloads(serve="tcp://127.0.0.1:0")
    neighbour = make_downloads(NOWHERE, relay=relay.served_at)
    for number in range(NUM_RELAYED + 8):
        blob = served._broker.blobs.add(b"delta %d" % number)
        neighbour.start(blob).result(DEADLINE_SECONDS)
    assert len(list(relay._passing.path("x").parent.iterdir())) <= NUM_RELAYED + 1


def test_a_file_that_the_relay_itself_still_needs_stays_whatever_its_neighbours_want(served: Server, make_downloads: MakeDownloads) -> None:
    relay = make_downloads(serve="tcp://127.0.0.1:0")
    neighbour = make_downloads(NOWHERE, relay=relay.served_at)
    needed = served._broker.blobs.add(b"needed")
    path = relay.start(needed).result(DEADLINE_SECONDS)
    neighbour.start(needed).result(DEADLINE_SECONDS)
    for number in range(NUM_RELAYED + 8):
        neighbour.start(served._broker.blobs.add(b"delta %d" % number)).result(DEADLINE_SECONDS)
    assert path.read_bytes() == b"needed"
    relay.forget(needed)
    for number in range(NUM_RELAYED + 8):
        neighbour.start(served._broker.blobs.add(b"later %d" % number)).result(DEADLINE_SECONDS)
    assert not path.exists()


def test_the_files_of_the_policy_are_kept_between_runs_until_nobody_has_used_them_for_long(
    served: Server, make_downloads: MakeDownloads, tmp_path: Path
) -> None:
    cache = tmp_path / "shared cache"
    policy = served._broker.blobs.add(b"policy")
    first = make_downloads(cache=cache)
    first.keep([policy])
    path = first.start(policy).result(DEADLINE_SECONDS)
    first.forget(policy)
    assert path.parent == cache
    served._broker.blobs.remove(policy.digest)
    second = make_downloads(cache=cache)
    second.keep([policy])
    assert second.start(policy).result(DEADLINE_SECONDS).read_bytes() == b"policy"
    long_ago = time.time() - KEPT_SECONDS - 10
    os.utime(path, (long_ago, long_ago))
    make_downloads(cache=cache)
    assert not path.exists()


def test_files_that_pass_through_are_gone_with_the_actor(served: Server, key: KeyFile, context: zmq.Context[Any], tmp_path: Path) -> None:
    downloads = Downloads(context, served.address, key, b"a/e", Sources(cache=tmp_path / "cache"))
    path = downloads.start(served._broker.blobs.add(b"delta")).result(DEADLINE_SECONDS)
    downloads.stop()
    downloads.close()
    assert not path.parent.exists()


def test_stopping_gives_up_what_is_under_way(
    served: Server, key: KeyFile, context: zmq.Context[Any], make_proxy: Callable[..., Any], tmp_path: Path
) -> None:
    proxy, address = proxied(served, make_proxy, bytes_per_second=1e6)
    downloads = Downloads(context, address, key, b"a/e", Sources(cache=tmp_path / "cache"))
    coming = [downloads.start(served._broker.blobs.add(noise(32 << 20, seed))) for seed in range(2)]
    proxy.wait_for(200_000)
    downloads.stop()
    downloads.close()
    assert isinstance(coming[0].exception(DEADLINE_SECONDS), RequestRefused)
    assert coming[1].cancelled()
