"""Publishing: the chain of files leads to the model's bits at every step, whoever trains on meanwhile and however many ranks share the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.own_task import EvenDigits
from learner.loop import Learner
from learner.model import published_weights
from learner.publish import Published, Publisher, share_of
from learner.ranks import OneRank, Ranks
from learner.step import Trainer
from protocol.base import base_root
from protocol.config import Config, LearnerConfig, LossConfig
from protocol.delta import apply_file, read_header
from protocol.errors import DamagedDelta, RequestRefused
from protocol.groups import FULL, Group, encode_group
from protocol.messages import LearnerWelcome, Note, Publish
from protocol.messages import Published as Answer
from protocol.ports import ReceivedBatch
from protocol.weights import BlobRef, PolicyVersion, Tensor, Weights, num_bytes, root_hash

DEADLINE = 60.0
PARTS = {"round", "copy", "encode", "gather", "upload"}


class StoringPort:
    """A broker of dictionaries. `adopt` says under which older number a publication of a root is known already, `wants` after which steps it
    asks for a snapshot; while `open` is not set, nothing can be stored; `failure` is raised instead of storing."""

    def __init__(self, next_version: int = 0, wants: tuple[int, ...] = ()) -> None:
        self.blobs: dict[str, bytes] = {}
        self.publications: list[Publish] = []
        self.adopt: dict[str, int] = {}
        self.next_version, self.wants = next_version, wants
        self.open = threading.Event()
        self.open.set()
        self.failure: Exception | None = None
        self.failed = threading.Event()

    def put_blob(self, data: bytes) -> BlobRef:
        assert self.open.wait(DEADLINE)
        if self.failure is not None:
            self.failed.set()
            raise self.failure
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        self.blobs[ref.digest] = data
        return ref

    def publish(self, publication: Publish) -> Answer:
        for ref in (publication.delta, publication.snapshot, publication.compact):
            assert ref is None or ref.digest in self.blobs, "announced before it was stored"
        msgspec.msgpack.decode(msgspec.msgpack.encode(publication), type=Publish)
        number = self.adopt.get(publication.version.root, publication.version.number)
        self.publications.append(publication)
        self.next_version = max(self.next_version, number + 1)
        step = publication.version.step
        return Answer(step, number, self.next_version, step in self.wants)

    def data(self, ref: BlobRef | None) -> bytes:
        assert ref is not None
        return self.blobs[ref.digest]


@pytest.fixture
def port() -> StoringPort:
    return StoringPort()


Make = Callable[..., Publisher]


@pytest.fixture
def publish_on() -> Iterator[Make]:
    """Publishers of one rank or of one of several, that are closed at the end."""
    made = []

    def make(model: Any, port: StoringPort | None, ranks: Ranks | None = None, lineage: int = 0, **options: Any) -> Publisher:
        welcome = None if port is None else LearnerWelcome(2, "run", lineage, port.next_version)
        published = options.pop("published", None)
        root = options.pop("base_root", lambda: "")
        publisher = Publisher(model, ranks or OneRank(), port, welcome, published, root, **options)  # type: ignore[arg-type]
        made.append(publisher)
        return publisher

    yield make
    for publisher in made:
        publisher.close()


def nudge(model: Any, scale: float) -> None:
    """Change every parameter in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def change_one(model: Any, step: int) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[step] += 1.0


def publish(publisher: Publisher, *steps: int) -> None:
    for step in steps:
        publisher.publish(step)
    publisher.flush()


def followed(port: StoringPort, held: Weights | None = None) -> list[Weights]:
    """The weights after each publication, as an actor gets to them: by its delta, or a snapshot where there is none."""
    found = []
    for publication in port.publications:
        if publication.delta is None:
            header, held = apply_file(port.data(publication.snapshot), None, "")
        else:
            assert held is not None
            header, held = apply_file(port.data(publication.delta), held, root_hash(held))
        assert root_hash(held) == publication.version.root == header.new_root
        assert header.to_version == publication.version.number
        found.append(held)
    return found


def slow_bf16(value: float) -> int:
    """Round half to even on the upper 16 bits of the float32 pattern."""
    pattern = int.from_bytes(torch.tensor([value]).numpy().tobytes(), "little")
    upper, lower = pattern >> 16, pattern & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper & 1 == 1))


def slow_weights(model: Any) -> Weights:
    """The weights to be published for a model as it is now, element by element."""
    return {
        name: Tensor(
            "BF16", tuple(parameter.shape), np.array([slow_bf16(value) for value in parameter.detach().flatten().tolist()], np.uint16)
        )
        for name, parameter in model.named_parameters()
    }


