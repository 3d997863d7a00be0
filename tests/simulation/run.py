"""One seed from the command line: `python -m tests.simulation.run --seed 1234 --trace` prints the order of events."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.simulation.account import Violation
from tests.simulation.world import World


def simulate(seed: int, *, keep_trace: bool = False, **defect: object) -> World:
    """Run one seed in a folder of its own. Raises Violation; its notes tell how to see it again."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(seed, Path(directory), keep_trace=keep_trace, **defect)
        try:
            world.run()
        except Violation as error:
            error.add_note(f"seed {seed}; see it with: python -m tests.simulation.run --seed {seed} --trace")
            if keep_trace and world.schedule.trace is not None:
                error.add_note("\n".join(world.schedule.trace))
            raise
        return world


def main() -> int:
    """Run the seeds asked for; 1 if one of them breaks a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds from there")
    parser.add_argument("--trace", action="store_true", help="print every event")
    arguments = parser.parse_args()
    logging.disable()
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        try:
            world = simulate(seed, keep_trace=arguments.trace)
        except Violation as error:
            failed += 1
            sys.stdout.write("\n".join([*getattr(error, "__notes__", [])[1:], f"seed {seed}: {error}\n"]))
        else:
            trace = world.schedule.trace or []
            counts = ", ".join(f"{what} {count}" for what, count in sorted(world.checks.counts.items()))
            sys.stdout.write(
                "\n".join([*trace, f"seed {seed}: {world.schedule.num_events} events, {world.schedule.now:.0f} s; {counts}\n"])
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
