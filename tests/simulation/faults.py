"""The faults, one function each: `befall[kind](world)`. Whatever a fault breaks it also mends after a while, if `World.mend` does not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from broker.core import LEARNER
from broker.room import reserves
from protocol import messages
from tests.simulation.disk import PLENTY
from tests.simulation.schedule import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

BROKER = "broker"


def broker_dies(world: World) -> None:
    if world.host.broker is not None:
        world.host.die(power=world.schedule.random.random() < 0.5)


def broker_dies_in_an_operation(world: World) -> None:
    world.host.disk.operations_left = world.schedule.random.randint(1, 6)


def disk_is_full(world: World) -> None:
    """At once, before the broker has looked: a commit may fail."""
    _fill(world, world.schedule.random.choice([0, 100, 3000]))


def disk_fills_up(world: World) -> None:
    """To where the broker stops issuing tickets, or journalling anything; no commit fails."""
    marks = reserves(world.plan.config, 0)
    _fill(world, int(world.schedule.random.choice([marks.commit / 4, marks.commit, marks.credit * 0.9, marks.credit * 1.1])))


def _fill(world: World, room: int) -> None:
    disk, random = world.host.disk, world.schedule.random
    disk.capacity = room + PLENTY - disk.room() if disk.capacity == PLENTY else disk.capacity
    world.schedule.after(random.uniform(0.5, 10.0), lambda: setattr(disk, "capacity", PLENTY))


def syncs_fail(world: World) -> None:
    disk, random = world.host.disk, world.schedule.random
    disk.sync_failures = random.choice([0.05, 0.5, 1.0])
    world.schedule.after(random.uniform(0.5, 8.0), lambda: setattr(disk, "sync_failures", 0.0))


def learner_dies(world: World) -> None:
    if world.learner is not None:
        world.learner.kill("killed")


def learner_freezes(world: World) -> None:
    """Perhaps for so long that somebody starts another one, and then it goes on."""
    if world.learner is not None and not world.is_over:
        _freeze(world, world.learner)
        if world.schedule.random.random() < 0.4:
            world.start_learner()


def actor_dies(world: World) -> None:
    if (actor := world.some_actor()) is not None:
        actor.kill("killed")


def actor_freezes(world: World) -> None:
    if (actor := world.some_actor()) is not None:
        _freeze(world, actor)


def machine_vanishes(world: World) -> None:
    """Nothing on it is ever started again; another machine takes its place, under another name."""
    if (actor := world.some_actor()) is not None:
        world.vanished.add(actor.actor)
        actor.kill("its machine vanished")


def link_is_cut(world: World) -> None:
    random, network = world.schedule.random, world.network
    peer = random.choice([LEARNER, *sorted(world.actors)])
    ways = random.choice([[(peer, BROKER)], [(BROKER, peer)], [(peer, BROKER), (BROKER, peer)]])
    holds = random.random() < 0.5
    for way in ways:
        network.cut(*way, holds=holds)
        world.schedule.after(random.choice([0.5, 3.0, 12.0]) * random.random(), lambda way=way: network.mend(*way))


def weather_changes(world: World) -> None:
    random = world.schedule.random
    peer = random.choice([LEARNER, *sorted(world.actors)])
    for way in ((peer, BROKER), (BROKER, peer)):
        world.network.link(*way).weather = world.plan.weather(random)


def wall_clock_jumps(world: World) -> None:
    world.jump += world.schedule.random.choice([-86400.0, -60.0, 60.0, 86400.0])
    world.num_jumps += 1


def actors_are_desired(world: World) -> None:
    most = 2 * world.plan.num_actors
    world.host.ask(messages.SetActors(world.schedule.random.randint(0, most)))


def run_is_stopped(world: World) -> None:
    world.host.ask(messages.StopRun("enough"))


def bit_flips(world: World) -> None:
    """In a committed transaction that others follow; the broker then reads its journal again."""
    host = world.host
    begins = host.transactions
    if host.broker is not None and len(begins) > 2:
        number = world.schedule.random.randrange(len(begins) - 2)
        offset = world.schedule.random.randrange(begins[number], begins[number + 1])
        (file,) = host.disk.files.values()
        file.flip(offset, world.schedule.random.randrange(8))
        host.flipped = offset
        host.die(power=False)


def _freeze(world: World, process: Process) -> None:
    process.freeze()
    world.schedule.after(world.schedule.random.choice([1.0, 5.0, 20.0]) * world.schedule.random.random(), process.thaw)


befall: dict[str, Callable[[World], None]] = {
    fault.__name__: fault
    for fault in (
        broker_dies,
        broker_dies_in_an_operation,
        disk_is_full,
        disk_fills_up,
        syncs_fail,
        learner_dies,
        learner_freezes,
        actor_dies,
        actor_freezes,
        machine_vanishes,
        link_is_cut,
        weather_changes,
        wall_clock_jumps,
        actors_are_desired,
        run_is_stopped,
        bit_flips,
    )
}
"""Every fault by its name."""
