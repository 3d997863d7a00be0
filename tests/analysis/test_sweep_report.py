"""The page of a sweep says what its cells say, needs nothing but itself, and means nothing by the names it shows."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from analysis import sweep_tables as tables
from analysis.cells import Cell
from analysis.claims import judge
from analysis.laws import boundary_law, escape_law
from analysis.sweep_report import write_report
from learner.stability.drift import drift_exponent
from protocol.errors import ConfigError
from tests.analysis.synthetic_sweep import make_sweep

SURROGATE = '<script>alert("x")</script>|clip'
KINDS = ("sweep", "small-rates", "panels", "phase", "collapse-times", "displacement", "cosines")


class Page(HTMLParser):
    """Tables as rows of text, what is open, and every attribute that could fetch something."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in {"href", "xlink:href", "src", "srcset", "action", "data"}]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data


def sweep() -> list[Cell]:
    """Two arms, and one run under a governor."""
    cycles = make_sweep(lags=(4, 16), learning_rates=(1e-7, 4e-7, 1.6e-6), seeds=(0, 1, 2), horizon=130, noise=0.2)
    queue = make_sweep(pipeline="queue", surrogate=SURROGATE, lags=(2, 8), learning_rates=(1e-7, 1.6e-6), seeds=(0,), horizon=60)
    return [*cycles, *queue, msgspec.structs.replace(queue[0], name="governed", governor="hold")]


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return sweep()


