"""How an actor gets to the newest weights, and what it does when a file or its own copy does not lead there."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np
import pytest
import zstandard

from actor.shadow import StagedWeights
from actor.weights import ATTEMPTS, HeldWeights
from protocol import safetensors_file
from protocol.chunks import CHUNK_ELEMENTS
from protocol.delta import ShardWriter, assemble, encode_delta, encode_shard, encode_snapshot
from protocol.errors import BrokerUnreachable, DamagedDelta, RequestRefused, RootMismatch, ShadowLost, WeightsError, WrongParent
from protocol.messages import NamedBlob, Route
from protocol.ulps import find_changes
from protocol.weights import BlobRef, PolicyVersion, Tensor, Weights, root_hash

DEADLINE = 30.0
SHAPE = (20, 20)


def make_weights(number: int) -> Weights:
    """Weights that differ a little from version to version; one tensor changes everywhere, one nowhere."""
    rng = np.random.default_rng(0)
    first, second, dense, still = (rng.integers(0x3C00, 0x3F00, 400, dtype=np.uint16) for _ in range(4))
    first[:number] += 1
    second[5 : 5 + 2 * number] -= 1
    dense += np.uint16(number)
    named = {"first": first, "second": second, "dense": dense, "still": still}
    return {name: Tensor("BF16", SHAPE, bits) for name, bits in named.items()}


def make_version(number: int) -> PolicyVersion:
    return PolicyVersion(number, 2 * number, 0, root_hash(make_weights(number)))


def delta_between(old: int, new: int) -> bytes:
    return encode_delta("run", make_weights(old), make_weights(new), make_version(old), make_version(new))[0]


class RoutingPort:
    """The part of a broker that gives out scripted routes, and files in a folder. After the last route of the script comes that route again."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[int] = []
        self.reasons: list[str] = []
        self.fetched: list[BlobRef] = []
        self.forgotten: list[BlobRef] = []
        self._routes: list[Route] = []
        self._folder = folder / "fetched"
        self._folder.mkdir()

    def store(self, data: bytes) -> BlobRef:
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        (self._folder / ref.digest).write_bytes(data)
        return ref

    def base(self, *numbers: int) -> list[NamedBlob]:
        """The policy's files: for each number a file of fp32 tensors that round to two of that version's tensors."""
        files = []
        for part, number in enumerate(numbers):
            tensors = {}
            for name, tensor in list(make_weights(number).items())[2 * part : 2 * part + 2]:
                tensors[name] = Tensor("F32", tensor.shape, (tensor.bits.astype(np.uint32) << 16) + np.uint32(0x1234))
            files.append(NamedBlob(f"model-{part}.safetensors", self.store(safetensors_file.serialize(tensors, {"format": "pt"}))))
        return [NamedBlob("config.json", self.store(b"{}")), *files]

    def snapshot(self, number: int) -> BlobRef:
        return self.store(encode_snapshot("run", make_weights(number), make_version(number)))

    def delta(self, old: int, new: int) -> BlobRef:
        return self.store(delta_between(old, new))

    def plan(self, newest: int | None, start: str, *deltas: BlobRef, snapshot: BlobRef | None = None) -> None:
        """The answer to the next question for a route."""
        self._routes.append(Route(-1, None if newest is None else make_version(newest), start, snapshot, list(deltas)))  # type: ignore[arg-type]

    def plan_snapshot(self, number: int) -> None:
        self.plan(number, "snapshot", snapshot=self.snapshot(number))

    async def route(self, held: int, failed: str = "") -> Route:
        self.asked.append(held)
        self.reasons.append(failed)
        return self._routes.pop(0) if len(self._routes) > 1 else self._routes[0]

    async def fetch(self, blob: BlobRef) -> Path:
        self.fetched.append(blob)
        path = self._folder / blob.digest
        if not path.exists():
            raise RequestRefused("blob", "gone")
        return path

    def forget(self, blob: BlobRef) -> None:
        self.forgotten.append(blob)

    def forget_the_past(self) -> None:
        """Routes planned, and what was asked, are those from now on."""
        for record in (self.asked, self.reasons, self.fetched, self.forgotten, self._routes):
            record.clear()


@pytest.fixture
def port(tmp_path: Path) -> RoutingPort:
    return RoutingPort(tmp_path)


@pytest.fixture
def shadows(tmp_path: Path) -> Path:
    """Where shadows lie."""
    folder = tmp_path / "shadows"
    folder.mkdir()
    return folder


Holding = Callable[..., Awaitable[HeldWeights]]


@pytest.fixture
def holding(port: RoutingPort, shadows: Path) -> Holding:
    """Held weights that have arrived at a version by a snapshot."""

    async def hold(number: int, folders: list[Path] | None = None) -> HeldWeights:
        port.forget_the_past()
        held = HeldWeights(port, port.base(0, 0), folders or [shadows], 0.0)  # type: ignore[arg-type]
        port.plan_snapshot(number)
        await held.advance()
        port.forget_the_past()
        return held

    return hold


def assert_arrived(staged: StagedWeights | None, held: HeldWeights, number: int) -> None:
    """What is handed to the engine, in memory and in the file, is version `number` exactly, and is what is held."""
    assert staged is not None
    assert staged.version == held.version == make_version(number)
    assert held.number == number
    assert root_hash(staged.weights) == make_version(number).root
    assert root_hash(safetensors_file.deserialize(staged.path.read_bytes())[1]) == make_version(number).root


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


# --- ways that lead there


async def test_at_first_nothing_is_held_and_no_room_is_taken(port: RoutingPort, shadows: Path) -> None:
    held = HeldWeights(port, port.base(0, 0), [shadows])  # type: ignore[arg-type]
    assert held.version is None
    assert held.number == -1
    assert files_in(shadows) == []


async def test_a_snapshot_leads_to_the_first_version(port: RoutingPort, shadows: Path) -> None:
    held = HeldWeights(port, [], [shadows])  # type: ignore[arg-type]
    port.plan_snapshot(3)
    staged = await held.advance()
    assert_arrived(staged, held, 3)
    assert staged is not None and staged.changed is None
    assert (port.asked, port.reasons) == ([-1], [""])
    assert port.forgotten == port.fetched


async def test_the_base_is_the_policys_files_rounded_and_is_kept_for_another_time(port: RoutingPort, shadows: Path) -> None:
    base = port.base(0, 0)
    held = HeldWeights(port, base, [shadows])  # type: ignore[arg-type]
    port.plan(0, "base")
    staged = await held.advance()
    assert_arrived(staged, held, 0)
    assert port.fetched == [file.blob for file in base[1:]]
    assert port.forgotten == []


@pytest.mark.parametrize("start", ["base", "snapshot"])
async def test_a_start_followed_by_deltas_leads_there_as_well(start: str, port: RoutingPort, shadows: Path) -> None:
    held = HeldWeights(port, port.base(0, 0), [shadows])  # type: ignore[arg-type]
    snapshot = port.snapshot(0) if start == "snapshot" else None
    port.plan(5, start, port.delta(0, 2), port.delta(2, 5), snapshot=snapshot)
    staged = await held.advance()
    assert_arrived(staged, held, 5)
    assert staged is not None and staged.changed is None


