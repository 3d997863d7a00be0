"""Files over real connections: slow ones, cut ones, damaged ones, and ones that are not there."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import zmq

from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.keys import load_key
from broker.pieces import CREDIT
from broker.server import Server
from broker.sockets import Channel
from protocol.errors import BrokerUnreachable, DamagedDelta, RequestRefused
from protocol.messages import CHUNK_BYTES
from protocol.weights import BlobRef

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 60
MakeClient = Callable[..., BlobClient]


@pytest.fixture
def make_client(served: Server, keys: Path) -> Iterator[MakeClient]:
    """Connections to the blobs of the served broker, or to whatever listens at `port`."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[BlobClient] = []

    def make(port: int | None = None, **options: Any) -> BlobClient:
        address = served.address if port is None else f"tcp://127.0.0.1:{port - Channel.BLOBS}"
        made.append(BlobClient(context, address, load_key(keys / "actor.key"), f"a/{len(made)}".encode(), **options))
        return made[-1]

    yield make
    for client in made:
        client.close()
    context.term()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "files")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def beside() -> Iterator[Callable[..., None]]:
    """Runs something in another thread, which has ended when the test has."""
    with ThreadPoolExecutor(1) as pool:
        running: list[Future[None]] = []
        yield lambda job: running.append(pool.submit(job))
        for future in running:
            future.result(DEADLINE_SECONDS)


def blobs_port(served: Server) -> int:
    return int(served.address.rpartition(":")[2]) + Channel.BLOBS


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def put(served: Server, data: bytes) -> BlobRef:
    return served._broker.blobs.add(data)


def names(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.path("x").parent.iterdir())


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 9 * CHUNK_BYTES + 17])
def test_a_blob_arrives_as_a_file_with_its_bytes_and_nothing_else_is_left(
    served: Server, make_client: MakeClient, store: BlobStore, size: int
) -> None:
    data = noise(size)
    blob = put(served, data)
    path = make_client().get(blob, store)
    assert path == store.path(blob.digest)
    assert path.read_bytes() == data
    assert names(store) == [blob.digest]


def test_a_blob_that_is_here_already_is_not_fetched_again(served: Server, make_client: MakeClient, store: BlobStore) -> None:
    blob = put(served, noise(1000))
    client = make_client()
    first = client.get(blob, store)
    served._broker.blobs.remove(blob.digest)
    assert client.get(blob, store) == first


def test_a_file_that_was_cut_short_since_it_came_is_fetched_again(served: Server, make_client: MakeClient, store: BlobStore) -> None:
    data = noise(1000)
    blob = put(served, data)
    store.path(blob.digest).write_bytes(data[:10])  # the power failed before the bytes were on the disk
    assert make_client().get(blob, store).read_bytes() == data


def test_a_slow_link_that_is_cut_again_and_again_carries_the_whole_blob_and_little_of_it_twice(
    served: Server, make_client: MakeClient, make_proxy: Callable[..., Any], store: BlobStore
) -> None:
    data = noise(8 << 20)
    blob = put(served, data)
    cuts = [20_000, 2_500_000, 2_500_000, 2_500_000, 2_500_000]
    proxy = make_proxy(blobs_port(served), cuts=cuts, bytes_per_second=12e6)
    path = make_client(proxy.port).get(blob, store)
    assert path.read_bytes() == data
    assert proxy.num_connections > len(cuts) or proxy.num_cuts >= 3
    assert proxy.num_bytes < len(data) + proxy.num_cuts * 3 * CHUNK_BYTES // 2, "what had arrived is not sent again after a cut"


def test_an_upload_over_a_link_that_is_cut_arrives_whole(
    served: Server, make_client: MakeClient, make_proxy: Callable[..., Any], beside: Callable[..., None]
) -> None:
    data = noise(12 << 20)
    proxy = make_proxy(blobs_port(served), bytes_per_second=60e6)

    def cut_twice() -> None:
        for limit in (2 << 20, 10 << 20):
            proxy.wait_for(limit)
            proxy.cut()

    beside(cut_twice)
    blob = make_client(proxy.port).put(data)
    assert blob == BlobRef(blake3.blake3(data).hexdigest(), len(data))
    assert served._broker.blobs.read(blob.digest) == data
    assert proxy.num_connections >= 3


