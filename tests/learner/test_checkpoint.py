"""Checkpoints: going on as if nothing had happened, completeness, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from learner.checkpoint import NUM_KEPT, list_checkpoints, load_optimizer, load_published, load_state, save_checkpoint
from learner.model import load_model, published_weights
from learner.publish import Published
from learner.ranks import OneRank
from learner.step import Trainer
from learner.supervised import character_tokenizer
from protocol.config import LearnerConfig, LossConfig
from protocol.errors import CheckpointError, SlipstreamError
from protocol.weights import PolicyVersion, root_hash

CONFIG = LearnerConfig(lr=1e-2, schedule="cosine", warmup_steps=1, weight_decay=0.01)
TOKENIZER = character_tokenizer(["0123456789+-*/= abcdefghi"])


def make_trainer(model: Any, loss: LossConfig | None = None) -> Trainer:
    return Trainer(model, None, CONFIG, loss or LossConfig(), 10, 1.0, OneRank())


def publication(model: Any, step: int, number: int = 0) -> Published:
    weights = published_weights(model)
    return Published(PolicyVersion(number, step, 0, root_hash(weights)), weights, 1234)


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
    checkpoint = save_checkpoint(tmp_path, "run", 2, trainer, publication(trainer.model, 2), TOKENIZER)
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
    checkpoint = save_checkpoint(tmp_path, "run", 2, trainer, publication(trainer.model, 2), TOKENIZER)
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
        save_checkpoint(tmp_path, "run", step + 1, with_saving, publication(with_saving.model, step + 1), TOKENIZER)
    assert_same_bits(bits(with_saving.model), bits(without.model))


def test_published_bits_come_back_with_the_same_root(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    trainer = make_trainer(make_llama())
    published = publication(trainer.model, 0, number=7)
    trainer.apply(make_training_batch(), 0)
    checkpoint = save_checkpoint(tmp_path, "run", 1, trainer, published, TOKENIZER)
    found = load_published(checkpoint, load_state(checkpoint, "run"))
    assert found.version == published.version
    assert found.bytes_since_snapshot == 1234
    assert root_hash(found.weights) == published.version.root
    assert root_hash(published_weights(trainer.model)) != published.version.root


def test_damaged_published_bits_are_refused(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    checkpoint = saved(tmp_path, 1, make_llama, make_training_batch)
    path = checkpoint / "published.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(SlipstreamError):
        load_published(checkpoint, load_state(checkpoint, "run"))


def saved(folder: Path, step: int, make_llama: Any, make_training_batch: Any, run: str = "run") -> Path:
    trainer = make_trainer(make_llama())
    trainer.apply(make_training_batch(groups=1, group_size=2), 0)
    return save_checkpoint(folder, run, step, trainer, publication(trainer.model, step), TOKENIZER)


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
        save_checkpoint(tmp_path, "run", 1, trainer, publication(trainer.model, 1), FailingTokenizer())
    assert list(tmp_path.iterdir())
    assert list_checkpoints(tmp_path) == []
    checkpoint = save_checkpoint(tmp_path, "run", 1, trainer, publication(trainer.model, 1), TOKENIZER)
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
