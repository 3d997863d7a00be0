"""The ranks of a learner: one, or many under torchrun."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """What the learner asks of its fellow ranks. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank; the other ranks pass None."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over the ranks."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def gather(self, data: bytes) -> list[bytes] | None:
        """Every rank's bytes on rank 0, None elsewhere. For one thread beside the one that makes all other calls."""


class OneRank:
    """A learner of one process without torch.distributed."""

    rank = 0
    world_size = 1

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data

    def sum_(self, tensor: torch.Tensor) -> None:
        pass

    def barrier(self) -> None:
        pass

    def gather(self, data: bytes) -> list[bytes] | None:
        return [data]


class TorchRanks:
    """Ranks under torchrun, by torch.distributed."""

    def __init__(self, device: torch.device) -> None:
        """Join the process group that torchrun's environment names."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Rank 0 may wait long for a batch while the others wait for rank 0; the broker's heartbeats find a dead learner much sooner.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        self._side = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.rank, self.world_size, self._device = dist.get_rank(), dist.get_world_size(), device

    def broadcast(self, data: bytes | None) -> bytes:
        size = torch.tensor([len(data or b"")], dtype=torch.int64, device=self._device)
        dist.broadcast(size, 0)
        if data is None:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        else:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        dist.broadcast(buffer, 0)
        return buffer.cpu().numpy().tobytes() if data is None else data

    def sum_(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, data: bytes) -> list[bytes] | None:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._side)
        if self.rank:
            if data:
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=self._side)
            return None
        found = [data]
        for rank in range(1, self.world_size):
            buffer = torch.empty(int(sizes[rank]), dtype=torch.uint8)
            if buffer.numel():
                dist.recv(buffer, rank, group=self._side)
            found.append(buffer.numpy().tobytes())
        return found

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ
