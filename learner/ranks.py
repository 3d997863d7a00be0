"""The ranks of a learner: one, or many under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from learner.pulse import START_SECONDS, Pulse

NO_DEADLINE = timedelta(days=365)
"""For collectives: rank 0 may rightly wait for long while the others wait for it. What ends a wait for a rank that is lost is its pulse."""
START_DEADLINE = timedelta(seconds=START_SECONDS)
"""For all ranks to find the store where they meet."""


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
    """Ranks under torchrun, by torch.distributed. Their pulses are watched (learner.pulse); `waits` says which ranks are silent."""

    def __init__(self, device: torch.device) -> None:
        """Join the process group that torchrun's environment names."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous("env://", timeout=START_DEADLINE))
        self.rank, self.world_size, self._device = rank, world_size, device
        self._pulse = Pulse(store.clone(), rank, world_size)
        self._pulse.start()
        with self._inside():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=NO_DEADLINE)
            self._side = dist.new_group(backend="gloo", timeout=NO_DEADLINE)

    @property
    def waits(self) -> str:
        return self._pulse.waits

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """In a collective of the training thread."""
        self._pulse.enter()
        yield
        self._pulse.leave()

    def broadcast(self, data: bytes | None) -> bytes:
        with self._inside():
            return self._broadcast(data)

    def _broadcast(self, data: bytes | None) -> bytes:
        size = torch.tensor([len(data or b"")], dtype=torch.int64, device=self._device)
        dist.broadcast(size, 0)
        if data is None:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        else:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        dist.broadcast(buffer, 0)
        return buffer.cpu().numpy().tobytes() if data is None else data

    def sum_(self, tensor: torch.Tensor) -> None:
        with self._inside():
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.current_stream().synchronize()  # on an accelerator the call itself does not wait

    def barrier(self) -> None:
        with self._inside():
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
        self._pulse.stop()
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ
