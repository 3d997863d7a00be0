"""A sweep's cells come back from their file as they were, and a file that is not what was written is refused with its line."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest
import zstandard

from analysis.cell_tables import COLUMNS, read_cells, write_cells, write_csv
from analysis.cells import Cell
from protocol.errors import ConfigError
from tests.analysis.synthetic_sweep import make_sweep


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return make_sweep(lags=(4, 8), learning_rates=(1e-7, 1.6e-6), seeds=(0,), horizon=60)


def frame(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(text)


def lines(cells: list[Cell]) -> list[bytes]:
    return [msgspec.json.encode(cell) for cell in cells]


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_cells(path)
    assert str(path) in str(caught.value) and "Fix: " in str(caught.value)
    return str(caught.value)


def test_cells_come_back_as_they_were(cells: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "made" / "cells.jsonl.zst"
    write_cells(cells, path)
    assert read_cells(path) == cells
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    write_cells(cells, path)
    assert path.read_bytes() == first


def test_a_line_that_is_no_cell_is_named(cells: list[Cell], tmp_path: Path) -> None:
    one, two, *_ = lines(cells)
    path = tmp_path / "cells.jsonl.zst"
    assert ", line 2" in refusal(path, frame(b"\n".join([one, b'{"name": "x"}'])))
    assert ", line 2" in refusal(path, frame(b"\n".join([one, two.replace(b'"cycles"', b'"circles"')])))
    assert ", line 1" in refusal(path, frame(b"\xff\xfe"))
    assert ", line 1" in refusal(path, frame(b"[" * 100_000))
    assert "line 1 has already" in refusal(path, frame(b"\n".join([one, two, one])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"max_lag": -1}, "max_lag is -1"),
        ({"horizon": 0}, "horizon is 0"),
        ({"outcome": "collapsed", "collapse_step": None}, "its outcome is collapsed"),
        ({"outcome": "stable", "collapse_step": 7}, "its outcome is stable"),
        ({"warning_step": -1}, "warning_step is -1"),
    ],
)
def test_a_cell_that_contradicts_itself_is_neither_written_nor_read(
    cells: list[Cell], tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / "cells.jsonl.zst"
    wrong = msgspec.structs.replace(cells[1], **change)
    with pytest.raises(ConfigError, match=words):
        write_cells([cells[0], wrong], path)
    assert not path.exists()
    message = refusal(path, frame(b"\n".join(lines([cells[0], wrong]))))
    assert words in message and ", line 2" in message


def test_steps_rise_and_numbers_are_finite(cells: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl.zst"
    rows = cells[0].rows
    endless = msgspec.structs.replace(rows[3], drift=float("nan"))
    for wrong, words in (([rows[1], rows[0]], "do not rise"), ([*rows[:3], endless], "the row of step 3")):
        with pytest.raises(ConfigError, match=words):
            write_cells([msgspec.structs.replace(cells[0], rows=wrong)], path)
    with pytest.raises(ConfigError, match="validation reward"):
        write_cells([msgspec.structs.replace(cells[0], validation=[(0, float("inf"))])], path)


def test_a_cut_or_damaged_file_is_not_a_short_sweep(cells: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl.zst"
    write_cells(cells, path)
    whole = path.read_bytes()
    assert "is cut off in line" in refusal(path, whole[: len(whole) // 2])
    assert "is cut off in line 1" in refusal(path, b"")
    assert "goes on after its end" in refusal(path, whole + b"more")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    assert "is not what was written" in refusal(path, bytes(damaged))
    assert "is not what was written" in refusal(path, b"name,pipeline\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cells(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_is_said(cells: list[Cell], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_cells(cells, tmp_path / "file" / "cells.jsonl.zst")


def test_the_csv_has_a_row_for_each_cell_and_leaves_empty_what_was_not_measured(cells: list[Cell], tmp_path: Path) -> None:
    synchronous = Cell("a, b", "queue", "clip", 0, 1e-6, 5, 10, "off", [], [], "collapsed", 6, 3)
    write_csv([*cells, synchronous], tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == [*(cell.name for cell in cells), "a, b"]
    collapsed = next(cell for cell in cells if cell.outcome == "collapsed" and cell.max_lag == 8)
    assert collapsed.collapse_step is not None
    found = rows[cells.index(collapsed)]
    assert (found["S"], found["lr"], found["M_collapse"]) == ("8", "1.6e-06", str(collapsed.collapse_step // 8))
    assert float(found["collapse_step_lr"]) == pytest.approx(collapsed.collapse_step * 1.6e-6)
    before = [row.cosine for row in collapsed.rows if row.is_first_use and row.cosine is not None and row.step < collapsed.collapse_step]
    assert float(found["new_batch_cosine"]) == pytest.approx(sum(before) / len(before), rel=1e-5)
    assert float(rows[0]["final_reward"]) == pytest.approx(sum(row.reward or 0.0 for row in cells[0].rows[-20:]) / 20, rel=1e-5)
    assert (rows[-1]["M_collapse"], rows[-1]["warning_step"]) == ("6", "3")
    assert rows[-1]["final_reward"] == rows[-1]["same_batch_cosine"] == rows[-1]["final_displacement"] == ""
