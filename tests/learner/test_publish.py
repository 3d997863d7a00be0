"""Publishing: the chain of files leads to the model's bits at every step."""

from __future__ import annotations

from typing import Any

import blake3
import pytest
import torch

from learner.model import published_weights
from learner.publish import Publisher
from protocol.delta import apply_file, read_header
from protocol.messages import LearnerWelcome, Publish, Published
from protocol.weights import BlobRef, Weights, num_bytes, root_hash


class StoringPort:
    """A broker of dictionaries. `adopt` says under which older number a publication of a root is known already."""

    def __init__(self, next_version: int = 0) -> None:
        self.blobs: dict[str, bytes] = {}
        self.publications: list[Publish] = []
        self.numbers: list[int] = []
        self.adopt: dict[str, int] = {}
        self.next_version = next_version

    def put_blob(self, data: bytes) -> BlobRef:
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self.blobs[ref.digest] = data
        return ref

    def publish(self, publication: Publish) -> Published:
        for ref in (publication.delta, publication.snapshot):
            assert ref is None or ref.digest in self.blobs, "announced before it was stored"
        number = self.adopt.get(publication.version.root, publication.version.number)
        self.publications.append(publication)
        self.numbers.append(number)
        self.next_version = max(self.next_version, number + 1)
        return Published(publication.version.step, number, self.next_version)

    def data(self, ref: BlobRef | None) -> bytes:
        assert ref is not None
        return self.blobs[ref.digest]


def welcome(port: StoringPort, lineage: int = 0) -> LearnerWelcome:
    known: dict[str, Any] = {
        "protocol": 1,
        "run": "run",
        "lineage": lineage,
        "next_version": port.next_version,
    }
    fields = {name: known[name] for name in LearnerWelcome.__struct_fields__ if name in known}
    return LearnerWelcome(**fields)


