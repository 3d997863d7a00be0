"""Whatever the network does between the broker and its peers, no acknowledged group is lost, none is trained on twice, no lag passes S, and the
run goes on by itself.

A real broker process; actors and a learner with real clients and traffic that checks itself. On loopback each reaches the broker by a link of its own
that fails on demand; in network namespaces each is a machine with a cable. How long everything took is printed (pytest -s), and fails nothing.
With `--soak`: every fault for everybody, one at a time, and partitions of a minute.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import zmq

from broker import limits
from broker.keys import load_key, make_keys
from broker.sockets import RENEW_SECONDS, Authenticator, Channel, Renewal, client_socket, server_socket
from protocol.messages import LEASE_SECONDS
from tests.faults.link import Link, Way
from tests.faults.netns import Cable, Hub, inside, why_not
from tests.faults.network import LEARNER, Noticed, Site, table

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
ACTORS: Final = ("toy-1", "toy-2", "toy-3")
BYSTANDER: Final = "toy-0"
"""The actor that nothing happens to."""
DEADLINE_MILLISECONDS: Final = 20_000
LONG_ENOUGH: Final = LEASE_SECONDS + 2.5
"""Seconds after which everybody must have noticed."""


class Fault(NamedTuple):
    """What happens to a link, for how long, and how that ends."""

    begin: Callable[[Link], object]
    end: Callable[[Link], object] = lambda link: None
    seconds: float = 0.0


def set_all(**changes: float) -> Callable[[Link], None]:
    """Change both directions of a link."""

    def change(link: Link) -> None:
        for road in link.roads.values():
            for name, value in changes.items():
                setattr(road, name, value)

    return change


def connect_anew(**changes: object) -> Callable[[Link], None]:
    """Change how a link takes connections, and cut those that there are."""

    def change(link: Link) -> None:
        for name, value in changes.items():
            setattr(link, name, value)
        link.cut()

    return change


FAULTS: Final[Mapping[str, Fault]] = {
    "cut": Fault(Link.cut),
    "cut on the way to the broker": Fault(lambda link: link.cut(Way.UP)),
    "cut on the way from the broker": Fault(lambda link: link.cut(Way.DOWN)),
    "reset": Fault(Link.reset),
    "one block in ten has a wrong bit": Fault(set_all(num_since=0, flip_every=10), set_all(flip_every=0), 2.0),
    "20 kB/s": Fault(set_all(bytes_per_second=20e3), set_all(bytes_per_second=float("inf")), 2.0),
    "50 to 150 ms each way": Fault(set_all(delay=0.05, jitter=0.1), set_all(delay=0.0, jitter=0.0), 2.0),
    "a second until accepted": Fault(connect_anew(accept_delay=1.0), lambda link: setattr(link, "accept_delay", 0.0), 2.0),
    "new connections lead nowhere": Fault(connect_anew(is_black_hole=True), lambda link: setattr(link, "is_black_hole", False), 2.0),
    "silent both ways": Fault(Link.hold, Link.release, LONG_ENOUGH),
    "silent to the broker": Fault(lambda link: link.hold(ways=[Way.UP]), Link.release, LONG_ENOUGH),
    "silent from the broker": Fault(lambda link: link.hold(ways=[Way.DOWN]), Link.release, LONG_ENOUGH),
}
ROUNDS: Final[tuple[tuple[str, ...], ...]] = (
    ("cut", "50 to 150 ms each way", "a second until accepted", "reset"),
    ("one block in ten has a wrong bit", "silent to the broker", "new connections lead nowhere", "silent from the broker"),
)
"""What happens at the same time to the three actors and the learner, in the short version."""
LONG_ROUNDS: Final[tuple[tuple[str, ...], ...]] = (
    *(tuple(fault if victim in (peer, None) else "" for peer in range(4)) for fault in FAULTS for victim in (0, 3, None)),
    *(("cut", "reset", "cut", "reset"),) * 12,
)
"""Every fault for one actor, for the learner, for all four; and then cuts, again and again."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A run of which nothing has been started."""
    made = Site(tmp_path / "run")
    yield made
    made.close()