async def test_one_delta_is_staged_in_place_with_exactly_the_positions_that_changed(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    before = make_weights(1)
    path, view = held._shadow.path, held._shadow.weights["first"].bits  # type: ignore[union-attr]
    port.plan(3, "held", port.delta(1, 3))
    staged = await held.advance()
    assert_arrived(staged, held, 3)
    assert staged is not None and staged.changed is not None
    assert staged.path == path
    assert view.tolist() == make_weights(3)["first"].bits.tolist()
    expected = {
        name: [i for i in range(400) if tensor.bits[i] != before[name].bits[i]]
        for name, tensor in make_weights(3).items()
        if name != "still"
    }
    found = {name: None if positions is None else positions.tolist() for name, positions in staged.changed.items()}
    assert found == expected | {"dense": None}
    assert port.asked == [1]
    assert port.forgotten == port.fetched


async def test_after_several_deltas_everything_is_to_be_taken_over(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    port.plan(6, "held", port.delta(1, 2), port.delta(2, 5), port.delta(5, 6))
    staged = await held.advance()
    assert_arrived(staged, held, 6)
    assert staged is not None and staged.changed is None
    assert port.asked == [1]


async def test_the_bytes_that_a_version_took_are_counted_anew_for_each(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    for blobs in ([port.delta(1, 2), port.delta(2, 5)], [port.delta(5, 6)]):
        port.forget_the_past()
        port.plan(6 if len(blobs) == 1 else 5, "held", *blobs)
        await held.advance()
        assert held.arrival.num_bytes == sum(blob.size for blob in blobs)
        assert held.arrival.fetching >= 0 and held.arrival.staging >= 0


async def test_a_compact_delta_leads_there_as_well(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    data, _ = encode_delta("run", make_weights(1), make_weights(3), make_version(1), make_version(3), classes=True)
    port.plan(3, "held", port.store(data))
    assert_arrived(await held.advance(), held, 3)


async def test_a_delta_of_nothing_changes_the_version_alone(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    again = PolicyVersion(2, 8, 0, make_version(1).root)
    data, _ = encode_delta("run", make_weights(1), make_weights(1), make_version(1), again)
    port._routes.append(Route(1, again, "held", None, [port.store(data)]))
    staged = await held.advance()
    assert staged is not None
    assert (staged.version, staged.changed) == (again, {})
    assert held.version == again


@pytest.mark.parametrize("newest", [None, 3])
async def test_with_nothing_newer_nothing_is_fetched_and_what_is_held_stays(
    newest: int | None, port: RoutingPort, holding: Holding
) -> None:
    held = await holding(3)
    port.plan(newest, "held")
    assert await held.advance() is None
    assert held.number == 3
    assert port.fetched == []
    port.forget_the_past()
    port.plan(4, "held", port.delta(3, 4))
    assert_arrived(await held.advance(), held, 4)


async def test_many_versions_one_after_the_other_stay_exact_in_the_same_file(port: RoutingPort, holding: Holding, shadows: Path) -> None:
    held = await holding(0)
    for number in range(1, 40):
        port.forget_the_past()
        port.plan(number, "held", port.delta(number - 1, number))
        assert_arrived(await held.advance(), held, number)
    assert len(files_in(shadows)) == 1


async def test_dropping_removes_the_file(holding: Holding, shadows: Path) -> None:
    held = await holding(1)
    assert len(files_in(shadows)) == 1
    held.drop()
    assert files_in(shadows) == []
    assert held.version is None


# --- deltas that bring another layout


def other_layout() -> Weights:
    weights = make_weights(3)
    del weights["still"]
    return weights | {"second": Tensor("BF16", (4, 7), np.arange(28, dtype=np.uint16)), "more": weights["first"]}


async def test_a_delta_that_brings_other_tensors_is_followed_and_everything_is_to_be_taken_over(
    port: RoutingPort, holding: Holding, shadows: Path
) -> None:
    held = await holding(1)
    new = other_layout()
    version = PolicyVersion(3, 6, 0, root_hash(new))
    data, _ = encode_delta("run", make_weights(1), new, make_version(1), version)
    port._routes.append(Route(1, version, "held", None, [port.store(data)]))
    staged = await held.advance()
    assert staged is not None
    assert staged.version == held.version == version
    assert staged.changed is None
    assert root_hash(staged.weights) == version.root
    assert root_hash(safetensors_file.deserialize(staged.path.read_bytes())[1]) == version.root
    assert files_in(shadows) == [staged.path]
    # And on from there, in place.
    newer = {name: tensor._replace(bits=tensor.bits + np.uint16(name == "more")) for name, tensor in new.items()}
    last = PolicyVersion(4, 8, 0, root_hash(newer))
    port.forget_the_past()
    port._routes.append(Route(3, last, "held", None, [port.store(encode_delta("run", new, newer, version, last)[0])]))
    staged = await held.advance()
    assert staged is not None and staged.changed is not None
    assert set(staged.changed) == {"more"}
    assert root_hash(staged.weights) == last.root


# --- files that do not lead there


def rewritten(data: bytes, change: Callable[[dict[str, Tensor]], None]) -> bytes:
    """A delta file with its streams changed, and the lengths around them in order."""
    metadata, tensors = safetensors_file.deserialize(data)
    change(tensors)
    return safetensors_file.serialize({name: t._replace(shape=(t.bits.size,)) for name, t in tensors.items()}, metadata)


def with_manifest(data: bytes, change: Callable[[Any], Any]) -> bytes:
    def edit(tensors: dict[str, Tensor]) -> None:
        shards = msgspec.json.decode(zstandard.ZstdDecompressor().decompressobj().decompress(tensors["manifest"].bits.tobytes()))
        packed = zstandard.ZstdCompressor().compress(msgspec.json.encode(change(shards)))
        tensors["manifest"] = Tensor("U8", (len(packed),), np.frombuffer(packed, np.uint8))

    return rewritten(data, edit)


def swap_streams(tensors: dict[str, Tensor]) -> None:
    names = [name for name, tensor in tensors.items() if tensor.bits.size and name != "manifest"]
    assert len(names) >= 2
    tensors[names[0]], tensors[names[-1]] = tensors[names[-1]], tensors[names[0]]


def swap_tensors(shards: Any) -> Any:
    (entries, sizes), *rest = shards
    entries[0][0], entries[1][0] = entries[1][0], entries[0][0]
    return [[entries, sizes], *rest]


def of_shards(order: list[int]) -> bytes:
    """A delta from 1 to 3 of a shard per tensor; the manifest lists them in order, the streams hold them in `order`."""
    old, new = make_weights(1), make_weights(3)
    shards = [encode_shard([name], old, new) for name in new]
    good = assemble("run", make_version(1), make_version(3), shards)[0]
    mixed = assemble("run", make_version(1), make_version(3), [shards[i] for i in order])[0]
    manifest = safetensors_file.deserialize(good)[1]["manifest"]
    return rewritten(mixed, lambda tensors: tensors.update(manifest=manifest))


def bad_files() -> dict[str, tuple[bytes, tuple[type[WeightsError], ...]]]:
    """Files that do not lead from version 1 to version 3, though the broker says so, and the names they may be refused by."""
    good = delta_between(1, 3)
    mismatched = (DamagedDelta, RootMismatch)
    return {
        "empty": (b"", (DamagedDelta,)),
        "no weight file": (b"not a weight file", (DamagedDelta,)),
        "truncated": (good[:-3], (DamagedDelta,)),
        "something behind": (good + b"\0", (DamagedDelta,)),
        "a snapshot": (encode_snapshot("run", make_weights(3), make_version(3)), (WeightsError,)),
        "from another parent": (delta_between(2, 3), (WrongParent,)),
        "to another version": (delta_between(1, 2), (RootMismatch,)),
        "a lie about its end": (
            encode_delta("run", make_weights(1), make_weights(2), make_version(1), make_version(3))[0],
            (RootMismatch,),
        ),
        "a lie about its start": (
            encode_delta("run", make_weights(2), make_weights(3), make_version(1), make_version(3))[0],
            (RootMismatch,),
        ),
        "streams swapped": (rewritten(good, swap_streams), (DamagedDelta,)),
        "tensors swapped": (with_manifest(good, swap_tensors), mismatched),
        "shards reordered": (of_shards([1, 0, 2, 3]), mismatched),
        "a tensor left out": (with_manifest(of_shards([0, 1, 2, 3]), lambda shards: shards[:-1]), (DamagedDelta,)),
    }


BAD = sorted(bad_files())


def named_by(reason: str) -> type[WeightsError]:
    """Which error a reason is the text of."""
    for error, text in (
        (DamagedDelta, "damaged weight file"),
        (WrongParent, "the delta starts from root"),
        (RootMismatch, "root hash is"),
        (ShadowLost, "shadow of the weights"),
    ):
        if text in reason:
            return error
    raise AssertionError(f"{reason!r} is no WeightsError")


def is_named(reason: str, errors: tuple[type[WeightsError], ...]) -> bool:
    return issubclass(named_by(reason), errors)


@pytest.mark.parametrize("recovery", ["base", "snapshot"])
@pytest.mark.parametrize("kind", BAD)
async def test_a_file_that_leads_elsewhere_is_refused_by_name_and_the_way_is_begun_anew(
    kind: str, recovery: str, port: RoutingPort, holding: Holding, shadows: Path
) -> None:
    held = await holding(1)
    data, names = bad_files()[kind]
    port.plan(3, "held", port.store(data))
    if recovery == "base":
        port.plan(3, "base", port.delta(0, 3))
    else:
        port.plan_snapshot(3)
    staged = await held.advance()
    assert_arrived(staged, held, 3)
    assert staged is not None and staged.changed is None
    assert port.asked == [1, -1]
    assert port.reasons[0] == ""
    assert is_named(port.reasons[1], names)
    assert files_in(shadows) == [staged.path]


@pytest.mark.parametrize("kind", BAD)
async def test_what_fails_every_time_is_raised_by_name_and_nothing_is_held(
    kind: str, port: RoutingPort, holding: Holding, shadows: Path
) -> None:
    held = await holding(1)
    data, names = bad_files()[kind]
    port.plan(3, "snapshot", port.store(data), snapshot=port.snapshot(1))
    with pytest.raises(names):
        await held.advance()
    assert port.asked == [1] + [-1] * (ATTEMPTS - 1)
    assert all(is_named(reason, names) for reason in port.reasons[1:])
    assert held.version is None
    # The next attempt starts from nothing and may succeed.
    port.forget_the_past()
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert port.asked == [-1]


@pytest.mark.parametrize(
    ("data", "errors"),
    [
        (b"", (DamagedDelta,)),
        (b"damaged", (DamagedDelta,)),
        (delta_between(1, 3), (DamagedDelta, RootMismatch)),
        (encode_snapshot("run", make_weights(2), make_version(3)), (RootMismatch,)),
        (encode_snapshot("run", make_weights(3), make_version(3))[:-1], (DamagedDelta,)),
    ],
    ids=["empty", "damaged", "a delta", "other weights", "truncated"],
)
async def test_a_snapshot_that_is_none_is_refused_by_name_and_asked_for_again(
    data: bytes, errors: tuple[type[WeightsError], ...], port: RoutingPort, shadows: Path
) -> None:
    held = HeldWeights(port, [], [shadows], 0.0)  # type: ignore[arg-type]
    port.plan(3, "snapshot", snapshot=port.store(data))
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert is_named(port.reasons[1], errors)


@pytest.mark.parametrize(
    ("files", "errors"),
    [
        ([b"no file"], (DamagedDelta,)),
        ([], (RootMismatch,)),
        ([safetensors_file.serialize(make_weights(1), {})], (RootMismatch,)),
        ([safetensors_file.serialize(make_weights(0), {})] * 2, (DamagedDelta,)),
    ],
    ids=["damaged", "no files", "other weights", "the same tensors twice"],
)
async def test_a_base_that_is_not_the_runs_is_refused_by_name_and_a_snapshot_may_follow(
    files: list[bytes], errors: tuple[type[WeightsError], ...], port: RoutingPort, shadows: Path
) -> None:
    base = [NamedBlob(f"model-{number}.safetensors", port.store(data)) for number, data in enumerate(files)]
    held = HeldWeights(port, base, [shadows], 0.0)  # type: ignore[arg-type]
    port.plan(0, "base")
    port.plan_snapshot(0)
    assert_arrived(await held.advance(), held, 0)
    assert is_named(port.reasons[1], errors)
    assert len(files_in(shadows)) == 1


@pytest.mark.parametrize(
    "ways",
    [
        lambda port: (),
        lambda port: (port.delta(1, 2),),
        lambda port: (port.delta(1, 2), port.delta(1, 3)),
        lambda port: (port.delta(2, 3), port.delta(1, 2)),
        lambda port: (port.delta(1, 3), port.delta(1, 3)),
    ],
    ids=["no files", "ends early", "a gap", "reordered", "twice"],
)
async def test_a_chain_of_deltas_that_does_not_join_up_is_refused(
    ways: Callable[[RoutingPort], tuple[BlobRef, ...]], port: RoutingPort, holding: Holding
) -> None:
    held = await holding(1)
    port.plan(3, "held", *ways(port))
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert port.asked == [1, -1]
    assert is_named(port.reasons[1], (WrongParent, RootMismatch))


async def test_a_delta_without_anything_held_is_refused(port: RoutingPort, shadows: Path) -> None:
    held = HeldWeights(port, [], [shadows], 0.0)  # type: ignore[arg-type]
    port.plan(3, "held", port.delta(1, 3))
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert is_named(port.reasons[1], (WrongParent,))


async def test_whatever_byte_of_a_delta_is_damaged_nothing_but_the_published_weights_is_ever_handed_on(
    port: RoutingPort, holding: Holding
) -> None:
    good = delta_between(1, 3)
    recovered = 0
    for position in range(0, len(good), 3):
        held = await holding(1)
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        port.plan(3, "held", port.store(bytes(damaged)))
        port.plan_snapshot(3)
        assert_arrived(await held.advance(), held, 3)
        recovered += len(port.asked) - 1
        held.drop()
    # Some bytes say nothing that matters (the figures of the header); most do.
    assert recovered > len(good) / 6


async def test_wherever_a_delta_is_cut_off_nothing_but_the_published_weights_is_ever_handed_on(port: RoutingPort, holding: Holding) -> None:
    good = delta_between(1, 3)
    for length in range(0, len(good), 7):
        held = await holding(1)
        port.plan(3, "held", port.store(good[:length]))
        port.plan_snapshot(3)
        assert_arrived(await held.advance(), held, 3)
        assert is_named(port.reasons[1], (DamagedDelta,))
        held.drop()


async def test_chunks_of_a_tensor_in_another_order_are_found_out_by_the_root(port: RoutingPort, shadows: Path) -> None:
    """They decode without complaint: only the hash can tell."""
    size = 2 * CHUNK_ELEMENTS
    old = {"w": Tensor("BF16", (size,), np.zeros(size, np.uint16))}
    new = {"w": Tensor("BF16", (size,), np.zeros(size, np.uint16))}
    new["w"].bits[[3, CHUNK_ELEMENTS + 1000]] = 1, 5
    versions = [PolicyVersion(number, number, 0, root_hash(weights)) for number, weights in enumerate((old, new))]
    halves = [slice(CHUNK_ELEMENTS, None), slice(0, CHUNK_ELEMENTS)]
    writer = ShardWriter()
    writer.put_changes("w", "BF16", (size,), [(find_changes(old["w"].bits[half], new["w"].bits[half]), None) for half in halves])
    swapped = port.store(assemble("run", versions[0], versions[1], [writer.finish()])[0])
    held = HeldWeights(port, [], [shadows], 0.0)  # type: ignore[arg-type]
    start = port.store(encode_snapshot("run", old, versions[0]))
    port._routes.append(Route(-1, versions[0], "snapshot", start, []))
    await held.advance()
    port.forget_the_past()
    port._routes.append(Route(0, versions[1], "held", None, [swapped]))
    port._routes.append(Route(-1, versions[1], "snapshot", start, [port.store(encode_delta("run", old, new, *versions)[0])]))
    staged = await held.advance()
    assert staged is not None
    assert is_named(port.reasons[1], (RootMismatch,))
    assert root_hash(staged.weights) == versions[1].root
    held.drop()


# --- files and brokers that are gone


async def test_a_file_that_the_store_no_longer_has_leads_to_another_way(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    port.plan(3, "held", BlobRef("0" * 64, 5))
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert port.asked == [1, -1]
    assert "gone" in port.reasons[1]


async def test_a_file_that_is_never_there_is_raised_in_the_end(port: RoutingPort, holding: Holding) -> None:
    held = await holding(1)
    port.plan(3, "held", BlobRef("0" * 64, 5))
    with pytest.raises(RequestRefused):
        await held.advance()
    assert len(port.asked) == ATTEMPTS


async def test_a_broker_that_cannot_be_reached_is_no_reason_to_throw_a_whole_shadow_away(port: RoutingPort, holding: Holding) -> None:
    class Unreachable(RoutingPort):
        async def route(self, held: int, failed: str = "") -> Route:
            raise BrokerUnreachable("here", 1.0, "a route")

    held = await holding(1)
    held._port = Unreachable(port._folder)  # type: ignore[assignment]
    with pytest.raises(BrokerUnreachable):
        await held.advance()
    held._port = port  # type: ignore[assignment]
    assert held.number == 1
    port.plan(3, "held", port.delta(1, 3))
    assert_arrived(await held.advance(), held, 3)
    assert port.asked == [1]


# --- a shadow that is lost


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("recovery", ["base", "snapshot"])
@pytest.mark.parametrize("harm", [remove, replace, cut_short])
async def test_a_lost_shadow_is_refused_by_name_and_made_anew(
    harm: Callable[[Path], None], recovery: str, port: RoutingPort, holding: Holding, shadows: Path
) -> None:
    held = await holding(1)
    (path,) = files_in(shadows)
    harm(path)
    port.plan(3, "held", port.delta(1, 3))
    if recovery == "base":
        port.plan(3, "base", port.delta(0, 3))
    else:
        port.plan_snapshot(3)
    staged = await held.advance()
    assert_arrived(staged, held, 3)
    assert staged is not None and staged.changed is None
    assert port.asked == [1, -1]
    assert is_named(port.reasons[1], (ShadowLost,))


@pytest.mark.parametrize("name", ["first", "dense"])
async def test_a_shadow_that_somebody_wrote_to_is_found_out_by_the_root(
    name: str, port: RoutingPort, holding: Holding, shadows: Path
) -> None:
    held = await holding(1)
    (path,) = files_in(shadows)
    data = path.read_bytes()
    where = data.index(make_weights(1)[name].bits.tobytes()) + 790
    with path.open("r+b") as file:
        file.seek(where)
        file.write(bytes([data[where] ^ 1]))
    port.plan(3, "held", port.delta(1, 3))
    port.plan_snapshot(3)
    assert_arrived(await held.advance(), held, 3)
    assert is_named(port.reasons[1], (RootMismatch,))


# --- no room


def large_weights(num_bytes: int) -> tuple[Weights, PolicyVersion]:
    weights = {"w": Tensor("BF16", (num_bytes // 2,), np.zeros(num_bytes // 2, np.uint16))}
    return weights, PolicyVersion(3, 6, 0, root_hash(weights))


async def test_a_full_shared_memory_is_passed_over_for_another_folder(port: RoutingPort, shadows: Path, small_folder: Path) -> None:
    weights, version = large_weights(2 << 20)
    held = HeldWeights(port, [], [small_folder, shadows], 0.0)  # type: ignore[arg-type]
    port._routes.append(Route(-1, version, "snapshot", port.store(encode_snapshot("run", weights, version)), []))
    staged = await held.advance()
    assert staged is not None
    assert staged.path.parent == shadows
    assert root_hash(staged.weights) == version.root
    held.drop()


async def test_without_room_anywhere_the_actor_says_so_leaves_nothing_and_recovers_once_there_is(
    port: RoutingPort, shadows: Path, small_folder: Path, fill_up: Callable[[Path], Path]
) -> None:
    ballast = fill_up(small_folder)
    held = HeldWeights(port, port.base(0, 0), [small_folder], 0.0)  # type: ignore[arg-type]
    port.plan(0, "base")
    with pytest.raises(ShadowLost, match="no room"):
        await held.advance()
    assert all(is_named(reason, (ShadowLost,)) for reason in port.reasons[1:])
    assert held.version is None
    assert files_in(small_folder) == [ballast]
    ballast.unlink()
    assert_arrived(await held.advance(), held, 0)
    held.drop()


async def test_a_shared_memory_that_fills_up_later_does_not_hinder_staging_in_place(
    port: RoutingPort, holding: Holding, small_folder: Path, fill_up: Callable[[Path], Path]
) -> None:
    held = await holding(0, [small_folder])
    fill_up(small_folder)
    for number in range(1, 5):
        port.forget_the_past()
        port.plan(number, "held", port.delta(number - 1, number))
        assert_arrived(await held.advance(), held, number)
    assert port.asked == [3]
    held.drop()


async def test_where_two_shadows_have_no_room_beside_each_other_the_old_one_goes_first(port: RoutingPort, small_folder: Path) -> None:
    weights, version = large_weights(700_000)
    small, first = large_weights(500_000)
    first = msgspec.structs.replace(first, number=2)
    held = HeldWeights(port, [], [small_folder], 0.0)  # type: ignore[arg-type]
    port._routes.append(Route(-1, first, "snapshot", port.store(encode_snapshot("run", small, first)), []))
    await held.advance()
    port.forget_the_past()
    port._routes.append(Route(2, version, "held", None, [port.store(encode_delta("run", small, weights, first, version)[0])]))
    port._routes.append(Route(-1, version, "snapshot", port.store(encode_snapshot("run", weights, version)), []))
    staged = await held.advance()
    assert staged is not None
    assert is_named(port.reasons[1], (ShadowLost,))
    assert files_in(small_folder) == [staged.path]
    assert root_hash(staged.weights) == version.root
    held.drop()


# --- while it works, and when it is stopped


class SlowFile(type(Path())):  # type: ignore[misc]
    """A file whose reader stands until it may go on."""

    standing: threading.Event
    go_on: threading.Event

    def open(self, *arguments: Any, **options: Any) -> Any:
        self.standing.set()
        assert self.go_on.wait(DEADLINE)
        return super().open(*arguments, **options)


class SlowPort(RoutingPort):
    """Gives out files whose readers stand."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.standing, self.go_on = threading.Event(), threading.Event()

    async def fetch(self, blob: BlobRef) -> Path:
        path = SlowFile(await super().fetch(blob))
        path.standing, path.go_on = self.standing, self.go_on
        return path


async def test_nothing_counts_as_held_while_it_is_being_staged(port: RoutingPort, holding: Holding, tmp_path: Path) -> None:
    held = await holding(1)
    (tmp_path / "slow").mkdir()
    slow = SlowPort(tmp_path / "slow")
    slow.plan(3, "held", slow.delta(1, 3))
    held._port = slow  # type: ignore[assignment]
    advancing = asyncio.create_task(held.advance())
    async with asyncio.timeout(DEADLINE):
        assert await asyncio.to_thread(slow.standing.wait, DEADLINE)
        assert held.version is None
        slow.go_on.set()
        assert_arrived(await advancing, held, 3)


@pytest.mark.parametrize("start", ["base", "snapshot"])
async def test_a_stop_while_weights_are_loaded_leaves_no_file(start: str, tmp_path: Path, shadows: Path) -> None:
    slow = SlowPort(tmp_path)
    base = [NamedBlob("model.safetensors", slow.store(safetensors_file.serialize(make_weights(0), {})))]
    held = HeldWeights(slow, base, [shadows], 0.0)  # type: ignore[arg-type]
    slow.plan(0, start, snapshot=slow.snapshot(0) if start == "snapshot" else None)
    advancing = asyncio.create_task(held.advance())
    async with asyncio.timeout(DEADLINE):
        assert await asyncio.to_thread(slow.standing.wait, DEADLINE)
        advancing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await advancing
        held.drop()
        slow.go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()
    del held, advancing
    gc.collect()
    assert files_in(shadows) == []
