"""How small weight deltas are, and how fast: against the entropy bound, against the layouts of other systems, and from version to version.

    python bench/weights.py [--updates adamw] [--model 1b] [--lr 1e-6] [--coherence 0] [--warm 300] [--versions 9] [--json figures.json]
    python bench/weights.py --updates run:runs/NAME [--versions 9]

Updates. `adamw`: tensors in the shapes of a Llama, N(0, 0.02) (norms 1) at bf16 points with an fp32 master, torch.optim.AdamW, gradients of
independent N(0, 1) noise plus `--coherence` times a fixed sign for each element; `--warm` steps, then `--versions` consecutive versions. Block by
block, as AdamW knows no neighbours. `run:DIR`: versions of a recorded run, from its journal and blobs; pairs of parent and child are spread over it.

Sizes are whole files: manifest and header included for ours, bare streams for the others. Every codec is applied to the old weights, and must give
the new ones bit for bit. All sparse layouts find the changes with the same compiled loop, so that layouts are compared and not languages:

    int32 + bf16      flat index and absolute value, uncompressed (TRL)
    PULSE gaps        differences of sorted flat indices as u16 (0xFFFF: 65535 further, and the next word goes on), absolute bf16 values;
                      byte planes; zstd-1
    PULSE rows        as it is deployed: rows as differences in u8, columns in u16, absolute in a new row (int32 in a tensor where they do not fit),
                      absolute bf16 values; zstd-1 over all
    XOR of changes    differences of sorted indices as u16 (u32 where they do not fit), XOR of old and new; zstd-1 (NeMo-RL)
    XOR planes        XOR of everything in byte planes, zstd-1 (slime)
    full planes       the new weights, exponent bytes and sign-and-mantissa bytes apart, zstd-1 (as ZipNN)

Speeds are GB of bf16 weights per second of one thread's processor time (waiting for a core that others use does not count, sharing caches and memory
does): the median of `--repeats` after a warm-up, over up to `--timed-mb` of the first pair. Decoding includes applying in place. The limits are
measured beside them. On a machine that others use too, speeds vary; sizes do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import numpy as np
import torch
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from protocol.base import WEIGHTS_SUFFIX, base_tensors  # noqa: E402
from protocol.chunks import STREAMS  # noqa: E402
from protocol.delta import Delta, DeltaHeader, apply_file, apply_in_place, encode_delta, split_names  # noqa: E402
from protocol.facts import VersionPublished  # noqa: E402
from protocol.fold import Leg, fold  # noqa: E402
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts  # noqa: E402
from protocol.ulps import Bits, Word, add_changes, compiled, find_changes  # noqa: E402
from protocol.weights import PolicyVersion, Tensor, Weights, num_bytes, root_hash  # noqa: E402

MODELS = {
    # vocabulary, hidden, intermediate, layers, width of all key heads; embeddings are tied
    "1b": (128256, 2048, 8192, 16, 512),
    "70m": (32000, 512, 1536, 16, 512),
    "small": (8000, 256, 768, 8, 256),
}
NO_ROOT = "0" * 64
OURS, CLASSES = "ours", "ours, classes"
Pair = tuple[Weights, Weights]
Frames = list[bytes]


class Updates(NamedTuple):
    """What is measured: pairs of parent and child, and consecutive versions to fold over."""

    pairs: list[Pair]
    chain: list[Weights]


# --- simulated updates


def model_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, by Hugging Face name."""
    vocabulary, hidden, intermediate, layers, keys = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{at}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,)}


def simulate(settings: argparse.Namespace) -> Updates:
    """Consecutive versions of a model under AdamW."""
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    block = 1 << (25 if device.type == "cuda" else 20)
    versions: list[Weights] = [{} for _ in range(settings.versions)]
    for name, shape in model_shapes(settings.model).items():
        size = math.prod(shape)
        found = [np.empty(size, np.uint16) for _ in versions]
        for begin in range(0, size, block):
            start = torch.ones(min(block, size - begin), device=device)
            if len(shape) > 1:
                start.normal_(0.0, 0.02, generator=generator)
            for bits, now in zip(found, train_block(start, settings, generator), strict=True):
                bits[begin : begin + block] = now
        for version, bits in zip(versions, found, strict=True):
            version[name] = Tensor("BF16", shape, bits)
    return Updates(list(pairwise(versions)), versions)


