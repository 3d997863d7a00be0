"""What is left of a run when it ends: summary.json, two plots, and the lines that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from analysis.figures import plot_run
from analysis.summary import lines, summarize
from learner.stability.monitor import COLLAPSED
from protocol.errors import Collapsed, ConfigError, PromisesBroken


class Finished(NamedTuple):
    """The summary of a run as lines, and the promises that it breaks, in words."""

    run: Path
    lines: list[str]
    broken_promises: list[str]
    collapse: str = ""
    """How the policy collapsed, if the run was ended for it."""

    def check(self) -> None:
        """Raise PromisesBroken if there are any, Collapsed if the run ended by a collapse."""
        if self.broken_promises:
            raise PromisesBroken(self.run, self.broken_promises)
        if self.collapse:
            raise Collapsed(self.run, self.collapse)


def finish_run(run: Path) -> Finished:
    """Write summary.json and the plots of the run in a directory. Raises JournalError, ConfigError if nothing can be written there."""
    summary = summarize(run)
    try:
        (run / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
        plots = plot_run(run)
    except OSError as error:
        fix = "make the directory writable for this user, with some free space, or report on a copy; `cli.py inspect` only reads"
        raise ConfigError("--run", str(run), f"its summary cannot be written there ({error.strerror})", fix) from None
    files = f"files            {run / 'summary.json'}, {', '.join(plot.name for plot in plots)}"
    collapse = summary.outcome if summary.outcome.startswith(COLLAPSED) else ""
    return Finished(run, [*lines(summary), files], summary.broken_promises, collapse)