def test_no_fault_of_a_link_loses_or_repeats_a_group_and_the_run_goes_on(site: Site, soak: bool) -> None:
    rows: list[Noticed] = []
    site.start_broker()
    address = site.run.broker_address()
    assert address is not None
    with ExitStack() as stack:
        links = {name: stack.enter_context(Link(address)) for name in (*ACTORS, LEARNER)}
        for name, link in links.items():
            site.start(name, link.address)
        site.start(BYSTANDER, address)
        site.wait_for_work([*links, BYSTANDER], time.time())
        for names in LONG_ROUNDS if soak else ROUNDS:
            happening = {peer: fault for peer, fault in zip(links, names, strict=True) if fault}
            rows += _suffer(site, links, happening)
        verdict = site.finish()
        num_flipped = sum(len(road.flipped) for link in links.values() for road in link.roads.values())
    sys.stdout.write(f"\n{table(rows, verdict)}\n{num_flipped} bits flipped\n")
    assert verdict.findings == []
    assert num_flipped > 0
    _assert_noticed(rows)


def _suffer(site: Site, links: Mapping[str, Link], happening: Mapping[str, str]) -> list[Noticed]:
    """Let faults happen at the same time, each for its own time, and wait until everybody's work has gone on."""
    site.wait_until_heard()
    begun, healed = dict[str, float](), dict[str, float]()
    for peer, fault in happening.items():
        begun[peer] = time.time()
        FAULTS[fault].begin(links[peer])
    for peer, fault in sorted(happening.items(), key=lambda item: FAULTS[item[1]].seconds):
        site.pass_time(begun[peer] + FAULTS[fault].seconds - time.time())
        healed[peer] = time.time()
        FAULTS[fault].end(links[peer])
    for peer in happening:
        site.wait_for_work([peer], healed[peer])
    return [site.noticed(fault, peer, begun[peer], healed[peer], links[peer]) for peer, fault in happening.items()]


def _assert_noticed(rows: list[Noticed]) -> None:
    """A silence that lasted long enough was noticed by both sides, and the tickets that were out were given to others."""
    for row in rows:
        if row.lasted >= LONG_ENOUGH:
            assert row.broker_said is not None or "from" in row.fault, row  # the broker still hears one that does not hear it
            assert row.peer_said is not None or "to" in row.fault or row.peer == LEARNER, row


CUT_OFF: Final[Mapping[str, Callable[[Cable], None]]] = {
    "the link is down": Cable.pull,
    "packets are lost both ways": lambda cable: cable.lose(*Way),
    "packets to the broker are lost": lambda cable: cable.lose(Way.UP),
    "packets from the broker are lost": lambda cable: cable.lose(Way.DOWN),
}


class Machines(NamedTuple):
    """A run of which every process has a machine of its own."""

    site: Site
    hub: Hub
    cables: dict[str, Cable]
    port: int

    def start(self, name: str) -> None:
        """Start a process on its machine, which is new if there is none."""
        if name not in self.cables:
            self.cables[name] = self.hub.plug(name)
        self.site.start(name, f"tcp://{self.cables[name].address}:{self.port}", self.hub.machine(name))

    def vanish(self, name: str) -> None:
        """Take a machine away while it has tickets: its cable first, so that nobody hears of the end of its process."""
        self.site.stop_with_tickets(name)
        self.cables.pop(name).remove()
        self.site.kill(name)
        self.hub.delete(name)

    def cut_off(self, happening: Mapping[str, tuple[str, float]]) -> list[Noticed]:
        """Cut machines off, each in its way for so many seconds, and wait until everybody's work has gone on."""
        self.site.wait_until_heard()
        begun, healed = time.time(), dict[str, float]()
        for peer, (fault, _) in happening.items():
            CUT_OFF[fault](self.cables[peer])
        for peer, (_, seconds) in sorted(happening.items(), key=lambda item: item[1][1]):
            self.site.pass_time(begun + seconds - time.time())
            healed[peer] = time.time()
            self.cables[peer].mend()
        for peer in happening:
            self.site.wait_for_work([peer], healed[peer])
        return [self.site.noticed(fault, peer, begun, healed[peer]) for peer, (fault, _) in happening.items()]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """A run with a broker, a learner and three actors on five machines."""
    if reason := why_not():
        pytest.skip(reason)
    with Hub() as hub:
        site = Site(tmp_path / "run")
        try:
            host = hub.plug("").address
            port = site.start_broker(inside(hub.name), "tcp://0.0.0.0:0", host)
            made = Machines(site, hub, {}, port)
            names = [LEARNER, BYSTANDER, *ACTORS]
            for name in names:
                made.start(name)
            site.wait_for_work(names, time.time())
            yield made
        finally:
            site.close()