def train_block(start: torch.Tensor, settings: argparse.Namespace, generator: torch.Generator) -> Iterator[Bits]:
    """The bf16 bits of the measured versions of some elements that start at the nearest bf16 points."""
    master = torch.nn.Parameter(start.bfloat16().float())
    optimizer = torch.optim.AdamW([master], lr=settings.lr, betas=tuple(settings.betas), eps=1e-8, weight_decay=0.0, fused=True)
    gradient = torch.empty_like(start)
    coherent = settings.coherence * gradient.normal_(generator=generator).sign()
    for step in range(settings.warm + settings.versions):
        if step >= settings.warm:
            yield master.detach().bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
        gradient.normal_(generator=generator)
        master.grad = gradient.add_(coherent) if settings.coherence else gradient
        optimizer.step()


# --- recorded updates


def published_path(folder: Path) -> list[VersionPublished]:
    """The run's publications from one that a newcomer can start at to its newest, each reached from the one before by its delta."""
    path = folder / JOURNAL_NAME
    connection = open_read_only(path)
    by_number = {e.fact.version.number: e.fact for e in read_facts(connection, path) if isinstance(e.fact, VersionPublished)}
    connection.close()
    assert by_number, f"nothing was published in {folder}"
    found = [by_number[max(by_number)]]
    while found[-1].delta is not None:
        found.append(by_number[found[-1].parent])
    return found[::-1]


def first_weights(folder: Path, fact: VersionPublished) -> Weights:
    """The weights of a version without a parent: a snapshot, or the policy's own files rounded to bf16."""
    if fact.snapshot is not None:
        return apply_file((folder / "blobs" / fact.snapshot.digest).read_bytes(), None, "")[1]
    files = json.loads((folder / "run.json").read_text())["policy_files"]
    return dict(base_tensors([folder / "blobs" / digest for name, (digest, _) in files if name.endswith(WEIGHTS_SUFFIX)]))


def recorded_weights(folder: Path, path: list[VersionPublished]) -> Iterator[Weights]:
    """The weights of each version on the path, verified by their root. Fails where the run has dropped a delta."""
    weights = first_weights(folder, path[0])
    assert root_hash(weights) == path[0].version.root, f"version {path[0].version.number} does not have the root that was published"
    yield weights
    for before, fact in pairwise(path):
        assert fact.delta is not None
        header, weights = apply_file((folder / "blobs" / fact.delta.digest).read_bytes(), weights, before.version.root)
        assert header.new_root == fact.version.root, f"version {fact.version.number} does not have the root that was published"
        yield weights


