"""Plots of one run, from its journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import facts
from protocol.config import parse_config_json
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts


def plot_run(run: Path) -> list[Path]:
    """Write reward.png (training and held-out reward) and lag.png (lag of what was trained on against S); returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run / JOURNAL_NAME
    connection = open_read_only(path)
    try:
        (config,) = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        history = [entry.fact for entry in read_facts(connection, path)]
    finally:
        connection.close()
    max_lag = parse_config_json(config).pacing.max_lag
    steps = [fact for fact in history if isinstance(fact, facts.StepCommitted)]
    drawings: dict[str, Callable[[Any, list[facts.StepCommitted], list[facts.AnyFact]], None]] = {"reward.png": _reward, "lag.png": _lag}
    written = []
    for name, draw in drawings.items():
        figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        draw(axes, steps, history)
        if name == "lag.png":
            axes.axhline(max_lag, color="black", ls="--", lw=0.8, label=f"S = {max_lag}")
        axes.set_xlabel("learner step")
        axes.legend(loc="best", frameon=False)
        figure.savefig(run / name, dpi=120)
        pyplot.close(figure)
        written.append(run / name)
    return written


def _reward(axes: Any, steps: list[facts.StepCommitted], history: list[facts.AnyFact]) -> None:
    axes.plot([fact.step + 1 for fact in steps], [fact.metrics.get("reward") for fact in steps], lw=0.8, label="training")
    heldout = [fact for fact in history if isinstance(fact, facts.Evaluated)]
    axes.plot([fact.step for fact in heldout], [fact.reward for fact in heldout], "o-", label="held-out")
    axes.set_ylabel("mean reward")


def _lag(axes: Any, steps: list[facts.StepCommitted], history: list[facts.AnyFact]) -> None:
    started = [fact for fact in history if isinstance(fact, facts.LearnerStarted)]
    numbers = [fact.step + 1 for fact in steps]
    axes.plot(numbers, [sum(fact.lags) / len(fact.lags) for fact in steps], lw=0.8, label="mean lag of the batch")
    axes.plot(numbers, [max(fact.lags) for fact in steps], lw=0.8, label="largest lag of the batch")
    for resume in started[1:]:
        axes.axvline(resume.step, color="grey", ls=":", lw=0.8)
    axes.set_ylabel("lag (learner steps)")
