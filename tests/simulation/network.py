"""A network that loses, delays, repeats, reorders and splits.

Invariant: what arrives is what was sent, byte for byte; nothing else is promised. A link is one direction between two peers. Links that keep
order are like TCP connections that are cut now and then; the others are worse than anything TCP does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.schedule import Schedule

Delivery = Callable[[], None]


@dataclass(slots=True)
class Weather:
    """What a link does to messages. Times are in seconds, the others are probabilities."""

    delay: float = 0.002
    jitter: float = 0.002
    loss: float = 0.0
    repeats: float = 0.0
    keeps_order: bool = True


@dataclass(slots=True)
class Link:
    """One direction between two peers."""

    weather: Weather
    is_cut: bool = False
    holds: bool = False
    """Whether what is sent while the link is cut arrives once it is mended, or never."""
    held: list[Delivery] = field(default_factory=list)
    last: float = 0.0


class Network:
    """All links, made when they are first used."""

    def __init__(self, schedule: Schedule, weather: Callable[[], Weather]) -> None:
        self._schedule, self._weather = schedule, weather
        self._links: dict[tuple[str, str], Link] = {}

    def link(self, source: str, target: str) -> Link:
        """The link from `source` to `target`."""
        if (source, target) not in self._links:
            self._links[source, target] = Link(self._weather())
        return self._links[source, target]

    def send(self, source: str, target: str, deliver: Delivery) -> None:
        """Let `deliver` happen once, never, or more than once."""
        link, random = self.link(source, target), self._schedule.random
        if link.is_cut:
            if link.holds:
                link.held.append(deliver)
            return
        if random.random() < link.weather.loss:
            return
        self._carry(link, deliver)
        if random.random() < link.weather.repeats:
            self._carry(link, deliver)

    def cut(self, source: str, target: str, *, holds: bool) -> None:
        """Nothing gets through from now on."""
        link = self.link(source, target)
        link.is_cut, link.holds = True, holds

    def mend(self, source: str, target: str) -> None:
        """Messages get through again."""
        link = self.link(source, target)
        link.is_cut = False
        held, link.held = link.held, []
        for deliver in held:
            self._carry(link, deliver)

    def clear_up(self) -> None:
        """From now on every link delivers everything, in order and at once."""
        for source, target in list(self._links):
            self._links[source, target].weather = Weather()
            self.mend(source, target)
        self._weather = Weather

    @property
    def num_held(self) -> int:
        """How many messages wait for a link to be mended."""
        return sum(len(link.held) for link in self._links.values())

    def _carry(self, link: Link, deliver: Delivery) -> None:
        weather = link.weather
        arrival = self._schedule.now + weather.delay + weather.jitter * self._schedule.random.expovariate(1.0)
        if weather.keeps_order:
            arrival = link.last = max(link.last + 1e-6, arrival)
        self._schedule.after(arrival - self._schedule.now, deliver)
