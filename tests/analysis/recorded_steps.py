"""Runs of which only the learner's steps are recorded: journals with chosen measures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from broker.journal import Journal
from protocol import facts
from protocol.config import Config, config_json, parse_config
from protocol.journal import JOURNAL_NAME

MEASURES = ("g_upd", "drift", "displacement", "clip_fraction", "effective_sample_size", "kl_behaviour", "entropy")


def config_of(**sections: dict[str, Any]) -> Config:
    return parse_config({"run": {"steps": 6, "seed": 4}, "policy": {"reuse": 2}, "learner": {"lr": 2e-3}} | sections)


def step(number: int, scale: float = 1.0, reuse: int = 2, **metrics: float | None) -> facts.StepCommitted:
    """A step whose measures are all different, so that none can be taken for another."""
    values = {name: scale * (number + place / 10) for place, name in enumerate(MEASURES, 1)}
    measured: dict[str, float | None] = {"reward": 0.5 + number / 100, "lr": 1e-3 * (number + 1), **values}
    measured |= {"cosine_same_batch": 0.7, "cosine_new_batch": -0.2} | metrics
    return facts.StepCommitted(number, number // reuse, 0, [0, number % reuse, 1], measured)


def started(config: Config) -> facts.RunStarted:
    return facts.RunStarted("run", 0, config_json(config))


def journal(folder: Path, config: Config, recorded: Sequence[facts.AnyFact]) -> Path:
    """A run's folder with these facts in its journal."""
    folder.mkdir(parents=True)
    with closing(Journal(folder / JOURNAL_NAME, folder.name, config_json(config))) as written:
        for second, fact in enumerate([started(config), *recorded]):
            written.append(fact, b"", float(second))
        written.commit()
    return folder


def finished(folder: Path, config: Config, recorded: Sequence[facts.AnyFact]) -> Path:
    journal(folder, config, recorded)
    (folder / "summary.json").write_text("{}")
    return folder
