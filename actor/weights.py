"""The weights an actor holds, and how it gets to the newest ones.

Invariant: when nothing is being staged, the shadow has the root hash of `version`; a shadow of which that is not known is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from actor.shadow import Shadow, StagedWeights, shadow_folders
from protocol import safetensors_file
from protocol.base import WEIGHTS_SUFFIX, base_layout, base_tensors
from protocol.delta import Delta, apply_file, apply_in_place, read_header
from protocol.errors import DamagedDelta, RequestRefused, RootMismatch, WeightsError, WrongParent
from protocol.messages import NamedBlob, Route
from protocol.ports import ActorPort
from protocol.weights import BlobRef, PolicyVersion, Tensor

log = logging.getLogger("actor")
ATTEMPTS = 5
"""Ways tried before giving up: one from what is held, the others from nothing."""
PAUSE_SECONDS = 2.0
"""Before the third way; twice as long before each further one, half a minute in all, in which the learner may publish another version."""


class Arrival(NamedTuple):
    """What the last version took to get here: bytes, and seconds of fetching and of staging (decode, apply, verify)."""

    num_bytes: int
    fetching: float
    staging: float


class HeldWeights:
    """The newest verified weights on this side."""

    def __init__(
        self,
        port: ActorPort,
        policy_files: Sequence[NamedBlob],
        folders: Sequence[Path] | None = None,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        """`policy_files` are those of the run's policy; the shadow lies in the first of `folders` with room."""
        self._port, self._pause_seconds = port, pause_seconds
        self._base_files = [file.blob for file in policy_files if file.name.endswith(WEIGHTS_SUFFIX)]
        self._folders = shadow_folders() if folders is None else folders
        self.version: PolicyVersion | None = None
        self.arrival = Arrival(0, 0.0, 0.0)
        self._shadow: Shadow | None = None

    @property
    def number(self) -> int:
        """Number of the version held, -1 for none."""
        return -1 if self.version is None else self.version.number

    async def advance(self) -> StagedWeights | None:
        """Fetch what leads to the newest version, stage it, verify it and hold it. None if there is nothing newer.

        A way that does not lead there is not repaired: everything held is dropped, and the next way starts from nothing. Raises WeightsError
        if that fails time after time.
        """
        failed = ""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._follow(await self._port.route(self.number, failed))
            except (WeightsError, RequestRefused) as error:
                if attempt == ATTEMPTS:
                    raise
                log.warning("starting again from nothing: %s", error)
                failed = str(error)[:1000]
                self.drop()
                if attempt > 1:
                    await asyncio.sleep(self._pause_seconds * 2 ** (attempt - 2))
        raise AssertionError("the last attempt returns or raises")

    def drop(self) -> None:
        """Forget everything held."""
        self.version = None
        if self._shadow is not None:
            self._shadow.close()
            self._shadow = None

    async def _follow(self, route: Route) -> StagedWeights | None:
        if route.version is None or route.version.number == self.number:
            return None
        self.arrival = Arrival(0, 0.0, 0.0)
        changed: dict[str, object] | None = None
        root = self.version.root if self.version is not None else ""
        if route.start != "held":
            self.drop()
            root = await self._start(route)
        self.version = None  # until the shadow has arrived
        for number, blob in enumerate(route.deltas):
            path = await self._fetch(blob)
            started = time.monotonic()
            root, found = await asyncio.to_thread(self._stage, path, root)
            self.arrival = self.arrival._replace(staging=self.arrival.staging + time.monotonic() - started)
            changed = found if number == 0 and route.start == "held" and len(route.deltas) == 1 else None
            self._port.forget(blob)
        if self._shadow is None or root != route.version.root:
            raise RootMismatch(route.version.root, root, f"the files on the way to version {route.version.number}")
        self.version = route.version
        return StagedWeights(route.version, self._shadow.weights, self._shadow.path, changed)

    async def _start(self, route: Route) -> str:
        """A fresh shadow where the way starts; its root."""
        if route.start == "base":
            paths = [await self._fetch(blob) for blob in self._base_files]
            return await asyncio.to_thread(self._fill_from_base, paths)
        if route.snapshot is None:
            raise DamagedDelta("the way starts at a snapshot and names none")
        root = await asyncio.to_thread(self._fill_from_snapshot, await self._fetch(route.snapshot))
        self._port.forget(route.snapshot)
        return root

    async def _fetch(self, blob: BlobRef) -> Path:
        started = time.monotonic()
        path = await self._port.fetch(blob)
        before = self.arrival
        self.arrival = before._replace(num_bytes=before.num_bytes + blob.size, fetching=before.fetching + time.monotonic() - started)
        return path

    def _fill_from_base(self, paths: list[Path]) -> str:
        self._shadow = Shadow(base_layout(paths), self._folders)
        self._shadow.fill(base_tensors(paths))
        return self._shadow.root()

    def _fill_from_snapshot(self, path: Path) -> str:
        data = _mapped(path)
        if read_header(data).kind != "snapshot":
            raise DamagedDelta("this is a delta, a snapshot was expected")
        self._replace_shadow(safetensors_file.deserialize(data)[1])
        assert self._shadow is not None
        return self._shadow.root()

    def _replace_shadow(self, tensors: dict[str, Tensor]) -> None:
        before, self._shadow = self._shadow, Shadow({name: (t.dtype, t.shape) for name, t in tensors.items()}, self._folders)
        self._shadow.fill(tensors.items())
        if before is not None:
            before.close()

    def _stage(self, path: Path, held_root: str) -> tuple[str, dict[str, object] | None]:
        """Apply a delta to the shadow; the new root, verified, and what changed (None: the shadow is a new one).

        Raises WeightsError; the shadow is then worth nothing.
        """
        data = _mapped(path)
        header = read_header(data)
        if self._shadow is None or header.parent_root != held_root:
            raise WrongParent(header.parent_root, held_root)
        self._shadow.check()
        delta = Delta(data)
        if not delta.keeps_layout:
            self._replace_shadow(apply_file(data, self._shadow.weights, held_root)[1])
            return header.new_root, None
        changed: dict[str, object] = dict(apply_in_place(delta, self._shadow.weights))
        found = self._shadow.root(changed)
        if found != header.new_root:
            raise RootMismatch(header.new_root, found, f"version {header.to_version} after decoding")
        return found, changed


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise DamagedDelta("it is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