# --- the chain of versions


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_chain_of_deltas_gives_the_models_bits_at_every_step(
    threads: int, beside: bool, make_llama: Any, port: StoringPort, publish_on: Make
) -> None:
    model = make_llama(hidden=32)
    publisher = publish_on(model, port, threads=threads, beside=beside)
    expected = []
    for step, scale in enumerate([0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-5]):
        nudge(model, scale)
        expected.append(root_hash(published_weights(model)))
        publisher.publish(step)
    publisher.flush()
    assert [root_hash(weights) for weights in followed(port)] == expected
    assert [publication.version.step for publication in port.publications] == list(range(6))
    assert [publication.parent for publication in port.publications] == [-1, 0, 1, 2, 3, 4]
    assert publisher.published is not None
    assert publisher.published.version == port.publications[-1].version
    assert root_hash(publisher.published.weights) == expected[-1]


def test_published_weights_are_the_parameters_rounded_to_nearest_even_bf16(make_llama: Any) -> None:
    model = make_llama()
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[:4] = torch.tensor([1.00390625, 1.01171875, -0.0, 1e-40])
    assert root_hash(published_weights(model)) == root_hash(slow_weights(model))


def test_unchanged_weights_are_published_as_an_empty_delta_to_the_same_root(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    model = make_llama()
    publish(publish_on(model, port), 0, 1)
    first, second = port.publications
    assert read_header(port.data(second.delta)).num_changed == 0
    assert second.bound_bytes == 0
    assert second.version.root == first.version.root
    followed(port)


def test_what_is_announced_is_the_size_of_everything_and_the_bound_of_the_delta(
    make_llama: Any, port: StoringPort, publish_on: Make
) -> None:
    model = make_llama(hidden=64)
    publisher = publish_on(model, port)
    publish(publisher, 0)
    change_one(model, 1)
    publish(publisher, 1)
    first, second = port.publications
    assert first.full_bytes == first.bound_bytes == second.full_bytes == num_bytes(published_weights(model))
    assert second.delta is not None
    assert second.delta.size < second.full_bytes / 4
    assert second.bound_bytes == read_header(port.data(second.delta)).bound_bytes


def test_the_parts_of_a_publication_are_timed(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    ticks = iter(range(1000))
    publish(publish_on(make_llama(), port, beside=False, monotonic=lambda: float(next(ticks))), 0, 1)
    assert port.publications[1].seconds == dict.fromkeys(PARTS, 1.0)


def test_numbers_are_those_the_broker_gives_out(make_llama: Any, publish_on: Make) -> None:
    model, port = make_llama(), StoringPort(next_version=5)
    publisher = publish_on(model, port)
    for step in range(3):
        publish(publisher, step)
        change_one(model, step)
    assert [publication.version.number for publication in port.publications] == [5, 6, 7]
    assert [publication.parent for publication in port.publications] == [-1, 5, 6]


def test_an_adopted_version_number_is_the_parent_of_what_follows(make_llama: Any, publish_on: Make) -> None:
    """A replayed step that reproduces version 3 is known under 3, not under the number it was offered with."""
    model, port = make_llama(), StoringPort(next_version=8)
    publisher = publish_on(model, port, lineage=2)
    reproduced = published_weights(model)
    port.adopt[root_hash(reproduced)] = 3
    publish(publisher, 0)
    assert publisher.published is not None
    assert publisher.published.version == PolicyVersion(3, 0, 2, root_hash(reproduced))
    nudge(model, 1e-3)
    publish(publisher, 1)
    follower = port.publications[-1]
    assert (follower.parent, follower.version.number) == (3, 8)
    assert read_header(port.data(follower.delta)).from_version == 3
    followed(port)


def test_a_resumed_session_starts_its_first_delta_at_the_bits_published_before_the_checkpoint(
    make_llama: Any, port: StoringPort, publish_on: Make
) -> None:
    model = make_llama()
    first = publish_on(model, port)
    publish(first, 0)
    before = published_weights(model)
    nudge(model, 1e-3)
    publish(publish_on(model, port, lineage=1, published=first.published), 1)
    publication = port.publications[-1]
    assert (publication.parent, publication.version.lineage, publication.is_base) == (0, 1, False)
    _, weights = apply_file(port.data(publication.delta), before, root_hash(before))
    assert root_hash(weights) == root_hash(published_weights(model))


# --- the first version, snapshots, compact deltas


def saved(model: Any, folder: Path) -> Callable[[], str]:
    """The model's files, and what computes the root of their base."""
    model.save_pretrained(folder)
    return lambda: base_root(list(folder.glob("*.safetensors")))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_first_version_is_the_base_where_the_policys_files_are_these_weights(
    tie: bool, make_llama: Any, tmp_path: Path, port: StoringPort, publish_on: Make
) -> None:
    model = make_llama(tie=tie)
    publisher = publish_on(model, port, base_root=saved(model, tmp_path))
    publish(publisher, 0)
    (publication,) = port.publications
    assert publication.is_base
    assert (publication.parent, publication.delta, publication.snapshot) == (-1, None, None)
    assert port.blobs == {}
    assert publication.version.root == root_hash(slow_weights(model))
    start = published_weights(model)
    nudge(model, 1e-3)
    publish(publisher, 1)
    assert not port.publications[1].is_base
    _, weights = apply_file(port.data(port.publications[1].delta), start, root_hash(start))
    assert root_hash(weights) == root_hash(published_weights(model))


def test_the_first_version_is_a_snapshot_where_the_policys_files_are_other_weights(
    make_llama: Any, tmp_path: Path, port: StoringPort, publish_on: Make
) -> None:
    model = make_llama()
    other_root = saved(model, tmp_path)
    change_one(model, 0)
    publish(publish_on(model, port, base_root=other_root), 0)
    (publication,) = port.publications
    assert not publication.is_base
    assert (publication.parent, publication.delta) == (-1, None)
    (weights,) = followed(port)
    assert root_hash(weights) == root_hash(published_weights(model))


def test_the_first_version_is_a_snapshot_where_the_policys_files_give_no_base(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    publish(publish_on(make_llama(), port, base_root=lambda: ""), 0)
    assert port.publications[0].snapshot is not None
    assert not port.publications[0].is_base


def test_a_snapshot_comes_along_with_the_publication_after_the_broker_asked_for_one(make_llama: Any, publish_on: Make) -> None:
    model, port = make_llama(), StoringPort(wants=(0, 3, 4))
    publisher = publish_on(model, port)
    for step in range(7):
        publish(publisher, step)
        nudge(model, 1e-3)
    chain = followed(port)
    assert [publication.version.step for publication in port.publications if publication.snapshot] == [0, 1, 4, 5]
    assert all(publication.delta is not None for publication in port.publications[1:])
    for publication, weights in zip(port.publications, chain, strict=True):
        if publication.snapshot is not None:
            header, found = apply_file(port.data(publication.snapshot), None, "")
            assert header.new_root == publication.version.root
            assert root_hash(found) == root_hash(weights)


def test_compact_deltas_come_on_request_and_lead_to_the_same_weights(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    model = make_llama(hidden=64)
    publisher = publish_on(model, port, compact=True)
    for step in range(3):
        publish(publisher, step)
        nudge(model, 1e-4)
    before, *chain = followed(port)
    for publication, weights in zip(port.publications[1:], chain, strict=True):
        assert publication.compact != publication.delta
        _, found = apply_file(port.data(publication.compact), before, root_hash(before))
        assert root_hash(found) == root_hash(weights)
        before = weights


def test_without_request_there_are_no_compact_deltas(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    publish(publish_on(make_llama(), port), 0, 1)
    assert [publication.compact for publication in port.publications] == [None, None]


# --- beside the training loop


class GatedClock:
    """A clock that stops the publisher's own thread, before it does anything, until the gate is opened."""

    def __init__(self) -> None:
        self._main = threading.current_thread()
        self.gate = threading.Event()
        self.standing = threading.Event()

    def __call__(self) -> float:
        if threading.current_thread() is not self._main:
            self.standing.set()
            assert self.gate.wait(DEADLINE)
        return time.monotonic()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants", [(), (0,)], ids=["a delta", "and a snapshot"])
def test_what_is_published_beside_the_step_are_the_weights_at_the_time_of_publish(
    wants: tuple[int, ...], dtype: torch.dtype, make_llama: Any, make_training_batch: Any, publish_on: Make
) -> None:
    """The optimizer writes to the same memory while the thread works; none of it may be published."""
    model, port, clock = make_llama().to(dtype), StoringPort(wants=wants), GatedClock()
    trainer = Trainer(model, None, LearnerConfig(lr=1e-2), LossConfig(), 10, 1.0, OneRank())
    publisher = publish_on(model, port, monotonic=clock)
    publish(publisher, 0)
    trainer.apply(make_training_batch(0), 0)
    expected = slow_weights(model)
    publisher.publish(1)
    assert clock.standing.wait(DEADLINE)
    for step in range(1, 4):
        trainer.apply(make_training_batch(step), step)
    later = slow_weights(model)
    clock.gate.set()
    publisher.flush()
    assert root_hash(expected) != root_hash(later)
    _, found = followed(port)
    assert root_hash(found) == root_hash(expected)
    if wants:
        assert root_hash(apply_file(port.data(port.publications[1].snapshot), None, "")[1]) == root_hash(expected)
    # And the next delta starts there.
    publish(publisher, 4)
    assert root_hash(followed(port)[-1]) == root_hash(later)


def test_publish_returns_before_anything_is_stored(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    model = make_llama()
    publisher = publish_on(model, port)
    publish(publisher, 0)
    port.open.clear()
    nudge(model, 1e-3)
    publisher.publish(1)
    publisher.check()
    assert len(port.publications) == 1
    port.open.set()
    publisher.flush()
    assert len(port.publications) == 2
    publisher.check()


def test_the_weights_are_not_read_before_the_publication_before_is_announced(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    announced: list[int] = []

    class Watched:
        """A model that notes how much was announced whenever its weights are read."""

        def __init__(self, model: Any) -> None:
            self._model = model

        def named_parameters(self) -> Any:
            announced.append(len(port.publications))
            return self._model.named_parameters()

    model = make_llama()
    publisher = publish_on(Watched(model), port)
    announced.clear()
    publisher.publish(0)
    port.open.clear()
    publisher.publish(1)
    others = threading.Thread(target=lambda: (publisher.publish(2), publisher.publish(3)))
    others.start()
    port.open.set()
    others.join(DEADLINE)
    publisher.flush()
    assert announced == [0, 1, 2, 3]
    assert [publication.version.step for publication in port.publications] == [0, 1, 2, 3]
    assert [publication.version.number for publication in port.publications] == [0, 1, 2, 3]


def failing(make_llama: Any, port: StoringPort, publish_on: Make) -> Publisher:
    """A publisher whose publication of step 1 has failed beside the loop."""
    publisher = publish_on(make_llama(), port)
    publish(publisher, 0)
    port.failure = RequestRefused("blob", "the disk is full")
    publisher.publish(1)
    assert port.failed.wait(DEADLINE)
    return publisher


def test_an_error_of_a_publication_is_raised_by_flush(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    publisher = failing(make_llama, port, publish_on)
    with pytest.raises(RequestRefused, match="the disk is full"):
        publisher.flush()


def test_an_error_of_a_publication_is_raised_by_the_next_one_and_nothing_more_is_announced(
    make_llama: Any, port: StoringPort, publish_on: Make
) -> None:
    publisher = failing(make_llama, port, publish_on)
    port.failure = None
    with pytest.raises(RequestRefused, match="the disk is full"):
        publisher.publish(2)
    assert len(port.publications) == 1
    assert publisher.published is not None
    assert publisher.published.version == port.publications[0].version


def test_an_error_of_a_publication_is_raised_by_check_once_it_has_happened(make_llama: Any, port: StoringPort, publish_on: Make) -> None:
    publisher = failing(make_llama, port, publish_on)
    deadline = time.monotonic() + DEADLINE
    with pytest.raises(RequestRefused, match="the disk is full"):
        while time.monotonic() < deadline:
            publisher.check()


class LearnerPort(StoringPort):
    """A broker with one batch. From its delivery on nothing can be stored; the learner then waits for the next batch until the deadline."""

    def __init__(self, batch: ReceivedBatch) -> None:
        super().__init__()
        self.batches = [batch]
        self.committed: list[int] = []

    def join(self, step: int, world_size: int, environment: dict[str, str]) -> LearnerWelcome:
        return LearnerWelcome(2, "run", 0, 0)

    def next_batch(self, step: int, while_waiting: Callable[[], None]) -> ReceivedBatch:
        self.failure = RequestRefused("blob", "the disk is full")
        if self.batches:
            return self.batches.pop()
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            while_waiting()
        raise AssertionError("nobody noticed")

    def commit(self, step: int, batch: int, lags: list[int], metrics: dict[str, float], notes: Sequence[Note] = ()) -> None:
        self.committed.append(step)

    def evaluated(self, step: int, reward: float, num_prompts: int) -> None:
        pass

    def doing(self, text: str) -> None:
        pass


def some_group(ticket: int, num_completions: int) -> bytes:
    count = 3 * num_completions
    return encode_group(
        Group(
            ticket=ticket,
            prompt=ticket,
            seed=ticket,
            actor="a",
            engine="e",
            prompt_ids=np.array([3, 4], np.int32),
            num_tokens=np.full(num_completions, 3, np.int32),
            token_ids=np.arange(count, dtype=np.int32) % 5 + 3,
            logprobs=np.full(count, -2.0, np.float32),
            versions=np.zeros(count, np.int32),
            rewards=np.arange(num_completions, dtype=np.float32),
            finish=np.full(num_completions, FULL, np.uint8),
        )
    )


def test_a_learner_that_waits_for_a_batch_is_told_that_its_publication_failed(tiny_policy: Path, settings: Any, tmp_path: Path) -> None:
    config = Config.model_validate(settings())
    payloads = [some_group(ticket, config.rollout.group_size) for ticket in range(config.rollout.groups_per_batch)]
    port = LearnerPort(ReceivedBatch(0, payloads, {0: 0}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    learner = Learner(
        config,
        tiny_policy,
        "run",
        tmp_path,
        EvenDigits(),
        tokenizer,
        (2,),
        OneRank(),
        port,
        torch.device("cpu"),  # type: ignore[arg-type]
    )
    with pytest.raises(RequestRefused, match="the disk is full"):
        learner.run()
    assert port.batches == []
    assert port.committed == [0]
    assert [publication.is_base for publication in port.publications] == [True]


# --- many ranks


@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(1, 1000), max_size=30),
    world_size=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_every_name_is_the_share_of_exactly_one_rank_and_loads_are_even(sizes: dict[str, int], world_size: int, order: Any) -> None:
    shares = [share_of(sizes, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    # Whatever order a rank has the names in, as after a checkpoint.
    shuffled = list(sizes)
    order.shuffle(shuffled)
    assert [set(share_of({name: sizes[name] for name in shuffled}, rank, world_size)) for rank in range(world_size)] == [
        set(share) for share in shares
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_any_number_of_ranks_publishes_the_same_weights(world_size: int, make_llama: Any, publish_on: Make, on_ranks: Any) -> None:
    """With 40, most have no tensor to call their own."""
    alone, together = StoringPort(wants=(1,)), StoringPort(wants=(1,))
    models = [make_llama() for _ in range(world_size)]

    def run(ranks: Ranks, model: Any, port: StoringPort) -> Publisher:
        publisher = publish_on(model, port if ranks.rank == 0 else None, ranks, compact=True)
        generator = torch.Generator().manual_seed(5)
        for step in range(4):
            publisher.publish(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
        publisher.flush()
        return publisher

    run(OneRank(), make_llama(), alone)
    publishers = on_ranks(world_size, lambda ranks: run(ranks, models[ranks.rank], together))
    assert [p.version for p in together.publications] == [p.version for p in alone.publications]
    for found, expected in zip(followed(together), followed(alone), strict=True):
        assert root_hash(found) == root_hash(expected)
    for ours, theirs in zip(together.publications, alone.publications, strict=True):
        assert (ours.full_bytes, ours.bound_bytes) == (theirs.full_bytes, theirs.bound_bytes)
    assert together.publications[2].snapshot == alone.publications[2].snapshot
    held = [publisher.published.weights for publisher in publishers]
    whole = {name: tensor for share in held for name, tensor in share.items()}
    assert sum(len(share) for share in held) == len(whole)
    assert root_hash(whole) == alone.publications[-1].version.root


def test_only_rank_0_announces(make_llama: Any, publish_on: Make, on_ranks: Any) -> None:
    port = StoringPort()
    models = [make_llama() for _ in range(2)]

    def run(ranks: Ranks) -> Published | None:
        publisher = publish_on(models[ranks.rank], port if ranks.rank == 0 else None, ranks)
        publish(publisher, 0, 1)
        return publisher.published

    first, second = on_ranks(2, run)
    assert first.version == port.publications[-1].version
    assert second.version.number == -1
    assert len(port.publications) == 2


def test_a_delta_of_many_ranks_is_one_file_that_a_missing_part_makes_useless(make_llama: Any, publish_on: Make, port: StoringPort) -> None:
    """Rank 0 puts whatever shares it gets into the file; a share that was lost is found out by whoever applies it."""

    class Forgetful(OneRank):
        world_size = 2

        def gather(self, data: bytes) -> list[bytes] | None:
            return [data]

    model = make_llama()
    publisher = publish_on(model, port, Forgetful())
    publish(publisher, 0)
    start = published_weights(model)
    nudge(model, 1e-3)
    publish(publisher, 1)
    with pytest.raises(DamagedDelta):
        apply_file(port.data(port.publications[1].delta), start, root_hash(start))
