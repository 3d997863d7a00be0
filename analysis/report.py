"""What is left of a run when it ends: summary.json, two plots, and the lines that a person reads."""

from __future__ import annotations

from pathlib import Path

import msgspec

from analysis.figures import plot_run
from analysis.summary import lines, summarize


def finish_run(run: Path) -> list[str]:
    """Write summary.json and the plots of the run in a directory; returns the summary as lines. Raises JournalError."""
    summary = summarize(run)
    (run / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    plots = plot_run(run)
    return [*lines(summary), f"files            {run / 'summary.json'}, {', '.join(plot.name for plot in plots)}"]