def test_who_is_cut_off_loses_its_tickets_to_others_and_comes_back_and_so_may_the_name_of_a_machine_that_vanished(
    machines: Machines, soak: bool
) -> None:
    site = machines.site
    gone, blip, lossy = ACTORS
    begun = time.time()
    machines.vanish(gone)
    rows = machines.cut_off(
        {
            blip: ("the link is down", 6.0),
            lossy: ("packets are lost both ways", LONG_ENOUGH),
            LEARNER: ("packets from the broker are lost", LONG_ENOUGH),
        }
    )
    site.until(lambda: site.left(gone, begun) is not None, "the lease of a machine that vanished ends", LONG_ENOUGH)
    healed = time.time()
    machines.start(gone)
    site.wait_for_work([gone], healed)
    rows.append(site.noticed("its machine vanishes", gone, begun, healed))
    for fault in CUT_OFF if soak else ():
        for peers, seconds in (([blip, lossy], 6.0), ([LEARNER], 6.0), ([blip, lossy, LEARNER], 60.0)):
            rows += machines.cut_off(dict.fromkeys(peers, (fault, seconds)))
    verdict = site.finish()
    sys.stdout.write(f"\n{table(rows, verdict)}\n")
    assert verdict.findings == []
    unnoticed = [row for row in rows if row.lasted >= LONG_ENOUGH and row.broker_said is None and "from" not in row.fault]
    assert unnoticed == []
    assert rows[3].reissued is not None, "the tickets of the machine that vanished were given to nobody"


def test_a_client_that_was_greeted_with_nonsense_connects_again(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    broker, actor = (load_key(tmp_path / "keys" / f"{name}.key") for name in ("broker", "actor"))
    context: zmq.Context[Any] = zmq.Context()
    authenticator = Authenticator(context, {"there": {actor.public}})
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        where = f"tcp://127.0.0.1:{proxy.getsockname()[1]}"
        dealer = client_socket(context, where, Channel.CONTROL, actor, b"toy-1/1")
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(where)
        connection, _ = proxy.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            assert monitor.poll(DEADLINE_MILLISECONDS), "it did not mind"
    router = server_socket(context, "there", broker, limits.control())
    router.bind(where)
    renewal, now = Renewal(dealer, where), time.monotonic()
    renewal.consider(now, now + RENEW_SECONDS)
    assert not dealer.poll(500, zmq.POLLOUT), "libzmq itself has connected again: it needs no renewal any more"
    renewal.consider(now, now + RENEW_SECONDS + 0.1)
    assert dealer.poll(DEADLINE_MILLISECONDS, zmq.POLLOUT), "it has no connection"
    dealer.send(b"here")
    assert router.poll(DEADLINE_MILLISECONDS)
    assert router.recv_multipart() == [b"toy-1/1", b"here"]
    dealer.disable_monitor()
    for opened in (monitor, dealer, router):
        opened.close(linger=0)
    authenticator.close()
    context.term()
