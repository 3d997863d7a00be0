"""The shadow: an actor's own copy of the published weights, in a file that engines map.

Invariant: the file has the layout of a safetensors file and is as large as that says, every byte of it reserved before it is written to; who
changes the weights sees to it that nobody reads them meanwhile.

It lies in /dev/shm, where engines in other processes read it without a copy. Where that is too small (containers give 64 MB by default) it
lies in the folder for temporary files instead. A shadow is locked while its process lives; unlocked ones are left-overs of processes that were
killed, and are removed by the next one. (Process numbers would not do: containers that share /dev/shm do not see each other's, and use the same.)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protocol import safetensors_file
from protocol.errors import ShadowLost
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, root_of_digests, tensor_digest

log = logging.getLogger("actor")
PREFIX = "slipstream-shadow-"
HASH_THREADS = max(1, min(8, (os.cpu_count() or 1) // 4))
"""A new version should not wait long to be verified, nor take the engine's cores from it."""
_SUFFIX = ".safetensors"


class StagedWeights(NamedTuple):
    """Weights ready to be taken over by an engine, until the next version is staged.

    `path` is a safetensors file with them. `changed` are the tensors that differ from the version before, each with the flat positions that
    do (None: most of them); without it, everything is to be taken over.
    """

    version: PolicyVersion
    weights: Weights
    path: Path
    changed: Mapping[str, Any] | None

    def whole(self) -> StagedWeights:
        """The same weights for an engine whose own are not those of the version before."""
        return self._replace(changed=None)


class Shadow:
    """Weights in a mapped file."""

    def __init__(self, layout: Mapping[str, tuple[str, tuple[int, ...]]], folders: Sequence[Path]) -> None:
        """Room for tensors of the given dtypes and shapes, in the first of `folders` that has it. Raises ShadowLost if none has."""
        for name, (dtype, _) in layout.items():
            if dtype not in DTYPE_BITS:
                raise ShadowLost(f"tensor {name!r} has dtype {dtype}, weights are {', '.join(DTYPE_BITS)}")
        header, size = safetensors_file.header_of(layout)
        self.path, self._file = _reserve(size, folders)
        self._release = weakref.finalize(self, _release, self.path, self._file)  # also if nobody closes it
        self._size = size
        self._map = mmap.mmap(self._file, size)
        self._map[: len(header)] = header
        self.weights: Weights = {}
        self._digests: dict[str, bytes] = {}
        offset = len(header)
        for name, (dtype, shape) in layout.items():
            count = int(np.prod(shape, dtype=np.int64))
            bits = np.frombuffer(self._map, DTYPE_BITS[dtype], count, offset)
            self.weights[name] = Tensor(dtype, shape, bits)
            offset += bits.nbytes

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors in. Raises ShadowLost for one that the layout does not have like this, or if one is missing."""
        missing = set(self.weights)
        for name, tensor in tensors:
            place = self.weights.get(name)
            if place is None or (place.dtype, place.shape) != (tensor.dtype, tensor.shape):
                raise ShadowLost(f"tensor {name!r} {tensor.dtype}{list(tensor.shape)} has no place in it")
            place.bits[:] = tensor.bits
            missing.discard(name)
        if missing:
            raise ShadowLost(f"nothing was written to {sorted(missing)[:3]}")
        self._digests.clear()

    def root(self, changed: Iterable[str] | None = None) -> str:
        """The root hash. Only the tensors `changed` are read again, or all."""
        for name in self.weights if changed is None or not self._digests else changed:
            self._digests[name] = tensor_digest(self.weights[name], HASH_THREADS)
        return root_of_digests({name: (t.dtype, t.shape, self._digests[name]) for name, t in self.weights.items()})

    def check(self) -> None:
        """Raise ShadowLost if the file was removed, replaced or cut short: touching it then would end the process, or engines read another."""
        try:
            named = self.path.stat()
        except OSError as error:
            raise ShadowLost(f"{self.path}: {error.strerror}") from None
        ours = os.fstat(self._file)
        if (named.st_ino, named.st_dev) != (ours.st_ino, ours.st_dev) or ours.st_size != self._size:
            raise ShadowLost(f"{self.path} was replaced or cut short")

    def close(self) -> None:
        """Remove the file. The memory goes when the last view of it goes."""
        self.weights = {}
        self._release()
        with contextlib.suppress(BufferError):
            self._map.close()


def shadow_folders() -> list[Path]:
    """Where a shadow may lie, best first; with left-overs of dead processes removed."""
    shared = Path("/dev/shm")
    folders = [folder for folder in (shared, Path(tempfile.gettempdir())) if folder.is_dir()]
    for folder in folders:
        for path in folder.glob(f"{PREFIX}*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                _remove_left_over(path)
    return folders


def _remove_left_over(path: Path) -> None:
    """Remove a shadow that no process holds, and what engines put beside it under its name. Raises OSError if a process does hold it."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.info("removing %s, whose process is gone", path)
        for beside in path.parent.glob(f"{path.stem}.*"):
            beside.unlink()
    finally:
        os.close(file)


def _reserve(size: int, folders: Sequence[Path]) -> tuple[Path, int]:
    """A new file with `size` bytes that are really there: writing to a sparse one kills the process when the file system is full."""
    problems = []
    for folder in folders:
        try:
            path, file = _locked_file(folder)
            try:
                os.posix_fallocate(file, 0, size)
            except OSError:
                _release(path, file)
                raise
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
            log.warning("no room for %d MB of weights in %s (%s)", size >> 20, folder, error.strerror)
        else:
            return path, file
    raise ShadowLost(f"there is no room for {size} bytes of weights: {'; '.join(problems)}. Free some, or enlarge /dev/shm")


def _locked_file(folder: Path) -> tuple[Path, int]:
    """A new file that this process holds."""
    while True:
        file, name = tempfile.mkstemp(prefix=f"{PREFIX}{os.getpid()}-", suffix=_SUFFIX, dir=folder)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return Path(name), file
        os.close(file)  # another process took it for a left-over before it was locked


def _release(path: Path, file: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(file)
