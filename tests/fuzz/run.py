"""Fuzz from the command line: `python -m tests.fuzz.run --target delta --inputs 100000 --seed 3`.

Prints one line of JSON for each target; the exit status is 1 if any broke the promise. `--log` names a file that says, at any moment, which inputs
are under way: what to look at if the process is found dead.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.fuzz import conversation, files, weights, wire
from tests.fuzz.fuzzing import Result, Target, fuzz


def all_targets() -> dict[str, Target]:
    """Every target by name."""
    return wire.targets() | files.targets() | weights.targets() | conversation.targets()


def inputs_of(name: str, total: int) -> int:
    """How many of `total` inputs over all targets are for this one."""
    targets = all_targets()
    return max(20, round(total * targets[name].share / sum(target.share for target in targets.values())))


def main(arguments: list[str]) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--target", action="append", choices=sorted(all_targets()), help="may be given more than once; default: all")
    parser.add_argument("--inputs", type=int, default=0, help="inputs for each target")
    parser.add_argument("--total", type=int, default=40_000, help="without --inputs: over all targets, by their shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the index of the first input")
    parser.add_argument("--log", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    logging.disable()  # warnings about hostile peers are as many as the inputs
    results: list[Result] = []
    with tempfile.TemporaryFile("w+") if chosen.log is None else chosen.log.open("w+") as log:
        for name in chosen.target or sorted(all_targets()):
            result = fuzz(name, all_targets()[name], chosen.seed, chosen.inputs or inputs_of(name, chosen.total), chosen.first, log)
            results.append(result)
            sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
            sys.stdout.flush()
            if result.failure:
                sys.stderr.write(f"{name}: {result.failure}\n")
    return int(any(result.failure for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
