"""One target, many inputs: what each must keep to, and how a failure says how to see it again.

Promise: whatever the bytes, a target returns or raises the errors it names; nothing crashes, hangs, or takes memory out of proportion.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TextIO

import msgspec

from tests.fuzz.mutate import Damage, damage_bytes

CPU_SECONDS: Final = 10.0
"""No input may take more; the slowest take some milliseconds."""
HANG_SECONDS: Final = 60.0
"""A block of inputs that takes longer than this ends the process, with every thread's stack."""
BLOCK: Final = 64
INPUT_GROWTH: Final = 96 << 20
"""The peak of resident memory may not rise by more than this in one input of up to 64 KiB."""
ROOM: Final = 2 << 30
"""Address space beyond what a target has when it is warm: an allocation of gigabytes fails, and shows."""
LEAK: Final = 32 << 20
"""Resident memory after a tenth of the inputs and at the end may differ by this much."""


class Target(NamedTuple):
    """What is fuzzed. `check` raises only what is a defect; `expected` are the typed errors that it may raise besides.

    `share` is the part of all inputs that it gets.
    """

    seeds: Callable[[], Sequence[bytes]]
    check: Callable[[bytes], None]
    expected: tuple[type[Exception], ...] = ()
    damage: Damage = damage_bytes
    share: float = 1.0


class Result(msgspec.Struct):
    """What came of one target. `failure` is empty if all inputs kept the promise."""

    target: str
    seed: int
    inputs: int
    refused: int
    seconds: float
    slowest: float
    growth: int
    """Bytes of resident memory between the tenth part of the inputs and the end."""
    failure: str = ""

    @property
    def per_second(self) -> float:
        return self.inputs / max(self.seconds, 1e-9)


def make_input(name: str, target: Target, seeds: Sequence[bytes], seed: int, index: int) -> bytes:
    """Input `index`: the same for the same name, seed and index. The first ones are the valid seeds themselves."""
    return seeds[index] if index < len(seeds) else target.damage(random.Random(f"{name}/{seed}/{index}"), seeds)


def fuzz(name: str, target: Target, seed: int, num_inputs: int, first: int, log: TextIO) -> Result:
    """Run inputs `first` to `first + num_inputs` - 1, up to the first that breaks the promise."""
    seeds = list(target.seeds())
    result = Result(name, seed, 0, 0, 0.0, 0.0, 0)
    for data in seeds:  # what is compiled or imported at the first call is now
        result.failure = result.failure or _run(target, data, result, measured=False)
    assert result.failure or result.refused < len(seeds), f"no seed of {name} is valid"
    if result.failure:
        return result
    result.refused = 0
    started, settled = time.perf_counter(), resident()
    with bounded_address_space():
        for index in range(first, first + num_inputs):
            if result.inputs % BLOCK == 0:
                _watch(log, f"a hang or a crash of {name} is in inputs {index} to {index + BLOCK - 1} of seed {seed}")
            if result.inputs == num_inputs // 10:
                settled = resident()
            data = make_input(name, target, seeds, seed, index)
            result.failure = _run(target, data, result)
            result.inputs += 1
            if result.failure:
                again = f"python -m tests.fuzz.run --target {name} --seed {seed} --first {index} --inputs 1"
                result.failure += f"\ninput {index} of seed {seed}, {len(data)} bytes, {data[:200]!r}\nagain: {again}"
                break
    faulthandler.cancel_dump_traceback_later()
    result.seconds, result.growth = time.perf_counter() - started, resident() - settled
    return result


def _run(target: Target, data: bytes, result: Result, *, measured: bool = True) -> str:
    """Run one input and count it; why it breaks the promise, or nothing."""
    peak, begun = peak_memory(), time.thread_time()
    try:
        target.check(data)
    except target.expected:
        result.refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        return traceback.format_exc(limit=-12)
    if not measured:
        return ""
    took, grew = time.thread_time() - begun, peak_memory() - peak
    result.slowest = max(result.slowest, took)
    if took > CPU_SECONDS:
        return f"it took {took:.1f} s"
    return f"it took {grew >> 20} MiB of memory" if grew > INPUT_GROWTH else ""


def _watch(log: TextIO, where: str) -> None:
    """Say where we are, for whoever finds the process dead, and end it if it is not here again in time, even from within compiled code."""
    log.seek(0)
    log.truncate()
    log.write(f"{where}\n")
    log.flush()
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=log)


class bounded_address_space:  # noqa: N801
    """While this is entered, no more than ROOM can be allocated."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """The most bytes of resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
