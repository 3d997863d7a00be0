"""Checkpoints: everything a learner needs to go on as if it had not stopped.

Invariant: a folder under its final name is complete; it gets that name by a rename after its bytes are on the disk. A full disk is waited for,
and holds only what had a name before.

    step-00000050/
        policy/                    config, tokenizer and fp32 weights, a Hugging Face folder that from_pretrained loads
        optimizer.safetensors      AdamW's moments, named after the parameters
        published/                 the bits published last, a file for each rank; only if they are not those of the policy, rounded
        state.json                 step, run, the version published last, and the digests of all other files (learner.damage)
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from learner.damage import STATE_NAME, CheckpointState, digests_of, list_checkpoints, load_state
from learner.model import published_weights
from learner.publish import Published, share_of
from learner.ranks import Ranks
from protocol import safetensors_file
from protocol.errors import CheckpointError
from protocol.weights import Weights, root_hash

__all__ = ["CheckpointState", "list_checkpoints", "load_optimizer", "load_published", "load_state", "save_checkpoint"]
PUBLISHED = "published"
MARGIN_BYTES = 16 << 20
"""Tokenizer, configuration, headers."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM_TEXT = f"os error {errno.ENOSPC}"
"""What the error of a library that writes by itself says."""
NUM_KEPT = 3
"""Older checkpoints are removed."""


def save_checkpoint(
    folder: Path,
    run: str,
    step: int,
    published_step: int,
    trainer: Any,
    published: Published,
    tokenizer: Any,
    ranks: Ranks,
    *,
    beside: Callable[[Path], None] = lambda folder: None,
    beside_bytes: int = 0,
    keep: Path | None = None,
    wait: Callable[[str], None],
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> None:
    """Write the checkpoint of theta_step below `folder` and remove old ones; called on every rank, done when it returns.

    `beside` writes what else belongs in it, `beside_bytes` in all; `keep` is an old one not to be removed.
    `published_step` is the step of the version published last. While the disk has no room (`free` says how many bytes), `wait` is called on
    rank 0 with the reason, and lets a second pass; it may raise to end the wait.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    state = CheckpointState(run, step, published.version)
    needed = bytes_needed(trainer, with_published=published_step != step) + beside_bytes
    is_written = final.exists() if ranks.rank == 0 else False
    while ranks.broadcast(bytes([is_written]) if ranks.rank == 0 else None) == b"\x00":
        if ranks.rank == 0:
            _clear(folder, partial, needed, free, wait)
        ranks.barrier()
        has_room = published_step == step or _unless_full(_write_share, partial, ranks.rank, published)
        num_full = torch.tensor([float(not has_room)], device=trainer.device)
        ranks.sum_(num_full)
        if ranks.rank == 0:
            if num_full.item() or not _unless_full(_finish, folder, partial, final, state, trainer, tokenizer, beside):
                shutil.rmtree(partial, ignore_errors=True)
                wait(f"the disk became full while the checkpoint was being written to {folder}; free space there, it goes on by itself")
            is_written = final.exists()
    if ranks.rank == 0:
        _remove_old(folder, keep)
    ranks.barrier()


def bytes_needed(trainer: Any, *, with_published: bool) -> int:
    """About how many bytes a checkpoint takes: fp32 weights, two moments, and the bits published last if they are stored beside."""
    parameters = list(trainer.model.parameters())
    weights: int = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    moments: int = sum(2 * parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)
    published: int = sum(2 * parameter.numel() for parameter in parameters) if with_published else 0
    return weights + moments + published + MARGIN_BYTES


def _clear(folder: Path, partial: Path, needed: int, free: Callable[[Path], int], wait: Callable[[str], None]) -> None:
    """An empty folder to write to, once there is room for what it will hold."""
    shutil.rmtree(partial, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    while (found := free(folder)) < needed:
        wait(
            f"waiting for room for the checkpoint: {found >> 20} MiB free at {folder}, {-(-needed >> 20)} MiB needed; "
            "free space there, it goes on by itself"
        )
    (partial / PUBLISHED).mkdir(parents=True)


def _unless_full(write: Callable[..., None], *arguments: Any) -> bool:
    """Whether there was room for what `write` writes. Other errors are raised."""
    try:
        write(*arguments)
    except Exception as error:
        if getattr(error, "errno", None) in NO_ROOM or NO_ROOM_TEXT in str(error):
            return False
        raise
    return True


def _write_share(partial: Path, rank: int, published: Published) -> None:
    path = partial / PUBLISHED / f"rank-{rank:04d}.safetensors"
    path.write_bytes(safetensors_file.serialize(published.weights, {}))


def _finish(
    folder: Path, partial: Path, final: Path, state: CheckpointState, trainer: Any, tokenizer: Any, beside: Callable[[Path], None]
) -> None:
    """Rank 0: what all ranks have in common, then the name."""
    trainer.model.save_pretrained(partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    save_file(_moments(trainer), partial / "optimizer.safetensors")
    beside(partial)
    (partial / STATE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(state, digests=digests_of(partial))))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(final)
    _sync(folder)


def _remove_old(folder: Path, keep: Path | None) -> None:
    for old in [old for old in list_checkpoints(folder)[:-NUM_KEPT] if old != keep]:
        removing = old.with_name(f".{old.name}.removing")
        old.rename(removing)
        shutil.rmtree(removing)


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
    """Put AdamW's moments back; there are none where no update was applied before."""
    tensors = load_file(checkpoint / "optimizer.safetensors")
    if not tensors:
        return
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