def replay(folder: Path, num_versions: int) -> Updates:
    """Up to `num_versions` pairs, spread over the run, and as many consecutive versions from its middle."""
    path = published_path(folder)
    assert len(path) > 1, f"{folder} has no two versions"
    children = set(np.linspace(1, len(path) - 1, min(num_versions, len(path) - 1)).round().astype(int).tolist())
    first = max(0, (len(path) - num_versions) // 2)
    updates = Updates([], [])
    parent: Weights = {}
    for index, weights in enumerate(recorded_weights(folder, path)):
        if index in children:
            updates.pairs.append((parent, weights))
        if first <= index < first + num_versions:
            updates.chain.append(weights)
        parent = weights
    return updates


# --- the layouts of others: `encode(part)` gives frames, `apply(frames, bits, shapes)` turns the old bits into the new ones


class Part(NamedTuple):
    """Some tensors of a pair, end to end."""

    old: Bits
    new: Bits
    shapes: list[tuple[int, ...]]


def parts_of(old: Weights, new: Weights) -> Iterator[Part]:
    """The weights in parts of the size of our shards."""
    assert all(old[name].dtype == new[name].dtype == "BF16" for name in old | new), "other systems' layouts are written here for bf16 only"
    for names in split_names({name: tensor.bits.nbytes for name, tensor in old.items()}):
        before, after = ([weights[name].bits for name in names] for weights in (old, new))
        joined = (before[0], after[0]) if len(names) == 1 else (np.concatenate(before), np.concatenate(after))
        yield Part(*joined, [old[name].shape for name in names])


def trl_encode(part: Part) -> Frames:
    positions = find_changes(part.old, part.new).positions
    return [positions.astype(np.int32).tobytes(), part.new[positions].tobytes()]


def trl_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    del shapes
    bits[np.frombuffer(frames[0], np.int32)] = np.frombuffer(frames[1], np.uint16)


def pulse_encode(part: Part) -> Frames:
    positions = find_changes(part.old, part.new).positions
    words = np.empty(positions.size + part.old.size // 0xFFFF + 1, np.uint16)
    words = words[: _write_words(positions, words)]
    return [_zstd(_planes(words)), _zstd(_planes(part.new[positions]))]


def pulse_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    del shapes
    words, values = (_from_planes(_unzstd(frame)) for frame in frames)
    positions = np.empty(values.size, np.uint32)
    assert _read_words(words, positions) == values.size
    bits[positions] = values


def rows_encode(part: Part) -> Frames:
    found = find_changes(part.old, part.new).positions.astype(np.int64)
    header: list[int] = []
    data: list[bytes] = []
    begin = 0
    for shape in part.shapes:
        first, last = np.searchsorted(found, (begin, begin + math.prod(shape)))
        rows, columns = np.divmod(found[first:last] - begin, shape[-1])
        row_steps, column_steps = np.diff(rows, prepend=0), np.diff(columns, prepend=0)
        column_steps = np.where(row_steps > 0, columns, column_steps)
        row_type = np.uint8 if row_steps.max(initial=0) < 1 << 8 else np.int32
        column_type = np.uint16 if column_steps.max(initial=0) < 1 << 16 else np.int32
        header += [int(last - first), np.dtype(row_type).itemsize, np.dtype(column_type).itemsize]
        data += [row_steps.astype(row_type).tobytes(), column_steps.astype(column_type).tobytes(), part.new[found[first:last]].tobytes()]
        begin += math.prod(shape)
    return [np.array(header, np.uint32).tobytes(), _zstd(b"".join(data))]


def rows_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    header, data = np.frombuffer(frames[0], np.uint32).reshape(-1, 3).tolist(), _unzstd(frames[1])
    offset = begin = 0
    for shape, (count, row_size, column_size) in zip(shapes, header, strict=True):
        row_steps = np.frombuffer(data, np.uint8 if row_size == 1 else np.int32, count, offset)
        column_steps = np.frombuffer(data, np.uint16 if column_size == 2 else np.int32, count, offset + count * row_size)
        values = np.frombuffer(data, np.uint16, count, offset + count * (row_size + column_size))
        _apply_rows(row_steps, column_steps, values, shape[-1], bits[begin : begin + math.prod(shape)])
        offset += count * (row_size + column_size + 2)
        begin += math.prod(shape)


def nemo_encode(part: Part) -> Frames:
    positions = find_changes(part.old, part.new).positions
    gaps = np.diff(positions, prepend=np.uint32(0))
    gaps = gaps.astype(np.uint16) if gaps.max(initial=0) < 1 << 16 else gaps
    return [_zstd(gaps), _zstd(part.old[positions] ^ part.new[positions])]


def nemo_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    del shapes
    gaps, xors = _unzstd(frames[0]), np.frombuffer(_unzstd(frames[1]), np.uint16)
    positions = np.cumsum(np.frombuffer(gaps, np.uint16 if len(gaps) == 2 * xors.size else np.uint32), dtype=np.int64)
    bits[positions] ^= xors


def slime_encode(part: Part) -> Frames:
    return [_zstd(_planes(part.old ^ part.new))]


def slime_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    del shapes
    bits ^= _from_planes(_unzstd(frames[0]))


def zipnn_encode(part: Part) -> Frames:
    return [_zstd(plane) for plane in _planes(_rotated(part.new, 1)).reshape(2, -1)]


def zipnn_apply(frames: Frames, bits: Bits, shapes: list[tuple[int, ...]]) -> None:
    del shapes
    bits[:] = _rotated(_from_planes(b"".join(_unzstd(frame) for frame in frames)), 15)


class Layout(NamedTuple):
    encode: Callable[[Part], Frames]
    apply: Callable[[Frames, Bits, list[tuple[int, ...]]], None]


PULSE = ("PULSE gaps", "PULSE rows")
LAYOUTS = {
    "int32 + bf16": Layout(trl_encode, trl_apply),
    PULSE[0]: Layout(pulse_encode, pulse_apply),
    PULSE[1]: Layout(rows_encode, rows_apply),
    "XOR of changes": Layout(nemo_encode, nemo_apply),
    "XOR planes": Layout(slime_encode, slime_apply),
    "full planes": Layout(zipnn_encode, zipnn_apply),
}


def _zstd(data: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def _unzstd(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def _rotated(bits: Bits, left: int) -> Bits:
    return (bits << np.uint16(left)) | (bits >> np.uint16(16 - left))


def _planes(words: Bits) -> Bits:
    """Low bytes, then high bytes."""
    planes = np.empty((2, words.size), np.uint8)
    _split_planes(words, planes[0], planes[1])
    return planes.reshape(-1)


def _from_planes(data: bytes) -> Bits:
    planes = np.frombuffer(data, np.uint8).reshape(2, -1)
    words = np.empty(planes.shape[1], np.uint16)
    _join_planes(planes[0], planes[1], words)
    return words


@compiled
def _split_planes(words: Bits, low: Bits, high: Bits) -> None:
    for index in range(words.size):
        low[index] = words[index] & 255
        high[index] = words[index] >> 8


@compiled
def _join_planes(low: Bits, high: Bits, words: Bits) -> None:
    for index in range(words.size):
        words[index] = np.uint16(low[index]) | (np.uint16(high[index]) << 8)


@compiled
def _write_words(positions: Bits, words: Bits) -> Word:
    size = 0
    before: Word = -1
    for position in positions:
        gap = np.int64(position) - before - 1
        before = np.int64(position)
        while gap >= 0xFFFF:
            words[size] = 0xFFFF
            size += 1
            gap -= 0xFFFF
        words[size] = gap
        size += 1
    return size


@compiled
def _read_words(words: Bits, positions: Bits) -> Word:
    count = 0
    position = np.int64(-1)
    for word in words:
        position += np.int64(word)
        if word != 0xFFFF:
            position += 1
            positions[count] = position
            count += 1
    return count


@compiled
def _apply_rows(row_steps: Bits, column_steps: Bits, values: Bits, width: Word, bits: Bits) -> None:
    row = np.int64(0)
    column = np.int64(0)
    for index in range(values.size):
        row += row_steps[index]
        column = np.int64(column_steps[index]) + (0 if row_steps[index] > 0 else column)
        bits[row * width + column] = values[index]


# --- sizes


class Sizes(NamedTuple):
    """One pair: bytes by codec, and where ours go."""

    share: float
    num_changed: int
    full: int
    bound: int
    bytes: dict[str, int]
    streams: dict[str, int]
    chunks: dict[str, int]


def version(number: int) -> PolicyVersion:
    return PolicyVersion(number, number, 0, NO_ROOT)


def encode(old: Weights, new: Weights, *, classes: bool = False, number: int = 0) -> tuple[bytes, DeltaHeader]:
    """Our delta, as bytes in one piece."""
    data, header = encode_delta("bench", old, new, version(number), version(number + 1), classes=classes)
    return bytes(data), header


def copied(weights: Weights) -> Weights:
    return {name: Tensor(tensor.dtype, tensor.shape, tensor.bits.copy()) for name, tensor in weights.items()}


def check(codec: str, found: Weights, wanted: Weights) -> None:
    wrong = [name for name in wanted if not np.array_equal(found[name].bits, wanted[name].bits)]
    assert not wrong and set(found) == set(wanted), f"{codec}: tensors {wrong[:3]} are not what was encoded"


def measure_sizes(pair: Pair) -> Sizes:
    """The size of a pair by every codec, each checked to be exact."""
    old, new = pair
    data, header = encode(old, new)
    sizes = {OURS: len(data)}
    delta = Delta(data)
    held = copied(old)
    apply_in_place(delta, held)
    check(OURS, held, new)
    streams = dict.fromkeys(STREAMS, 0)
    for shard in delta.shards:
        for name, size in zip(STREAMS, shard.sizes, strict=True):
            streams[name] += size
    streams["manifest and header"] = len(data) - sum(streams.values())
    chunks = Counter(chunk.codec for entry in delta.tensors for chunk in entry.chunks)

    data, _ = encode(old, new, classes=True)
    sizes[CLASSES] = len(data)
    for name in held:
        held[name].bits[:] = old[name].bits
    apply_in_place(Delta(data), held)
    check(CLASSES, held, new)
    del held

    sizes |= dict.fromkeys(LAYOUTS, 0)
    for part in parts_of(old, new):
        bits = np.empty_like(part.old)
        for name, layout in LAYOUTS.items():
            frames = layout.encode(part)
            sizes[name] += sum(len(frame) for frame in frames)
            bits[:] = part.old
            layout.apply(frames, bits, part.shapes)
            assert np.array_equal(bits, part.new), f"{name} is not exact"
    share = header.num_changed / header.num_elements
    return Sizes(share, header.num_changed, num_bytes(new), header.bound_bytes, sizes, streams, dict(chunks))


class Folded(NamedTuple):
    """Catching up over a chain of versions."""

    num_deltas: int
    chain_bytes: int
    folded_bytes: int
    seconds: float


def measure_fold(versions: list[Weights]) -> Folded:
    """The folded delta beside the sum of the plain ones; checked to lead from the first version to the last."""
    deltas = [encode(old, new, number=index)[0] for index, (old, new) in enumerate(pairwise(versions))]
    started = time.perf_counter()
    data = bytes(fold([Leg(delta) for delta in deltas])[0])
    seconds = time.perf_counter() - started
    held = copied(versions[0])
    apply_in_place(Delta(data), held)
    check("fold", held, versions[-1])
    return Folded(len(deltas), sum(len(delta) for delta in deltas), len(data), seconds)


# --- speeds


class Speed(NamedTuple):
    """GB/s."""

    encode: float
    decode: float


def rate(num: int, repeats: int, action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    """GB/s of `action` on `num` bytes: the median after a warm-up. `prepare` is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        prepare()
        started = time.thread_time()
        action()
        seconds.append(time.thread_time() - started)
    return num / statistics.median(seconds[1:]) / 1e9


def timed_subset(pair: Pair, limit: int) -> Pair:
    """As many of the tensors as fit, in order."""
    names, room = [], limit
    for name, tensor in pair[0].items():
        if tensor.bits.nbytes <= room:
            names.append(name)
            room -= tensor.bits.nbytes
    return {name: pair[0][name] for name in names}, {name: pair[1][name] for name in names}


def measure_ours(old: Weights, new: Weights, repeats: int, *, classes: bool) -> Speed:
    size, held = num_bytes(old), copied(old)

    def restore() -> None:
        for name, tensor in held.items():
            tensor.bits[:] = old[name].bits

    # As a learner calls it: the file may be in pieces that are not joined.
    encoding = rate(size, repeats, lambda: encode_delta("bench", old, new, version(0), version(1), classes=classes))
    data, _ = encode(old, new, classes=classes)
    decoding = rate(size, repeats, lambda: apply_in_place(Delta(data), held), restore)
    return Speed(encoding, decoding)


def measure_layout(layout: Layout, parts: list[Part], repeats: int) -> Speed:
    size = sum(part.old.nbytes for part in parts)
    held = [part.old.copy() for part in parts]
    encoded = [layout.encode(part) for part in parts]

    def restore() -> None:
        for bits, part in zip(held, parts, strict=True):
            bits[:] = part.old

    def apply() -> None:
        for bits, frames, part in zip(held, encoded, parts, strict=True):
            layout.apply(frames, bits, part.shapes)

    return Speed(rate(size, repeats, lambda: [layout.encode(part) for part in parts]), rate(size, repeats, apply, restore))


def measure_limits(part: Part, repeats: int) -> dict[str, float]:
    """What the machine does with the same bytes: nothing that looks at all of them is faster."""
    size, held = part.old.nbytes, part.old.copy()
    changes = find_changes(part.old, part.new)
    return {
        "memcpy": rate(size, repeats, lambda: np.copyto(held, part.new)),
        "compare (numpy)": rate(size, repeats, lambda: np.array_equal(part.old, held), lambda: np.copyto(held, part.old)),
        "BLAKE3": rate(size, repeats, lambda: blake3.blake3(part.new.view(np.uint8).data).digest()),
        "finding the changes": rate(size, repeats, lambda: find_changes(part.old, part.new)),
        "adding the changes": rate(size, repeats, lambda: add_changes(held, changes), lambda: np.copyto(held, part.old)),
    }


def measure_speeds(pair: Pair, repeats: int) -> tuple[dict[str, Speed], dict[str, float]]:
    """By codec, and the limits."""
    old, new = pair
    speeds = {OURS: measure_ours(old, new, repeats, classes=False), CLASSES: measure_ours(old, new, repeats, classes=True)}
    parts = list(parts_of(old, new))
    limits = measure_limits(max(parts, key=lambda part: part.old.size), repeats)
    return speeds | {name: measure_layout(layout, parts, repeats) for name, layout in LAYOUTS.items()}, limits


# --- what is said about it


class Goal(NamedTuple):
    """`measured` is None where nothing measured qualifies."""

    name: str
    relation: str
    target: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "yes" if (self.measured <= self.target if self.relation == "<=" else self.measured >= self.target) else "NO"


def goals(sizes: list[Sizes], folded: Folded | None, speeds: dict[str, Speed]) -> list[Goal]:
    """The worst of all pairs counts."""
    dense = [s for s in sizes if s.share >= 0.004]
    sparse = [s for s in sizes if s.share <= 0.009]
    pulse = [min(s.bytes[name] for name in PULSE) / s.bytes[OURS] for s in sizes]
    full = min((s.full / s.bytes[OURS] for s in sparse), default=None)
    caught_up = folded.folded_bytes / folded.chain_bytes if folded and folded.num_deltas == 8 else None
    ours = speeds.get(OURS)
    return [
        Goal("size / i.i.d. bound where >= 0.4 % changed", "<=", 1.12, max((s.bytes[OURS] / s.bound for s in dense), default=None)),
        Goal("the same with exponent classes", "<=", 0.85, max((s.bytes[CLASSES] / s.bound for s in dense), default=None)),
        Goal("times smaller than the best PULSE layout", ">=", 2.0, min(pulse)),
        Goal("times smaller than full bf16 where <= 0.9 % changed", ">=", 150.0, full),
        Goal("folded / chain over 8 versions", "<=", 0.55, caught_up),
        Goal("encode, GB/s per core", ">=", 2.0, ours.encode if ours else None),
        Goal("decode + apply, GB/s per core", ">=", 5.0, ours.decode if ours else None),
    ]


def print_sizes(sizes: list[Sizes]) -> None:
    print(f"{'pair':>4s} {'changed':>9s} {'B/weight':>9s} {'/ bound':>8s} {'classes':>8s} {'PULSE /':>8s} {'full /':>7s}   chunks")
    for number, s in enumerate(sizes):
        ours = s.bytes[OURS]
        pulse = min(s.bytes[name] for name in PULSE) / ours
        print(
            f"{number:4d} {100 * s.share:7.3f} % {2 * ours / s.full:9.5f} {ours / s.bound:8.3f} {s.bytes[CLASSES] / s.bound:8.3f} {pulse:7.2f}x "
            f"{s.full / ours:6.1f}x   {', '.join(f'{count} {codec}' for codec, count in sorted(s.chunks.items()))}"
        )


def print_streams(sizes: list[Sizes]) -> None:
    """Where our bytes go, beside the two terms of the bound."""
    num_changed = sum(s.num_changed for s in sizes)
    position_bound = sum(s.full / 16 * _entropy(s.share) for s in sizes)
    bounds = {"positions": position_bound, "differences": sum(s.bound for s in sizes) - position_bound, "manifest and header": 0.0}
    groups = {"positions": ("positions", "packed"), "differences": ("ulps", "escapes", "planes")}
    for name, bound in bounds.items():
        size = sum(s.streams.get(stream, 0) for s in sizes for stream in groups.get(name, (name,)))
        print(f"  {name:20s} {size:12,d} B, {8 * size / num_changed:6.3f} bit for each change; bound {8 * bound / num_changed:6.3f}")


def _entropy(share: float) -> float:
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def print_codecs(sizes: list[Sizes], speeds: dict[str, Speed]) -> None:
    full, num_changed = sum(s.full for s in sizes), sum(s.num_changed for s in sizes)
    ours = sum(s.bytes[OURS] for s in sizes)
    print(f"{'codec':16s} {'bytes':>14s} {'B/change':>9s} {'full /':>8s} {'/ ours':>7s} {'encode':>7s} {'decode':>7s}  GB/s; all exact")
    for name in sizes[0].bytes:
        size = sum(s.bytes[name] for s in sizes)
        timed = f"{speeds[name].encode:7.2f} {speeds[name].decode:7.2f}" if name in speeds else f"{'-':>7s} {'-':>7s}"
        print(f"{name:16s} {size:14,d} {size / num_changed:9.3f} {full / size:7.1f}x {size / ours:6.2f}x {timed}")


def machine() -> dict[str, Any]:
    """What the figures come from."""
    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cpu": cpus[0] if cpus else "unknown", "cores": os.cpu_count(), "gpu": device, "load": os.getloadavg()[0]}
    return found | {"numpy": np.__version__, "torch": torch.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))}


def parse() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", default="adamw", help="adamw, or run:DIR")
    parser.add_argument("--model", choices=MODELS, help="default: 1b on a GPU, 70m on a CPU")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    parser.add_argument("--coherence", type=float, default=0.0, help="mean over standard deviation of each element's gradient")
    parser.add_argument("--warm", type=int, default=300, help="steps before the first version")
    parser.add_argument("--versions", type=int, default=9, help="consecutive versions; of a recorded run also the most pairs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timed-mb", type=int, default=1024)
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="pairs sized beside each other; speeds: always one thread"
    )
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    settings.device = device if settings.device == "auto" else settings.device
    settings.model = settings.model or ("1b" if settings.device.startswith("cuda") else "70m")
    return settings


def main() -> None:
    settings, found = parse(), machine()
    print(f"{found['cpu']}, {found['cores']} cores, load {found['load']:.1f}; GPU: {found['gpu'] or 'none'}")
    started = time.perf_counter()
    if settings.updates.startswith("run:"):
        updates = replay(Path(settings.updates[4:]), settings.versions)
        print(f"{settings.updates}: {len(updates.pairs)} pairs", end="")
    else:
        updates = simulate(settings)
        how = f"lr {settings.lr:g}, betas {settings.betas[0]:g} {settings.betas[1]:g}, coherence {settings.coherence:g}, {settings.warm} steps before"
        print(f"AdamW on {settings.model}, {settings.device}: {how}", end="")
    full = num_bytes(updates.chain[0])
    print(f"; {full / 2e6:.1f} M weights, {time.perf_counter() - started:.0f} s to make\n", flush=True)

    with ThreadPoolExecutor(settings.jobs) as pool:
        sizes = [s for s in pool.map(measure_sizes, updates.pairs) if s.num_changed]
    if not sizes:
        sys.exit("no weight changes in any pair")
    print_sizes(sizes)
    print("\nwhere our bytes go, all pairs:")
    print_streams(sizes)
    folded = measure_fold(updates.chain) if len(updates.chain) > 2 else None
    if folded is not None:
        ratio = folded.folded_bytes / folded.chain_bytes
        line = f"one delta of {folded.folded_bytes:,d} B instead of {folded.chain_bytes:,d} B, {ratio:.3f}, in {folded.seconds:.2f} s"
        print(f"\nfolded over {folded.num_deltas} versions: {line}")

    subset = timed_subset(updates.pairs[0], settings.timed_mb << 20)
    speeds, limits = measure_speeds(subset, settings.repeats) if num_bytes(subset[0]) >= 16 << 20 else ({}, {})
    timed = ", ".join(f"{name} {value:.1f}" for name, value in limits.items())
    print(f"\nlimits in GB/s, one thread: {timed or 'too few weights to time'}\n")
    print_codecs(sizes, speeds)
    print(f"\n{'goal':52s} {'target':>9s} {'measured':>9s}  met")
    verdicts = goals(sizes, folded, speeds)
    for goal in verdicts:
        measured = "-" if goal.measured is None else f"{goal.measured:.3f}"
        print(f"{goal.name:52s} {goal.relation:>3s} {goal.target:5g} {measured:>9s}  {goal.verdict}")
    if settings.json is not None:
        figures = {
            "machine": found,
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
            "full_bytes": full,
            "pairs": [s._asdict() for s in sizes],
            "folded": folded and folded._asdict(),
            "speeds": {name: speed._asdict() for name, speed in speeds.items()},
            "limits": limits,
            "goals": [goal._asdict() | {"met": goal.verdict} for goal in verdicts],
        }
        settings.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