@pytest.fixture(scope="module")
def written(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    out = tmp_path_factory.mktemp("report") / "new"
    return out, write_report(cells, out)


@pytest.fixture(scope="module")
def page(written: tuple[Path, list[Path]]) -> Page:
    return Page((written[0] / "index.html").read_text())


def test_what_is_returned_is_what_is_written(written: tuple[Path, list[Path]]) -> None:
    out, paths = written
    assert sorted(paths) == sorted(path for path in out.rglob("*") if path.is_file())
    names = {path.name for path in paths if path.parent.name == "figures"}
    assert len(names) == 2 * 2 * len(KINDS)
    for kind in KINDS:
        assert {f"1-cycles-clip-{kind}.svg", f"1-cycles-clip-{kind}.png"} <= names
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.parse(path)


def test_table_2_has_the_median_the_product_and_the_share_of_each_setting(cells: list[Cell], page: Page) -> None:
    header = next(place for place, row in enumerate(page.rows) if row[1:] == ["η = 1.6e-06", "η = 4e-07", "η = 1e-07"])
    for place, lag in enumerate((4, 16), header + 1):
        name, *found = page.rows[place]
        assert name == f"S = {lag}"
        for lr, text in zip((1.6e-6, 4e-7, 1e-7), found, strict=True):
            runs = [cell for cell in cells if (cell.pipeline, cell.max_lag, cell.lr) == ("cycles", lag, lr)]
            steps = [cell.collapse_step for cell in runs if cell.collapse_step is not None]
            if not steps:
                assert text == "stable, 0 of 3"
                continue
            syncs = [step // lag for step in steps]
            reach = "" if min(syncs) == max(syncs) else f" [{min(syncs)}-{max(syncs)}]"
            assert text == f"{median(syncs):g}{reach} ({median(syncs) * lag * lr / 1e-7:.4g}), {len(steps)} of 3"
    name, first, *_ = page.rows[header + 3]
    times = [cell.collapse_step for cell in cells if (cell.pipeline, cell.lr) == ("cycles", 1.6e-6) and cell.collapse_step is not None]
    assert (name, first) == ("t_collapse", f"{median(times):g} [{min(times)}-{max(times)}]")


def test_the_paper_s_own_cells_give_the_paper_s_table() -> None:
    syncs = {8: (4, 8, None, None), 16: (2, 4, 10, None), 32: (1, 2, 5, 10)}
    rates = (1e-6, 5e-7, 2e-7, 1e-7)
    cells = [
        Cell(f"{lag}-{lr}", "cycles", "clip", lag, lr, 0, 640, "off", [], [], "collapsed" if sync else "stable", sync and sync * lag)
        for lag, row in syncs.items()
        for lr, sync in zip(rates, row, strict=True)
    ]
    table = tables.collapses(cells)
    assert table.header == ["", "η = 1e-06", "η = 5e-07", "η = 2e-07", "η = 1e-07"]
    assert table.rows == [
        ["S = 8", "4 (320)", "8 (320)", "stable", "stable"],
        ["S = 16", "2 (320)", "4 (320)", "10 (320)", "stable"],
        ["S = 32", "1 (320)", "2 (320)", "5 (320)", "10 (320)"],
        ["t_collapse", "32", "64", "160", "320"],
    ]


def test_the_numbers_of_the_laws_stand_on_the_page(cells: list[Cell], page: Page) -> None:
    cycles = [cell for cell in cells if cell.pipeline == "cycles"]
    limits, times = boundary_law(cycles, np.random.default_rng(9)), escape_law(cycles, np.random.default_rng(9))
    rows = {row[0]: row for row in reversed(page.rows)}
    assert limits.exponent is not None and rows["b of η_max ~ S^-b"][1] == f"{limits.exponent:.3g}"
    assert times.mean is not None and rows["all, as fitted"][1:3] == [str(times.num_fitted), f"{times.mean:.3g}"]
    boundary = next(row for row in page.rows if row[0] == "S = 16" and "within the rates tried" in row)
    estimate = limits.boundaries[-1].estimate
    assert estimate is not None and boundary[1] == f"{estimate:.3g}" and boundary[3] == f"{16 * estimate:.3g}"


def test_the_verdicts_are_those_of_the_claims(cells: list[Cell], page: Page, written: tuple[Path, list[Path]]) -> None:
    cycles = [cell for cell in cells if cell.pipeline == "cycles"]
    expected = [claim.verdict for claim in judge(cycles, np.random.default_rng(0), drift_exponent)]
    assert ["cycles, clip", *expected] in page.rows
    assert f"| cycles, clip | {' | '.join(expected)} |" in (written[0] / "tables.md").read_text()


def test_the_list_of_runs_is_whole_and_is_the_csv(cells: list[Cell], page: Page, written: tuple[Path, list[Path]]) -> None:
    with (written[0] / "cells.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(cells) + 1
    assert page.rows[-len(rows) :] == [[text or "-" for text in row] for row in rows]


def test_runs_under_a_governor_are_counted_apart(page: Page) -> None:
    assert [f"queue, {SURROGATE}, hold, S = 2", "1 of 1"] in [row[:2] for row in page.rows]
    header = next(place for place, row in enumerate(page.rows) if row[1:] == ["η = 1.6e-06", "η = 1e-07"])
    assert page.rows[header + 1][2] == "stable"


def test_the_page_is_whole_and_fetches_and_runs_nothing(page: Page, written: tuple[Path, list[Path]]) -> None:
    text = (written[0] / "index.html").read_text()
    assert page.open == []
    assert page.seen["svg"] == 2 * len(KINDS)
    assert not page.seen.keys() & {"script", "link", "img", "image", "iframe", "object"}
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "://" not in text and "@import" not in text
    assert SURROGATE not in text


def test_markdown_tables_keep_their_columns_whatever_the_names(written: tuple[Path, list[Path]]) -> None:
    text = (written[0] / "tables.md").read_text()
    assert "<script" not in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 1 + 2 * 4 + 2, "verdicts, four of each arm, the governors, and the warnings; two values of S predict no third"
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1


def test_the_same_cells_give_the_same_bytes(cells: list[Cell], tmp_path: Path) -> None:
    few = [cell for cell in cells if cell.pipeline == "queue" and cell.max_lag == 2 and cell.lr == 1.6e-6]
    first = [path.read_bytes() for path in write_report(few, tmp_path / "a")]
    assert first == [path.read_bytes() for path in write_report(few, tmp_path / "b")]


def test_a_sweep_without_runs_and_a_place_that_cannot_be_written_are_said(cells: list[Cell], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        write_report([], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(cells[-1:], tmp_path / "file")
