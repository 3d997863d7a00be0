"""A sweep's cells as files: `cells.jsonl.zst`, which is read back, and a CSV with one row for each cell, for people and other tools."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Final

import msgspec
import zstandard

from analysis.cells import Cell
from protocol.errors import ConfigError

FINAL_STEPS: Final = 20
"""The final reward of a run is its mean over this many last steps."""
COLUMNS: Final = (
    "name", "pipeline", "surrogate", "S", "lr", "seed", "horizon", "mean_lag", "governor", "num_steps", "outcome", "collapse_step", "M_collapse",
    "collapse_step_lr", "warning_step", "final_reward", "final_validation", "same_batch_cosine", "new_batch_cosine", "final_displacement",
)  # fmt: skip
_NEWLINE: Final = b"\n"
_AGAIN: Final = "collect the cells again from the sweep's runs"


def write_cells(cells: Sequence[Cell], path: Path) -> None:
    """One line of JSON for each cell, in one checked zstd frame; whole or not at all. Raises ConfigError."""
    for number, cell in enumerate(cells, 1):
        if problem := _problem(cell):
            raise ConfigError("cells", f"cell {number} ({cell.name})", problem, "mend what collects the cells; nothing was written")
    lines = b"".join(msgspec.json.encode(cell) + b"\n" for cell in cells)
    write_file(path, zstandard.ZstdCompressor(level=9, write_checksum=True).compress(lines))


def read_cells(path: Path) -> list[Cell]:
    """What `write_cells` wrote. Raises ConfigError, which names the file, the line and what to do."""
    cells: list[Cell] = []
    first: dict[str, int] = {}
    for number, line in enumerate(_decompressed(path).splitlines(), 1):
        try:
            cell = msgspec.json.decode(line, type=Cell)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _bad_line(path, number, f"is no cell ({error})") from None
        if problem := _problem(cell):
            raise _bad_line(path, number, f"contradicts itself: {problem}")
        if first.setdefault(cell.name, number) != number:
            raise _bad_line(path, number, f"names a cell {cell.name!r} that line {first[cell.name]} has already")
        cells.append(cell)
    return cells


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """One row for each cell, columns as in COLUMNS; what was not measured is left empty. Raises ConfigError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(csv_row(cell) for cell in cells)
    write_file(path, text.getvalue().encode())


def csv_row(cell: Cell) -> tuple[str | int | float | None, ...]:
    """The columns of one cell. Numbers that are measured have six digits; cosines are means over the whole run."""
    measured = (
        None if cell.collapse_step is None else cell.collapse_step * cell.lr,
        cell.warning_step,
        final_reward(cell),
        cell.validation[-1][1] if cell.validation else None,
        mean_cosine(cell, is_first_use=False),
        mean_cosine(cell, is_first_use=True),
        next((row.displacement for row in reversed(cell.rows) if row.displacement is not None), None),
    )
    return (
        *(cell.name, cell.pipeline, cell.surrogate, cell.max_lag, f"{cell.lr:.6g}", cell.seed, cell.horizon),
        *(f"{fmean(row.lag for row in cell.rows):.3g}" if cell.rows else None, cell.governor),
        *(len(cell.rows), cell.outcome, cell.collapse_step, weight_sync(cell)),
        *(f"{value:.6g}" if isinstance(value, float) else value for value in measured),
    )


def weight_sync(cell: Cell) -> int | None:
    """M_collapse (paper, Table 2); the collapse step itself where S is 0, since then there is a sync at every step."""
    return cell.collapse_sync if cell.max_lag else cell.collapse_step


def final_reward(cell: Cell) -> float | None:
    """Mean training reward of the last steps that have one, zero as it may be."""
    rewards = [row.reward for row in cell.rows if row.reward is not None]
    return fmean(rewards[-FINAL_STEPS:]) if rewards else None


def mean_cosine(cell: Cell, *, is_first_use: bool) -> float | None:
    """Mean Grad CosSim up to the collapse: of pairs on two batches with `is_first_use`, else of pairs on one and the same batch."""
    end = math.inf if cell.collapse_step is None else cell.collapse_step
    cosines = [row.cosine for row in cell.rows if row.step < end and row.is_first_use is is_first_use and row.cosine is not None]
    return fmean(cosines) if cosines else None


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its directory is made if need be. Raises ConfigError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        fix = "make the directory writable, with some free space, or name another"
        raise ConfigError("OUT", str(path), f"cannot be written ({error.strerror})", fix) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _problem(cell: Cell) -> str:
    """What is wrong with a cell in itself, empty if nothing is. JSON has no word for NaN, so there must be none."""
    if not (math.isfinite(cell.lr) and cell.lr > 0):
        return f"lr is {cell.lr}, it must be above zero"
    if cell.max_lag < 0:
        return f"max_lag is {cell.max_lag} in the {cell.pipeline} pipeline"
    if cell.horizon < 1:
        return f"horizon is {cell.horizon}, it must be at least 1"
    if (cell.outcome == "collapsed") != (cell.collapse_step is not None):
        return f"its outcome is {cell.outcome} and its collapse_step {cell.collapse_step}"
    for name, step in (("collapse_step", cell.collapse_step), ("warning_step", cell.warning_step)):
        if step is not None and step < 0:
            return f"{name} is {step}, steps begin with 0"
    steps = [row.step for row in cell.rows]
    if any(after <= before for before, after in pairwise(steps)):
        return "the steps of its rows do not rise"
    for row in cell.rows:
        if not all(math.isfinite(value) for value in _numbers(row)):
            return f"the row of step {row.step} has a number that is not finite; write null for what cannot be measured"
    if not all(math.isfinite(reward) for _, reward in cell.validation):
        return "a validation reward is not finite"
    return ""


def _numbers(row: msgspec.Struct) -> Iterator[float]:
    values = msgspec.structs.astuple(row)
    return (value for value in values if isinstance(value, float))


def _decompressed(path: Path) -> bytes:
    """The text of a file of one frame; a cut file is an error, not a short sweep."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError("SWEEP", str(path), f"cannot be read ({error.strerror})", "give the file that the sweep wrote") from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        text = frame.decompress(data)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ConfigError("SWEEP", str(path), f"is not what was written ({error})", _AGAIN) from None
    if not frame.eof or frame.unused_data:
        problem = "goes on after its end" if frame.eof else f"is cut off in line {text.count(_NEWLINE) + 1}"
        raise ConfigError("SWEEP", str(path), problem, _AGAIN)
    return text


def _bad_line(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError("SWEEP", f"{path}, line {number}", problem, _AGAIN)
