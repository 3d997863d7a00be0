"""Checkpoints: everything a learner needs to go on as if it had not stopped.

Invariant: a folder under its final name is complete; it gets that name by a rename after its bytes are on the disk.

    step-00000050/
        policy/                    config, tokenizer and fp32 weights, a Hugging Face folder that from_pretrained loads
        optimizer.safetensors      AdamW's moments, named after the parameters
        published/                 the bits published last, a file for each rank; only if they are not those of the policy, rounded
        state.json                 step, run, and the version published last
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from learner.model import published_weights
from learner.publish import Published, share_of
from learner.ranks import Ranks
from protocol import safetensors_file
from protocol.errors import CheckpointError
from protocol.weights import PolicyVersion, Weights, root_hash

PUBLISHED = "published"
NUM_KEPT = 3
"""Older checkpoints are removed."""


class CheckpointState(msgspec.Struct, frozen=True):
    """The small part of a checkpoint."""

    run: str
    step: int
    version: PolicyVersion


def save_checkpoint(
    folder: Path, run: str, step: int, published_step: int, trainer: Any, published: Published, tokenizer: Any, ranks: Ranks
) -> None:
    """Write the checkpoint of theta_step below `folder` and remove old ones; called on every rank, done when it returns.

    `published_step` is the step of the version published last.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if ranks.rank == 0 and not final.exists():
        shutil.rmtree(partial, ignore_errors=True)
        (partial / PUBLISHED).mkdir(parents=True)
    if ranks.broadcast(bytes([final.exists()]) if ranks.rank == 0 else None) == b"\x01":
        return
    if published_step != step:
        path = partial / PUBLISHED / f"rank-{ranks.rank:04d}.safetensors"
        path.write_bytes(safetensors_file.serialize(published.weights, {}))
    ranks.barrier()
    if ranks.rank == 0:
        _finish(folder, partial, final, CheckpointState(run, step, published.version), trainer, tokenizer)
    ranks.barrier()


def _finish(folder: Path, partial: Path, final: Path, state: CheckpointState, trainer: Any, tokenizer: Any) -> None:
    """Rank 0: what all ranks have in common, then the name."""
    trainer.model.save_pretrained(partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    save_file(_moments(trainer), partial / "optimizer.safetensors")
    (partial / "state.json").write_bytes(msgspec.json.encode(state))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-NUM_KEPT]:
        removing = old.with_name(f".{old.name}.removing")
        old.rename(removing)
        shutil.rmtree(removing)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def load_state(checkpoint: Path, run: str) -> CheckpointState:
    """The state of a checkpoint. Raises CheckpointError if it is not one of `run`."""
    try:
        state = msgspec.json.decode((checkpoint / "state.json").read_bytes(), type=CheckpointState)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}. Remove it to start from an older one.") from None
    if state.run != run:
        raise CheckpointError(f"checkpoint {checkpoint} belongs to run {state.run!r}, not to {run!r}. Give this run's folder.")
    return state


def load_published(checkpoint: Path, state: CheckpointState, model: Any, rank: int, world_size: int) -> Published:
    """A rank's share of the bits published last before the checkpoint; rank 0 verifies the whole. Raises CheckpointError or DamagedDelta.

    `model` has the checkpoint's weights.
    """
    weights: Weights = {}
    for path in sorted((checkpoint / PUBLISHED).glob("*.safetensors")):
        weights |= safetensors_file.deserialize(path.read_bytes())[1]
    weights = weights or published_weights(model)
    if rank == 0 and root_hash(weights) != state.version.root:
        raise CheckpointError(f"checkpoint {checkpoint} contradicts itself: its published weights are not those of its state. Remove it.")
    names = share_of({name: tensor.bits.nbytes for name, tensor in weights.items()}, rank, world_size)
    return Published(state.version, {name: weights[name] for name in names})


def load_optimizer(checkpoint: Path, trainer: Any) -> None:
    """Put AdamW's moments back."""
    tensors = load_file(checkpoint / "optimizer.safetensors")
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if set(tensors) != {f"{kind}/{name}" for name in names for kind in ("exp_avg", "exp_avg_sq", "step")}:
        raise CheckpointError(f"checkpoint {checkpoint} was made for another model. Give the run's own policy.")
    state = trainer.optimizer.state_dict()
    state["state"] = {
        index: {kind: tensors[f"{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")} for index, name in enumerate(names)
    }
    trainer.optimizer.load_state_dict(state)


def _moments(trainer: Any) -> dict[str, torch.Tensor]:
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    parameters = trainer.optimizer.param_groups[0]["params"]
    moments = {}
    for name, parameter in zip(names, parameters, strict=True):
        for kind, value in trainer.optimizer.state[parameter].items():
            moments[f"{kind}/{name}"] = value.detach().contiguous()
    return moments


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