def test_a_blob_whose_bytes_are_not_what_its_name_says_is_damaged_and_not_kept(
    served: Server, make_client: MakeClient, store: BlobStore
) -> None:
    data = noise(2 * CHUNK_BYTES)
    blob = put(served, data)
    served._broker.blobs.path(blob.digest).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    client = make_client()
    with pytest.raises(DamagedDelta, match="other bytes"):
        client.get(blob, store)
    assert names(store) == []
    served._broker.blobs.path(blob.digest).write_bytes(data)
    assert client.get(blob, store).read_bytes() == data


@pytest.mark.timeout(40)
@pytest.mark.parametrize("size", [0, 5, CHUNK_BYTES + 7])
def test_a_blob_of_another_size_than_announced_is_damaged(served: Server, make_client: MakeClient, store: BlobStore, size: int) -> None:
    data = noise(CHUNK_BYTES)
    blob = put(served, data)
    served._broker.blobs.path(blob.digest).write_bytes(noise(size))
    with pytest.raises(DamagedDelta):
        make_client().get(blob, store)
    assert names(store) == []


def test_a_blob_that_the_store_does_not_have_is_refused(served: Server, make_client: MakeClient, store: BlobStore) -> None:
    client = make_client()
    with pytest.raises(RequestRefused, match="does not have it"):
        client.get(BlobRef("ab" * 32, 10), store)
    blob = put(served, b"after a refusal the connection goes on")
    assert client.get(blob, store).read_bytes() == b"after a refusal the connection goes on"


def test_a_blob_that_is_removed_while_it_is_fetched_is_refused(
    served: Server, make_client: MakeClient, make_proxy: Callable[..., Any], store: BlobStore, beside: Callable[..., None]
) -> None:
    blob = put(served, noise(24 << 20))
    proxy = make_proxy(blobs_port(served), bytes_per_second=12e6)

    def remove() -> None:
        proxy.wait_for(1 << 20)
        served._broker.blobs.remove(blob.digest)

    beside(remove)
    with pytest.raises(RequestRefused, match="does not have it"):
        make_client(proxy.port).get(blob, store)
    assert names(store) == []


def test_a_transfer_ends_when_it_is_given_up(
    served: Server, make_client: MakeClient, make_proxy: Callable[..., Any], store: BlobStore, beside: Callable[..., None]
) -> None:
    blob = put(served, noise(64 << 20))
    proxy = make_proxy(blobs_port(served), bytes_per_second=4e6)
    client = make_client(proxy.port)

    def give_up() -> None:
        proxy.wait_for(1 << 20)
        client.stop()

    beside(give_up)
    with pytest.raises(RequestRefused, match="given up"):
        client.get(blob, store)
    assert names(store) == []


def test_a_store_that_never_answers_is_unreachable(make_client: MakeClient, store: BlobStore, silent_port: int) -> None:
    with pytest.raises(BrokerUnreachable, match="blob"):
        make_client(silent_port, give_up_seconds=0.5).get(BlobRef("ab" * 32, 10), store)
    assert names(store) == []


FETCH = """
import sys
from pathlib import Path
import zmq
from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.keys import load_key
from protocol.weights import BlobRef

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

address, key, folder, small, large, size = sys.argv[1:]
context, store = zmq.Context(), BlobStore(Path(folder))
client = BlobClient(context, address, load_key(Path(key)), b"a/memory")
client.get(BlobRef(small, 1), store)
before = peak()
client.get(BlobRef(large, int(size)), store)
print(peak() - before)
client.close()
context.term()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_large_blob_takes_no_more_memory_than_the_pieces_under_way(served: Server, keys: Path, tmp_path: Path) -> None:
    data = noise(64 << 20)
    small, large = put(served, b"x"), put(served, data)
    arguments = [served.address, str(keys / "actor.key"), str(tmp_path / "files"), small.digest, large.digest, str(large.size)]
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "files" / large.digest).read_bytes() == data
    assert int(done.stdout) < 3 * CREDIT * CHUNK_BYTES
