"""How an actor gets to the newest weights, and what it does when a file does not lead there."""

from __future__ import annotations

import blake3
import numpy as np
import pytest

from actor.weights import HeldWeights
from protocol.delta import encode_delta, encode_snapshot
from protocol.errors import PeerError, RequestRefused, WeightsError
from protocol.messages import Route
from protocol.weights import BlobRef, PolicyVersion, Tensor, Weights, root_hash


def make_weights(number: int) -> Weights:
    """Weights that differ a little from version to version."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 16, 400, dtype=np.uint16)
    bits[:number] += 1
    return {"layer": Tensor("BF16", (20, 20), bits)}


def make_version(number: int) -> PolicyVersion:
    return PolicyVersion(number, 2 * number, 0, root_hash(make_weights(number)))


class RoutingPort:
    """The part of a broker that knows versions 0..newest and gives out scripted routes."""

    def __init__(self) -> None:
        self.routes: list[Route] = []
        self.asked: list[int] = []
        self.fetched = 0
        self._blobs: dict[str, bytes] = {}

    def snapshot(self, number: int) -> BlobRef:
        return self.store(encode_snapshot("run", make_weights(number), make_version(number)))

    def delta(self, old: int, new: int) -> BlobRef:
        return self.store(encode_delta("run", make_weights(old), make_weights(new), make_version(old), make_version(new)))

    def store(self, data: bytes) -> BlobRef:
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self._blobs[ref.digest] = data
        return ref

    def plan(self, held: int, newest: int | None, *blobs: BlobRef) -> None:
        """The answer to the next question for a route."""
        self.routes.append(Route(held, None if newest is None else make_version(newest), list(blobs)))

    async def route(self, held: int) -> Route:
        self.asked.append(held)
        return self.routes.pop(0)

    async def fetch(self, blob: BlobRef) -> bytes:
        self.fetched += 1
        if blob.digest not in self._blobs:
            raise RequestRefused("blob", "gone")
        return self._blobs[blob.digest]


async def holding(port: RoutingPort, number: int) -> HeldWeights:
    """Held weights that have arrived at version `number` by a snapshot."""
    held = HeldWeights(port)
    port.plan(-1, number, port.snapshot(number))
    await held.advance()
    port.asked.clear()
    return held


async def test_at_first_nothing_is_held() -> None:
    held = HeldWeights(RoutingPort())
    assert held.version is None
    assert held.number == -1


async def test_a_snapshot_leads_to_the_first_version() -> None:
    port = RoutingPort()
    held = HeldWeights(port)
    port.plan(-1, 3, port.snapshot(3))
    found = await held.advance()
    assert found is not None
    version, weights = found
    assert port.asked == [-1]
    assert version == held.version == make_version(3)
    assert root_hash(weights) == version.root


async def test_a_route_of_several_deltas_is_followed_to_its_end() -> None:
    port = RoutingPort()
    held = await holding(port, 1)
    port.plan(1, 6, port.delta(1, 2), port.delta(2, 5), port.delta(5, 6))
    found = await held.advance()
    assert found is not None
    assert port.asked == [1]
    assert found[0] == make_version(6)
    assert root_hash(found[1]) == make_version(6).root
    assert held.number == 6


async def test_a_snapshot_followed_by_deltas_leads_there_as_well() -> None:
    port = RoutingPort()
    held = HeldWeights(port)
    port.plan(-1, 4, port.snapshot(2), port.delta(2, 4))
    found = await held.advance()
    assert found is not None
    assert root_hash(found[1]) == make_version(4).root


@pytest.mark.parametrize("newest", [None, 3])
async def test_with_nothing_newer_nothing_is_fetched_and_what_is_held_stays(newest: int | None) -> None:
    port = RoutingPort()
    held = await holding(port, 3)
    fetched = port.fetched
    port.plan(3, newest)
    assert await held.advance() is None
    assert held.number == 3
    assert port.fetched == fetched


def bad_routes(port: RoutingPort) -> dict[str, list[BlobRef]]:
    """Routes from version 1 that do not lead to version 3."""
    good = encode_delta("run", make_weights(1), make_weights(3), make_version(1), make_version(3))
    lying = encode_delta("run", make_weights(1), make_weights(2), make_version(1), make_version(3))
    return {
        "no files": [],
        "not a file": [port.store(b"not a weight file")],
        "damaged": [port.store(good[:-3])],
        "from another parent": [port.delta(2, 3)],
        "to another version": [port.delta(1, 2)],
        "a wrong root": [port.store(lying)],
        "ends early": [port.delta(1, 2), port.delta(1, 3)],
    }


BAD = sorted(bad_routes(RoutingPort()))


@pytest.mark.parametrize("kind", BAD)
async def test_a_route_that_leads_nowhere_is_left_for_a_snapshot(kind: str) -> None:
    port = RoutingPort()
    held = await holding(port, 1)
    port.plan(1, 3, *bad_routes(port)[kind])
    port.plan(-1, 3, port.snapshot(3))
    found = await held.advance()
    assert port.asked == [1, -1]
    assert found is not None
    assert found[0] == held.version == make_version(3)
    assert root_hash(found[1]) == make_version(3).root


@pytest.mark.parametrize("kind", BAD)
async def test_when_the_snapshot_fails_too_the_error_is_raised_and_nothing_is_held(kind: str) -> None:
    port = RoutingPort()
    held = await holding(port, 1)
    port.plan(1, 3, *bad_routes(port)[kind])
    port.plan(-1, 3, port.snapshot(2))
    with pytest.raises(WeightsError):
        await held.advance()
    assert held.version is None
    assert held.number == -1
    # The next attempt starts from nothing and may succeed.
    port.plan(-1, 3, port.snapshot(3))
    assert await held.advance() is not None
    assert port.asked == [1, -1, -1]


async def test_a_first_snapshot_that_is_damaged_is_asked_for_once_more() -> None:
    port = RoutingPort()
    held = HeldWeights(port)
    port.plan(-1, 3, port.store(b"damaged"))
    port.plan(-1, 3, port.snapshot(3))
    assert await held.advance() is not None
    assert held.number == 3


async def test_a_broker_that_does_not_answer_is_no_reason_to_drop_what_is_held() -> None:
    port = RoutingPort()
    held = await holding(port, 1)
    port.plan(1, 3, BlobRef("0" * 64, 5))
    with pytest.raises(PeerError):
        await held.advance()
    assert held.number == 1
    port.plan(1, 3, port.delta(1, 3))
    found = await held.advance()
    assert found is not None
    assert root_hash(found[1]) == make_version(3).root
