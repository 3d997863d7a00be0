"""Checkpoints: going on as if nothing had happened, completeness, and whose they are."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from learner.checkpoint import (
    MARGIN_BYTES,
    NUM_KEPT,
    PUBLISHED,
    bytes_needed,
    list_checkpoints,
    load_optimizer,
    load_published,
    load_state,
    save_checkpoint,
)
from learner.model import load_model, published_weights
from learner.publish import Published, share_of
from learner.ranks import OneRank, Ranks
from learner.step import Trainer
from learner.supervised import character_tokenizer
from protocol import safetensors_file
from protocol.config import LearnerConfig, LossConfig
from protocol.errors import CheckpointError, DamagedDelta
from protocol.weights import PolicyVersion, Tensor, Weights, root_hash

CONFIG = LearnerConfig(lr=1e-2, schedule="cosine", warmup_steps=1, weight_decay=0.01)
TOKENIZER = character_tokenizer(["0123456789+-*/= abcdefghi"])


def make_trainer(model: Any, loss: LossConfig | None = None) -> Trainer:
    return Trainer(model, None, CONFIG, loss or LossConfig(), 10, 1.0, OneRank())


def publication(model: Any, step: int, number: int = 0) -> Published:
    weights = published_weights(model)
    return Published(PolicyVersion(number, step, 0, root_hash(weights)), weights)


def never(reason: str) -> None:
    raise AssertionError(reason)


def save(folder: Path, step: int, trainer: Trainer, published: Published, tokenizer: Any = TOKENIZER, run: str = "run") -> Path:
    """The checkpoint of a learner of one rank."""
    save_checkpoint(folder, run, step, published.version.step, trainer, published, tokenizer, OneRank(), wait=never)
    return folder / f"step-{step:08d}"


def restore(checkpoint: Path, rank: int = 0, world_size: int = 1) -> Published:
    model = load_model(checkpoint / "policy", torch.device("cpu"))
    return load_published(checkpoint, load_state(checkpoint, "run"), model, rank, world_size)


def sizes_of(weights: Weights) -> dict[str, int]:
    return {name: tensor.bits.nbytes for name, tensor in weights.items()}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def resumed(checkpoint: Path, loss: LossConfig | None = None) -> Trainer:
    trainer = make_trainer(load_model(checkpoint / "policy", torch.device("cpu")), loss)
    load_optimizer(checkpoint, trainer)
    return trainer


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_resumed_learner_goes_on_bit_for_bit(tie: bool, tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    batches = [make_training_batch(number) for number in range(4)]
    trainer = make_trainer(make_llama(tie=tie))
    for step in range(2):
        trainer.apply(batches[step], step)
    checkpoint = save(tmp_path, 2, trainer, publication(trainer.model, 2))
    uninterrupted = [trainer.apply(batches[step], step) for step in (2, 3)]

    other = resumed(checkpoint)
    assert load_state(checkpoint, "run").step == 2
    assert [other.apply(batches[step], step) for step in (2, 3)] == uninterrupted
    assert_same_bits(bits(other.model), bits(trainer.model))
    assert root_hash(published_weights(other.model)) == root_hash(published_weights(trainer.model))


def test_a_learner_resumed_in_the_middle_of_a_reused_batch_goes_on_bit_for_bit(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    """(With an importance cap it could not; the learner writes checkpoints between batches only.)"""
    loss = LossConfig()
    batch = make_training_batch(0)
    trainer = make_trainer(make_llama(), loss)
    for step in range(2):
        trainer.apply(batch, step)
    checkpoint = save(tmp_path, 2, trainer, publication(trainer.model, 2))
    for step in (2, 3):
        trainer.apply(batch, step)

    other = resumed(checkpoint, loss)
    for step in (2, 3):
        other.apply(batch, step)
    assert_same_bits(bits(other.model), bits(trainer.model))


def test_saving_does_not_disturb_the_run(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    with_saving, without = make_trainer(make_llama()), make_trainer(make_llama())
    for step in range(3):
        batch = make_training_batch(step)
        with_saving.apply(batch, step)
        without.apply(batch, step)
        save(tmp_path, step + 1, with_saving, publication(with_saving.model, step + 1))
    assert_same_bits(bits(with_saving.model), bits(without.model))


# --- the bits published last


def test_published_bits_come_back_with_the_same_root(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    trainer = make_trainer(make_llama())
    published = publication(trainer.model, 0, number=7)
    trainer.apply(make_training_batch(), 0)
    checkpoint = save(tmp_path, 1, trainer, published)
    found = restore(checkpoint)
    assert found.version == published.version
    assert root_hash(found.weights) == published.version.root
    assert root_hash(published_weights(trainer.model)) != published.version.root


def test_bits_that_the_policys_own_weights_give_are_not_stored_beside_them(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    published = publication(trainer.model, 1, number=4)
    checkpoint = save(tmp_path, 1, trainer, published)
    assert list((checkpoint / PUBLISHED).iterdir()) == []
    found = restore(checkpoint)
    assert found.version == published.version
    assert root_hash(found.weights) == published.version.root


def checkpoint_of_ranks(
    folder: Path, world_size: int, published_step: int, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> Path:
    """A checkpoint of step 1 that so many ranks wrote together; version 7 was published at `published_step`."""
    trainer = make_trainer(make_llama())
    before = publication(trainer.model, 0, number=7)
    trainer.apply(make_training_batch(), 0)
    published = publication(trainer.model, 1, number=7) if published_step == 1 else before

    def write(ranks: Ranks) -> None:
        names = share_of(sizes_of(published.weights), ranks.rank, ranks.world_size)
        # Only rank 0 knows the version; the others hold their share of the bits.
        version = published.version if ranks.rank == 0 else PolicyVersion(-1, -1, -1, "")
        share = Published(version, {name: published.weights[name] for name in names})
        save_checkpoint(folder, "run", 1, published_step, trainer, share, TOKENIZER, ranks, wait=never)
        assert len(list_checkpoints(folder)) == 1, "returned before it was done"

    on_ranks(world_size, write)
    (checkpoint,) = list_checkpoints(folder)
    return checkpoint


@pytest.mark.parametrize("published_step", [0, 1])
@pytest.mark.parametrize("written_by", [1, 2, 3, 40])
def test_any_number_of_ranks_takes_over_from_any_other(
    written_by: int, published_step: int, tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    checkpoint = checkpoint_of_ranks(tmp_path, written_by, published_step, make_llama, make_training_batch, on_ranks)
    assert len(list((checkpoint / PUBLISHED).iterdir())) == (0 if published_step == 1 else written_by)
    root = load_state(checkpoint, "run").version.root
    for world_size in (1, 2, 3, 40):
        shares = [restore(checkpoint, rank, world_size) for rank in range(world_size)]
        assert {share.version for share in shares} == {PolicyVersion(7, published_step, 0, root)}
        whole = {name: tensor for share in shares for name, tensor in share.weights.items()}
        assert sum(len(share.weights) for share in shares) == len(whole)
        assert root_hash(whole) == root
        # Each rank has the share that a publisher of that many ranks diffs.
        for rank, share in enumerate(shares):
            assert set(share.weights) == set(share_of(sizes_of(whole), rank, world_size))


def test_a_checkpoint_that_exists_already_is_left_alone_by_all_ranks(
    tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    checkpoint = checkpoint_of_ranks(tmp_path, 2, 0, make_llama, make_training_batch, on_ranks)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    checkpoint_of_ranks(tmp_path, 3, 1, make_llama, make_training_batch, on_ranks)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


def test_what_more_ranks_left_of_an_interrupted_checkpoint_does_not_get_into_a_later_one(
    tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    stale = tmp_path / ".step-00000001.partial" / PUBLISHED
    stale.mkdir(parents=True)
    (stale / "rank-0002.safetensors").write_bytes(b"of another world size")
    checkpoint = checkpoint_of_ranks(tmp_path, 2, 0, make_llama, make_training_batch, on_ranks)
    assert [path.name for path in sorted((checkpoint / PUBLISHED).iterdir())] == ["rank-0000.safetensors", "rank-0001.safetensors"]
    restore(checkpoint)


def flip_the_last_bit(files: list[Path]) -> None:
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(bytes(data))


def cut_one_short(files: list[Path]) -> None:
    files[0].write_bytes(files[0].read_bytes()[:-1])


def lose_one(files: list[Path]) -> None:
    files[1].unlink()


def lose_all(files: list[Path]) -> None:
    for path in files:
        path.unlink()


def exchange_contents_of_a_tensor(files: list[Path]) -> None:
    _, tensors = safetensors_file.deserialize(files[0].read_bytes())
    name = next(iter(tensors))
    bits = tensors[name].bits[::-1].copy()
    files[0].write_bytes(safetensors_file.serialize(tensors | {name: Tensor("BF16", tensors[name].shape, bits)}, {}))


@pytest.mark.parametrize("harm", [flip_the_last_bit, cut_one_short, lose_one, lose_all, exchange_contents_of_a_tensor])
def test_published_bits_that_contradict_the_state_are_refused(
    harm: Any, tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    checkpoint = checkpoint_of_ranks(tmp_path, 3, 0, make_llama, make_training_batch, on_ranks)
    harm(sorted((checkpoint / PUBLISHED).iterdir()))
    with pytest.raises((CheckpointError, DamagedDelta)):
        restore(checkpoint, 0, 2)


def test_a_policy_that_does_not_give_the_version_of_the_state_is_refused(
    tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    checkpoint = checkpoint_of_ranks(tmp_path, 2, 1, make_llama, make_training_batch, on_ranks)
    make_llama(seed=9).save_pretrained(checkpoint / "policy")
    with pytest.raises(CheckpointError, match="contradicts itself"):
        restore(checkpoint)


# --- whose they are, and completeness


def saved(folder: Path, step: int, make_llama: Any, make_training_batch: Any, run: str = "run") -> Path:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(groups=1, group_size=2), 0)
    return save(folder, step, trainer, publication(trainer.model, step), run=run)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    checkpoint = saved(tmp_path, 1, make_llama, make_training_batch, run="yesterday")
    with pytest.raises(CheckpointError, match="yesterday"):
        load_state(checkpoint, "today")


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"run": "run"}', b'{"run": "run", "step": "two"}', b"\xff\xfe"])
def test_a_checkpoint_whose_state_cannot_be_read_is_refused(
    content: bytes | None, tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    if content is not None:
        (checkpoint / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_state(checkpoint, "run")


def test_moments_of_another_model_are_refused(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    checkpoint = saved(tmp_path, 1, make_llama, make_training_batch)
    with pytest.raises(CheckpointError):
        load_optimizer(checkpoint, make_trainer(make_llama(layers=1)))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    for step in (5, 10, 95, 100, 1000):
        saved(tmp_path, step, make_llama, make_training_batch)
    assert NUM_KEPT == 3
    assert [load_state(path, "run").step for path in list_checkpoints(tmp_path)] == [95, 100, 1000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000095", "step-00000100", "step-00001000"]


def test_a_checkpoint_that_was_interrupted_is_not_listed_and_does_not_stand_in_the_way(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    class Interrupted(Exception):
        pass

    class FailingTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise Interrupted

    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    with pytest.raises(Interrupted):
        save(tmp_path, 1, trainer, publication(trainer.model, 1), FailingTokenizer())
    assert list(tmp_path.iterdir())
    assert list_checkpoints(tmp_path) == []
    checkpoint = save(tmp_path, 1, trainer, publication(trainer.model, 1))
    assert list_checkpoints(tmp_path) == [checkpoint]
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "never made") == []


def test_the_policy_of_a_checkpoint_is_a_folder_that_from_pretrained_loads(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    checkpoint = saved(tmp_path, 1, make_llama, make_training_batch)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "policy")
    assert tokenizer.decode(tokenizer.encode("12+3=", add_special_tokens=False)) == "12+3="
    assert load_model(checkpoint / "policy", torch.device("cpu")).dtype == torch.float32


# --- a full disk


class Disk:
    """A disk that has more room each time it is waited for; `reasons` are what was said meanwhile, `partial` what was there then."""

    def __init__(self, folder: Path, free: list[int]) -> None:
        self._folder, self._free = folder, free
        self.reasons: list[str] = []
        self.partial: list[Path] = []

    def free(self, folder: Path) -> int:
        assert folder == self._folder
        return self._free[0]

    def wait(self, reason: str) -> None:
        self._free.pop(0)
        self.reasons.append(reason)
        self.partial += self._folder.glob(".*")


class FullOnce:
    """Stands for a library that writes a file and finds the disk full, the first time."""

    def __init__(self, error: Exception) -> None:
        self._errors = [error]

    def save_pretrained(self, folder: Path) -> None:
        (folder / "half.json").write_text("half")
        if self._errors:
            raise self._errors.pop()
        TOKENIZER.save_pretrained(folder)


def test_a_checkpoint_waits_for_room_before_it_writes_and_says_for_how_much(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    needed = bytes_needed(trainer, with_published=False)
    disk = Disk(tmp_path, [3 << 20, needed - 1, needed])
    published = publication(trainer.model, 1)
    save_checkpoint(tmp_path, "run", 1, 1, trainer, published, TOKENIZER, OneRank(), wait=disk.wait, free=disk.free)
    assert len(disk.reasons) == 2
    assert f"3 MiB free at {tmp_path}, {-(-needed >> 20)} MiB needed" in disk.reasons[0]
    assert disk.partial == []
    assert restore(tmp_path / "step-00000001").version == published.version


@pytest.mark.parametrize("with_published", [False, True])
def test_a_checkpoint_takes_no_more_room_than_it_waits_for(
    with_published: bool, tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    checkpoint = save(tmp_path, 1, trainer, publication(trainer.model, 0 if with_published else 1))
    taken = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    needed = bytes_needed(trainer, with_published=with_published)
    assert needed - MARGIN_BYTES <= taken <= needed


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_becomes_full_meanwhile_leaves_nothing_of_the_checkpoint_and_it_is_written_again(
    error: Exception, tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    disk = Disk(tmp_path, [1 << 40, 1 << 40])
    published = publication(trainer.model, 1)
    save_checkpoint(tmp_path, "run", 1, 1, trainer, published, FullOnce(error), OneRank(), wait=disk.wait, free=disk.free)
    assert len(disk.reasons) == 1 and "became full" in disk.reasons[0]
    assert disk.partial == [], "half a checkpoint takes room from what would free some"
    assert restore(tmp_path / "step-00000001").version == published.version


def test_a_disk_that_is_broken_is_not_waited_for(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(), 0)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 1, trainer, publication(trainer.model, 1), FullOnce(OSError(errno.EIO, "Input/output error")))


def test_a_share_that_has_no_room_holds_up_all_ranks_and_all_write_again(
    tmp_path: Path, make_llama: Any, make_training_batch: Any, on_ranks: Any
) -> None:
    trainer = make_trainer(make_llama())
    published = publication(trainer.model, 0, number=7)
    trainer.apply(make_training_batch(), 0)
    disk = Disk(tmp_path, [1 << 40, 1 << 40])

    class Share:
        """The bits of rank 1, which cannot be written the first time."""

        version = published.version
        num_failures = 1

        def __init__(self, names: list[str]) -> None:
            self._names = names

        @property
        def weights(self) -> Weights:
            if self._names and Share.num_failures and self._names[0] in shares[1]:
                Share.num_failures -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return {name: published.weights[name] for name in self._names}

    shares = [share_of(sizes_of(published.weights), rank, 2) for rank in range(2)]

    def write(ranks: Ranks) -> None:
        share: Any = Share(shares[ranks.rank])
        wait = disk.wait if ranks.rank == 0 else never
        save_checkpoint(tmp_path, "run", 1, 0, trainer, share, TOKENIZER, ranks, wait=wait, free=disk.free)

    on_ranks(2, write)
    assert len(disk.reasons) == 1 and disk.partial == []
    assert root_hash(restore(tmp_path / "step-00000001").weights) == published.version.root
