"""Real weights of a few hundred elements, as trees of versions with the files between them; and brokers on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from broker.core import Broker
from broker.keys import allowed_keys, load_key, make_keys
from broker.server import Server, Wakeup
from protocol import safetensors_file
from protocol.base import round_to_bf16
from protocol.config import parse_config
from protocol.delta import apply_file, encode_delta, encode_snapshot
from protocol.groups import FULL, Group, encode_group
from protocol.weights import PolicyVersion, Tensor, Weights, root_hash

DEADLINE_SECONDS = 20


def full_group(group_size: int, max_tokens: int, *, ticket: int = 0, prompt: int = 0, seed: int = 0, prompt_tokens: int = 1) -> bytes:
    """The payload of a group whose completions all use their whole budget, sampled from version 0."""
    total = group_size * max_tokens
    return encode_group(
        Group(
            ticket=ticket,
            prompt=prompt,
            seed=seed,
            actor="a",
            engine="fake",
            prompt_ids=np.ones(prompt_tokens, np.int32),
            num_tokens=np.full(group_size, max_tokens, np.int32),
            token_ids=np.full(total, ticket, np.int32),
            logprobs=np.full(total, -1.0, np.float32),
            versions=np.zeros(total, np.int32),
            rewards=np.linspace(0.0, 1.0, group_size, dtype=np.float32),
            finish=np.full(group_size, FULL, np.uint8),
        )
    )


class Tree:
    """Versions of small weights; each is a few changed elements away from its parent."""

    def __init__(self, run: str = "contract", size: int = 300) -> None:
        self.run, self._size = run, size
        self._random = np.random.default_rng(7)
        self.weights: dict[int, Weights] = {}
        self.versions: dict[int, PolicyVersion] = {}
        values = self._random.standard_normal(size).astype(np.float32)
        self.policy_file = safetensors_file.serialize(
            {"one": Tensor("F32", (size,), values.view(np.uint32)), "other": Tensor("BF16", (2, 3), np.arange(6, dtype=np.uint16))}, {}
        )
        self.base: Weights = {
            "one": Tensor("BF16", (size,), round_to_bf16(values)),
            "other": Tensor("BF16", (2, 3), np.arange(6, dtype=np.uint16)),
        }

    def root(self, number: int = 0, step: int = 0) -> PolicyVersion:
        """A version with the weights of the base."""
        return self._add(number, step, 0, self.base)

    def child(self, parent: int, number: int, step: int = 0, lineage: int = 0) -> PolicyVersion:
        """A version with a few elements other than its parent's."""
        bits = self.weights[parent]["one"].bits.copy()
        for index in self._random.integers(0, self._size, 5):
            bits[index] += np.uint16(self._random.integers(1, 4))
        return self._add(number, step, lineage, self.weights[parent] | {"one": Tensor("BF16", (self._size,), bits)})

    def delta(self, parent: int, number: int, *, classes: bool = False) -> bytes:
        """The file from a version to another."""
        ends = (self.versions[parent], self.versions[number])
        return encode_delta(self.run, self.weights[parent], self.weights[number], *ends, classes=classes)[0]

    def snapshot(self, number: int) -> bytes:
        """The file with the whole of a version."""
        return encode_snapshot(self.run, self.weights[number], self.versions[number])

    def follow(self, start: Weights | None, files: Sequence[bytes]) -> str:
        """The root hash after applying files, each verified against the root that it claims."""
        held = start
        for data in files:
            header, held = apply_file(data, held, "" if held is None else root_hash(held))
            assert root_hash(held) == header.new_root
        assert held is not None
        return root_hash(held)

    def _add(self, number: int, step: int, lineage: int, weights: Weights) -> PolicyVersion:
        self.weights[number] = weights
        self.versions[number] = PolicyVersion(number, step, lineage, root_hash(weights))
        return self.versions[number]


@pytest.fixture
def make_tree() -> Callable[..., Tree]:
    """A tree of versions without any version."""
    return Tree


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the keys of a run."""
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def served(tmp_path: Path, keys: Path) -> Iterator[Server]:
    """A broker without any version, served on loopback by a thread."""
    broker = Broker(tmp_path / "run", "frames", parse_config({}), 16, [], time.monotonic(), time.time())
    server = Server(broker, "tcp://127.0.0.1:0", load_key(keys / "broker.key"), allowed_keys(keys), Wakeup())
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.stop()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


class Proxy(threading.Thread):
    """A TCP proxy that carries so much at a time, and cuts connections after so many bytes towards the client, one limit after the other."""

    def __init__(self, host: str, port: int, cuts: Sequence[int], bytes_per_second: float) -> None:
        super().__init__(name="proxy", daemon=True)
        self._target, self._rate = (host, port), bytes_per_second
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_connections = self.num_cuts = self.num_bytes = 0
        self._stopped, self._carried = threading.Event(), threading.Condition()
        self._open: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self.num_connections += 1
                self._open += [near, far]
                for source, sink, back in ((near, far, False), (far, near, True)):
                    self._pumps.append(threading.Thread(target=self._pump, args=(source, sink, back), daemon=True))
                    self._pumps[-1].start()

    def wait_for(self, num_bytes: int) -> None:
        """Wait until so much has been carried, both ways together."""
        with self._carried:
            assert self._carried.wait_for(lambda: self.num_bytes >= num_bytes, DEADLINE_SECONDS)

    def cut(self) -> None:
        """Cut all connections now."""
        for opened in self._open:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join(DEADLINE_SECONDS)
        self.cut()
        for pump in self._pumps:
            pump.join(DEADLINE_SECONDS)
        for opened in self._open:
            opened.close()

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                sink.sendall(data)
                carried += len(data)
                with self._carried:
                    self.num_bytes += len(data)
                    self._carried.notify_all()
                if back and self._cuts and carried >= self._cuts[0]:
                    self._cuts.pop(0)
                    self.num_cuts += 1
                    break
                if self._rate < float("inf"):
                    self._stopped.wait(len(data) / self._rate)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., Proxy]]:
    """Proxies in front of a port on loopback, stopped afterwards."""
    made: list[Proxy] = []

    def make(port: int, cuts: Sequence[int] = (), bytes_per_second: float = float("inf")) -> Proxy:
        made.append(Proxy("127.0.0.1", port, cuts, bytes_per_second))
        made[-1].start()
        return made[-1]

    yield make
    for proxy in made:
        proxy.stop()