def nudge(model: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def change_one(model: Any, step: int) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[step] += 1.0


def test_the_chain_of_deltas_gives_the_models_bits_at_every_step(make_llama: Any) -> None:
    model, port = make_llama(hidden=32), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    publisher.publish(0, published_weights(model))
    held: Weights
    _, held = apply_file(port.data(port.publications[0].snapshot), None, "")
    for step, scale in enumerate([1e-6, 1e-4, 1e-3, 1e-2, 1e-5], start=1):
        nudge(model, scale)
        expected = published_weights(model)
        publisher.publish(step, expected)
        publication = port.publications[-1]
        before = root_hash(held)
        header, held = apply_file(port.data(publication.delta), held, before)
        assert root_hash(held) == root_hash(expected) == publication.version.root == header.new_root
        assert publication.version.step == step
        assert (publication.parent, header.from_version, header.to_version) == (step - 1, step - 1, step)
        assert header.parent_root == before
        assert all((held[name].bits == expected[name].bits).all() for name in expected)


def test_the_first_publication_is_a_snapshot_without_a_parent(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    metrics = publisher.publish(0, published_weights(model))
    (publication,) = port.publications
    assert publication.delta is None
    assert publication.parent == -1
    _, weights = apply_file(port.data(publication.snapshot), None, "")
    assert root_hash(weights) == publication.version.root == root_hash(published_weights(model))
    assert publication.full_bytes == metrics["full_bytes"] == num_bytes(weights)


def test_a_snapshot_comes_along_whenever_the_deltas_since_the_last_one_outgrow_the_weights(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    publisher.publish(0, published_weights(model))
    since = 0
    snapshots = 0
    for step in range(1, 12):
        nudge(model, 0.05)
        publisher.publish(step, published_weights(model))
        publication = port.publications[-1]
        assert publication.delta is not None
        since += publication.delta.size
        assert (publication.snapshot is not None) == (since > publication.full_bytes)
        if publication.snapshot is not None:
            header, weights = apply_file(port.data(publication.snapshot), None, "")
            assert header.new_root == root_hash(weights) == publication.version.root
            snapshots += 1
            since = 0
    assert snapshots >= 2


def test_a_late_joiner_never_fetches_more_than_twice_the_weights(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    for step in range(12):
        publisher.publish(step, published_weights(model))
        newest = max(i for i, publication in enumerate(port.publications) if publication.snapshot is not None)
        deltas = sum(publication.delta.size for publication in port.publications[newest + 1 :] if publication.delta)
        assert deltas <= num_bytes(published_weights(model))
        nudge(model, 0.02)


def test_small_changes_need_no_further_snapshot(make_llama: Any) -> None:
    model, port = make_llama(hidden=64), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    publisher.publish(0, published_weights(model))
    for step in range(1, 5):
        change_one(model, step)
        metrics = publisher.publish(step, published_weights(model))
        assert port.publications[-1].snapshot is None
        assert metrics["publication_bytes"] < metrics["full_bytes"] / 4
        assert metrics["publication_bound_bytes"] == read_header(port.data(port.publications[-1].delta)).bound_bytes


def test_an_adopted_version_number_is_the_parent_of_what_follows(make_llama: Any) -> None:
    """A replayed step that reproduces version 3 is known under 3, not under the number it was offered with."""
    model, port = make_llama(), StoringPort(next_version=8)
    publisher = Publisher(port, welcome(port, lineage=2), None)
    reproduced = published_weights(model)
    port.adopt[root_hash(reproduced)] = 3
    publisher.publish(0, reproduced)
    assert publisher.published is not None
    assert publisher.published.version.number == 3
    nudge(model, 1e-3)
    publisher.publish(1, published_weights(model))
    follower = port.publications[-1]
    assert follower.parent == 3
    assert follower.version.number == 8
    header, weights = apply_file(port.data(follower.delta), reproduced, root_hash(reproduced))
    assert header.from_version == 3
    assert root_hash(weights) == follower.version.root


def test_a_resumed_session_starts_its_first_delta_at_the_bits_published_before_the_checkpoint(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort()
    first = Publisher(port, welcome(port), None)
    first.publish(0, published_weights(model))
    before = published_weights(model)
    nudge(model, 1e-3)
    second = Publisher(port, welcome(port, lineage=1), first.published)
    second.publish(1, published_weights(model))
    publication = port.publications[-1]
    assert publication.parent == 0
    assert publication.version.lineage == 1
    _, weights = apply_file(port.data(publication.delta), before, root_hash(before))
    assert root_hash(weights) == root_hash(published_weights(model))


def test_unchanged_weights_are_published_as_an_empty_delta_to_the_same_root(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort()
    publisher = Publisher(port, welcome(port), None)
    weights = published_weights(model)
    publisher.publish(0, weights)
    metrics = publisher.publish(1, weights)
    header, applied = apply_file(port.data(port.publications[-1].delta), weights, root_hash(weights))
    assert header.num_changed == 0
    assert metrics["publication_bound_bytes"] == 0
    assert root_hash(applied) == root_hash(weights)


def test_published_weights_are_the_parameters_rounded_to_nearest_even_bf16(make_llama: Any) -> None:
    model = make_llama()
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[:4] = torch.tensor([1.00390625, 1.01171875, -0.0, 1e-40])
    weights = published_weights(model)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert weights[name].shape == tuple(parameter.shape)
        for value, bits in zip(parameter.detach().flatten().tolist(), weights[name].bits.tolist(), strict=True):
            assert bits == slow_bf16(value)


def slow_bf16(value: float) -> int:
    """Round half to even on the upper 16 bits of the float32 pattern."""
    pattern = int.from_bytes(torch.tensor([value]).numpy().tobytes(), "little")
    upper, lower = pattern >> 16, pattern & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper & 1 == 1))


def test_numbers_are_those_the_broker_gives_out(make_llama: Any) -> None:
    model, port = make_llama(), StoringPort(next_version=5)
    publisher = Publisher(port, welcome(port), None)
    for step in range(3):
        publisher.publish(step, published_weights(model))
        change_one(model, step)
    assert [publication.version.number for publication in port.publications] == [5, 6, 7]
    assert [publication.parent for publication in port.publications] == [-1, 5, 6]
    with pytest.raises(AssertionError):
        port.publish(Publish(port.publications[0].version, -1, BlobRef("0" * 64, 1), None, 0, 0))
