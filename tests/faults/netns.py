"""Machines of their own: network namespaces on this one, each joined to the broker's by a cable that can be pulled.

Invariant: everything made here has the tag of this run in its name, and is gone when the `Hub` ends, however it ends. Nothing reaches beyond this
machine: the broker listens in the hub, and the only cable from there to the machine itself is point to point.

A direction of a cable loses its packets by addressing them to a machine that is not there; nothing else of the kernel is needed than namespaces and
veth pairs.
"""

from __future__ import annotations

import os
import subprocess
from types import TracebackType
from typing import Final

from tests.faults.link import Way

NOBODY: Final = "02:00:00:00:00:01"
"""A link-layer address that no end of a cable has."""


def why_not() -> str:
    """Why namespaces cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Hub() as hub:
            hub.plug("probe")
    except FileNotFoundError:
        return "there is no `ip` command (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    return ""


class Cable:
    """Joins a machine to the hub. `address` is the hub's end as the machine sees it."""

    def __init__(self, hub: str, machine: str, number: int, tag: str) -> None:
        """`machine` is a namespace; empty for the one that this process is in."""
        self._hub, self._machine = hub, machine
        self.near, self.far = f"s{tag}n{number}", f"s{tag}f{number}"
        self.address, self._own = f"198.18.{number}.1", f"198.18.{number}.2"
        ip("link", "add", self.far, "type", "veth", "peer", "name", self.near)
        ip("link", "set", self.near, "netns", hub)
        if machine:
            ip("link", "set", self.far, "netns", machine)
        for place, end, address in ((hub, self.near, self.address), (machine, self.far, self._own)):
            ip("address", "add", f"{address}/30", "dev", end, place=place)
            ip("link", "set", end, "up", place=place)

    def pull(self) -> None:
        """The link is down at both ends; the hub's port is what goes."""
        ip("link", "set", self.near, "down", place=self._hub)

    def lose(self, *ways: Way) -> None:
        """Packets in these directions get lost; neither end is told."""
        if Way.UP in ways:
            ip("neighbour", "replace", self.address, "lladdr", NOBODY, "dev", self.far, "nud", "permanent", place=self._machine)
        if Way.DOWN in ways:
            ip("neighbour", "replace", self._own, "lladdr", NOBODY, "dev", self.near, "nud", "permanent", place=self._hub)

    def mend(self) -> None:
        """Everything is carried again."""
        ip("link", "set", self.near, "up", place=self._hub)
        for place, end, address in ((self._machine, self.far, self.address), (self._hub, self.near, self._own)):
            if NOBODY in ip("neighbour", "show", "dev", end, place=place):
                ip("neighbour", "delete", address, "dev", end, place=place)

    def remove(self) -> None:
        """There is no such cable any more: what either end sends reaches nobody, and nobody is told."""
        ip("link", "delete", self.near, place=self._hub)


class Hub:
    """The namespace that the broker is in, and those of the machines."""

    def __init__(self) -> None:
        self._tag = os.urandom(2).hex()
        self.name = f"slipstream-{self._tag}-hub"
        self._namespaces: list[str] = []
        self._cables: list[Cable] = []

    def __enter__(self) -> Hub:
        try:
            self._make(self.name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Processes in a namespace must have ended by now: it lives as long as they do. Its cables go with it."""
        for cable in self._cables:
            subprocess.run(["ip", "link", "delete", cable.far], capture_output=True, check=False)  # those that end on this machine itself
        for name in reversed(self._namespaces):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def plug(self, machine: str) -> Cable:
        """A cable to a new machine, or to this one if `machine` is empty."""
        if machine:
            self._make(self.machine(machine))
        self._cables.append(Cable(self.name, self.machine(machine) if machine else "", len(self._cables) + 1, self._tag))
        return self._cables[-1]

    def machine(self, name: str) -> str:
        """The namespace of a machine."""
        return f"slipstream-{self._tag}-{name}"

    def delete(self, machine: str) -> None:
        """The machine's namespace is deleted."""
        self._namespaces.remove(self.machine(machine))
        subprocess.run(["ip", "netns", "delete", self.machine(machine)], capture_output=True, check=True)

    def _make(self, name: str) -> None:
        ip("netns", "add", name)
        self._namespaces.append(name)
        ip("link", "set", "lo", "up", place=name)


def inside(namespace: str) -> list[str]:
    """What goes before a command so that it runs in a namespace; the process is the command's own."""
    return ["ip", "netns", "exec", namespace]


def ip(*arguments: str, place: str = "") -> str:
    """Run `ip`, in a namespace unless `place` is empty; what it printed. Raises CalledProcessError, FileNotFoundError."""
    command = ["ip", *(("-netns", place) if place else ()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
