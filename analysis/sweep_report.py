"""A sweep as a page that a person reads: per pipeline and surrogate the paper's Table 2, its laws, the verdicts on its claims, and its figures.

The page is one file that needs nothing else: figures are inlined, there is no script, and a policy in its head forbids every request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Final, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from analysis import sweep_figures as figures
from analysis import sweep_tables as tables
from analysis.cell_tables import write_csv, write_file
from analysis.cells import Cell
from analysis.claims import Claim, judge_boundary, judge_escape, judge_motion, judge_small_rates, smallest_horizon
from analysis.laws import BoundaryLaw, EscapeLaw, arms, boundary_law, escape_law, motion
from analysis.prediction import judgement
from analysis.sweep_tables import Table
from learner.stability.drift import drift_exponent
from protocol.errors import ConfigError


class Drawing(NamedTuple):
    """A figure of the report: the name of its files, what is said below it, and its bytes."""

    name: str
    caption: str
    svg: str
    png: bytes


class Arm(NamedTuple):
    """All that is reported of one pipeline and surrogate."""

    title: str
    claims: list[Claim]
    tables: list[Table]
    drawings: list[Drawing]


def write_report(cells: list[Cell], out: Path, seed: int = 0) -> list[Path]:
    """Write index.html, figures/*.svg and *.png, tables.md and cells.csv into a directory; returns their paths. The same cells give the same bytes.

    `seed` is that of the bootstrap. Raises ConfigError without cells, or if nothing can be written there.
    """
    if not cells:
        raise ConfigError("SWEEP", str(out), "has no finished run to report on", "let at least one run of the sweep finish")
    random = np.random.default_rng(seed)
    found = [_arm(place, *key, group, random) for place, (key, group) in enumerate(sorted(arms(cells).items()), 1)]
    extra = [table for table in (tables.governors(cells), *judgement(cells, random)) if table.rows]
    listing = tables.listing(cells)
    files = {
        out / "index.html": _page(found, extra, listing, cells).encode(),
        out / "tables.md": _markdown(found, extra).encode(),
        **{out / "figures" / f"{drawing.name}.svg": drawing.svg.encode() for arm in found for drawing in arm.drawings},
        **{out / "figures" / f"{drawing.name}.png": drawing.png for arm in found for drawing in arm.drawings},
    }
    for path, data in files.items():
        write_file(path, data)
    write_csv(cells, out / "cells.csv")
    return [*files, out / "cells.csv"]


def _arm(place: int, pipeline: str, surrogate: str, cells: list[Cell], random: np.random.Generator) -> Arm:
    escape_time, limits = escape_law(cells, random), boundary_law(cells, random)
    motions = [motion(cell, drift_exponent) for cell in cells]
    claims = [
        judge_boundary(limits, escape_time, smallest_horizon(cells)),
        judge_escape(escape_time),
        judge_motion(motions, random),
        judge_small_rates(cells, escape_time, random),
    ]
    found = [
        tables.collapses(cells),
        tables.boundaries(limits),
        tables.escape_times(cells, escape_time, random),
        tables.exponents(limits, escape_time, claims[2]),
    ]
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", f"{place}-{pipeline}-{surrogate}").strip("-")
    return Arm(f"{pipeline}, {surrogate}", claims, found, _drawings(prefix, cells, limits, escape_time))


def _drawings(prefix: str, cells: list[Cell], limits: BoundaryLaw, escape_time: EscapeLaw) -> list[Drawing]:
    """The figures, rendered one after the other, so that only one is held."""
    draw: dict[str, Callable[[], Figure]] = {
        "sweep": lambda: figures.draw_sweep(cells),
        "small-rates": lambda: figures.draw_small_rates(cells),
        "panels": lambda: figures.draw_panels(cells),
        "phase": lambda: figures.draw_phase(cells, limits),
        "collapse-times": lambda: figures.draw_collapse_times(cells, escape_time),
        "displacement": lambda: figures.draw_displacement(cells),
        "cosines": lambda: figures.draw_cosines(cells),
    }
    drawings = []
    for kind, make in draw.items():
        figure, name = make(), f"{prefix}-{kind}"
        drawings.append(Drawing(name, CAPTIONS[kind], figures.svg_of(figure, name), figures.png_of(figure)))
    return drawings


_MEANS: Final = "Thin lines are seeds, thick ones their mean as far as all of them go."
CAPTIONS: Final = {
    "sweep": f"As Figures 1 and 2 of the paper: training reward, Grad CosSim and validation reward by learning rate and S. {_MEANS} "
    f"Of many learning rates the {figures.MAX_COLUMNS} around the boundary are shown.",
    "small-rates": f"As Figure 3: the smallest learning rates over the longest horizon. {_MEANS}",
    "panels": f"As Figures 4 and 5: one panel for each S and learning rate. {_MEANS}",
    "phase": "Phase diagram. Beside each point: runs that collapsed of those that were made. Bars: η_max with its 95 % interval. "
    "The fitted boundary, and the paper's 1/S through the middle of the same points.",
    "collapse-times": "t_collapse η of each run that collapsed, by S; learning rates lie side by side. The band is the 95 % interval of the mean.",
    "displacement": "How far the weights are from the first ones, over η. As t: updates agree (ballistic); as √t: they are independent (diffusive).",
    "cosines": "Cosine of consecutive updates, apart for pairs that share a batch, where a high one is partly trivial, and pairs that do not.",
}


def _page(found: Sequence[Arm], extra: Sequence[Table], listing: Table, cells: Sequence[Cell]) -> str:
    num_collapsed = sum(cell.outcome == "collapsed" for cell in cells)
    parts = [f"<p>{len(cells)} runs, {num_collapsed} of which collapsed. Intervals are 95 % bootstrap intervals over runs.</p>"]
    if found:
        parts.append(_html_table(tables.verdicts([(arm.title, arm.claims) for arm in found])))
    for arm in found:
        parts.append(f"<h2>{escape(arm.title)}</h2>")
        parts += [_html_claim(claim) for claim in arm.claims]
        parts += [_html_table(table) for table in arm.tables]
        parts += [_html_drawing(drawing) for drawing in arm.drawings]
    parts += [_html_table(table) for table in (*extra, listing)]
    return _PAGE.substitute(body="\n".join(parts))


def _html_claim(claim: Claim) -> str:
    verdict = f'<b class="{escape(claim.verdict.replace(" ", "-"))}">{escape(claim.verdict)}</b>'
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(tables.shown(value))}</td></tr>" for name, value in claim.figures.items())
    return (
        f'<section class="claim"><p><b>({escape(claim.name)})</b> {escape(claim.statement)} {verdict}</p>'
        f"<p>{escape(claim.reason)}</p><details><summary>numbers</summary><table>{rows}</table></details></section>"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    rows = "\n".join(f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in table.rows)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}'
    )


def _html_drawing(drawing: Drawing) -> str:
    """The figure inlined: without its head and namespaces, which HTML does not need, and with ids that are its own on the page."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(drawing.caption)}"', 1)
    return f"<figure>{svg}<figcaption>{escape(drawing.caption)}</figcaption></figure>"


def _markdown(found: Sequence[Arm], extra: Sequence[Table]) -> str:
    parts = [_markdown_table(tables.verdicts([(arm.title, arm.claims) for arm in found]), 2)] if found else []
    for arm in found:
        parts.append(f"## {_plain(arm.title)}")
        parts += [f"({claim.name}) {_plain(claim.statement)} **{claim.verdict}**: {_plain(claim.reason)}." for claim in arm.claims]
        parts += [_markdown_table(table, 3) for table in arm.tables]
    parts += [_markdown_table(table, 2) for table in extra]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table, level: int) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join(_plain(part) for part in line)} |" for line in lines)
    return f"{'#' * level} {_plain(table.title)}\n\n{text}" + (f"\n\n{_plain(table.note)}" if table.note else "")


def _plain(text: str) -> str:
    """Text that means only itself in a Markdown table."""
    return escape(re.sub(r"([\\|*_`\[\]])", r"\\\1", " ".join(text.split())), quote=False)


_PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Sweep of staleness and learning rate</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; }
.wide { overflow-x: auto; }
.claim { border-left: 3px solid #ccc; padding-left: 1rem; margin: 1rem 0; }
.claim p { margin: 0.2rem 0; }
.supported { color: #0072b2; }
.not-supported { color: #b34700; }
.undecided { color: #666; }
figure { margin: 2rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 13px; color: #444; max-width: 60rem; }
</style>
</head>
<body>
<h1>Sweep of staleness and learning rate</h1>
$body
</body>
</html>
""")
