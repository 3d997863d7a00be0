"""The weights an actor holds, and how it gets to the newest ones.

Invariant: `held` has the root hash of `version`, checked after every step of the way.
"""

from __future__ import annotations

import asyncio
import logging

from protocol.delta import apply_file
from protocol.errors import DamagedDelta, RootMismatch, WeightsError
from protocol.ports import ActorPort
from protocol.weights import PolicyVersion, Weights

log = logging.getLogger("actor")


class HeldWeights:
    """The newest verified weights on this side."""

    def __init__(self, port: ActorPort) -> None:
        self._port = port
        self.version: PolicyVersion | None = None
        self._weights: Weights | None = None

    @property
    def number(self) -> int:
        """Number of the version held, -1 for none."""
        return -1 if self.version is None else self.version.number

    async def advance(self) -> tuple[PolicyVersion, Weights] | None:
        """Fetch what leads to the newest version, verify it and hold it. None if there is nothing newer.

        A file that does not lead there is not repaired: everything held is dropped, and the way starts from a snapshot. Raises
        WeightsError if that fails too.
        """
        try:
            return await self._follow()
        except WeightsError as error:
            log.warning("starting again from a snapshot: %s", error)
            self.version, self._weights = None, None
            return await self._follow()

    async def _follow(self) -> tuple[PolicyVersion, Weights] | None:
        route = await self._port.route(self.number)
        if route.version is None or route.version.number == self.number:
            return None
        if not route.blobs:
            raise DamagedDelta(f"no files lead from version {self.number} to version {route.version.number}")
        weights, root = self._weights, self.version.root if self.version else ""
        for blob in route.blobs:
            data = await self._port.fetch(blob)
            header, weights = await asyncio.to_thread(apply_file, data, weights, root)
            root = header.new_root
        if weights is None or root != route.version.root:
            raise RootMismatch(route.version.root, root, f"the files on the way to version {route.version.number}")
        self.version, self._weights = route.version, weights
        return route.version, weights
