"""From the folder of a sweep to its cells: what each recorded run measured, by its journal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.cells import Cell, Pipeline, StepRow
from analysis.recording import Recording
from learner.stability.collapse import collapse_step
from protocol import facts
from protocol.config import Config, parse_config_json
from protocol.errors import ConfigError
from protocol.journal import JOURNAL_NAME
from protocol.sweep import load_sweep

TABLE = "cells.jsonl.zst"
SUMMARY = "summary.json"
TRAINED_BY = ("lr", "warmup_steps", "schedule", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
"""What of the learner's settings decides about an update."""


def read_run(run: Path) -> Cell:
    """What a run measured, as far as it has come: where a learner went back, only what it did from there on. Raises JournalError."""
    with Recording(run) as recording:
        configs = _configs(recording)
        steps: list[facts.StepCommitted] = []
        validation: list[tuple[int, float]] = []
        notes: list[facts.LearnerNoted] = []
        for entry in recording.facts(facts.StepCommitted, facts.Evaluated, facts.LearnerNoted):
            match entry.fact:
                case facts.StepCommitted() as fact:
                    while steps and steps[-1].step >= fact.step:
                        steps.pop()
                    while validation and validation[-1][0] > fact.step:
                        validation.pop()
                    steps.append(fact)
                case facts.Evaluated() as fact:
                    while validation and validation[-1][0] >= fact.step:
                        validation.pop()
                    validation.append((fact.step, fact.reward))
                case facts.LearnerNoted() as fact:
                    notes.append(fact)
    return _cell(run.resolve().name, configs, steps, validation, notes)


def read_config(run: Path) -> Config:
    """A run's configuration, as its journal has it last. Raises JournalError."""
    with Recording(run) as recording:
        return _configs(recording)[-1]


def _configs(recording: Recording) -> list[Config]:
    """All that the run has gone by, oldest first: who resumes it may change the learner's settings, the loss and the number of steps."""
    texts = [entry.fact.config for entry in recording.facts(facts.RunStarted) if isinstance(entry.fact, facts.RunStarted)]
    return [parse_config_json(text) for text in texts if text] or [recording.config()]


def pipeline_of(config: Config) -> Pipeline:
    """Without any lag both pipelines are the same; S is 0 then, not the 1 that cycles count, since weights never leave those that sampled."""
    return "cycles" if config.policy.reuse > 1 or config.policy.lag_bound == 0 else "queue"


def _cell(
    name: str,
    configs: list[Config],
    steps: list[facts.StepCommitted],
    validation: list[tuple[int, float]],
    notes: list[facts.LearnerNoted],
) -> Cell:
    config = configs[-1]
    pacing, pipeline = config.pacing, pipeline_of(config)
    rows = [_row(fact, is_first_use=fact.step == pacing.first_use(fact.batch)) for fact in steps]
    used = [(row.step, row.reward) for row in rows if row.is_first_use and row.reward is not None]
    num_completions = config.rollout.groups_per_batch * config.rollout.group_size
    collapse = collapse_step([step for step, _ in used], [reward for _, reward in used], num_completions)
    return Cell(
        name=name,
        pipeline=pipeline,
        surrogate=config.loss.surrogate,
        max_lag=config.policy.lag_bound and config.policy.lag_bound + (pipeline == "cycles"),
        lr=config.learner.lr,
        seed=config.run.seed,
        horizon=config.run.steps,
        governor=_governor(configs, notes),
        rows=rows,
        validation=validation,
        num_completions=num_completions,
        outcome="stable" if collapse is None else "collapsed",
        collapse_step=collapse,
        warning_step=next((note.step for note in notes if note.kind == "warning"), None),
    )


def _governor(configs: list[Config], notes: list[facts.LearnerNoted]) -> str:
    """What changed the learning rate on the way, if anything did."""
    if any(note.kind == "rollback" for note in notes):
        return "rollback"
    if any(_trained_by(config) != _trained_by(configs[-1]) for config in configs):
        return "by hand"
    set_to = configs[-1].stability
    return set_to.rule if set_to.governor == "hold" and set_to.rule != "region" else set_to.governor


def _trained_by(config: Config) -> tuple[Any, ...]:
    return config.loss, *(getattr(config.learner, field) for field in TRAINED_BY)


def _row(fact: facts.StepCommitted, *, is_first_use: bool) -> StepRow:
    # Five digits: more say nothing, and make a sweep's table three times as large.
    measured: dict[str, Any] = {name: None if value is None else float(f"{value:.5g}") for name, value in fact.metrics.items()}
    return StepRow(
        step=fact.step,
        reward=measured.get("reward"),
        lr=measured.get("lr") or 0.0,
        lag=sum(fact.lags) / len(fact.lags) if fact.lags else 0.0,
        is_first_use=is_first_use,
        cosine=measured.get("cosine_new_batch" if is_first_use else "cosine_same_batch"),
        g_upd=measured.get("g_upd"),
        drift=measured.get("drift"),
        displacement=measured.get("displacement"),
        clip_fraction=measured.get("clip_fraction"),
        effective_sample_size=measured.get("effective_sample_size"),
        kl_behaviour=measured.get("kl_behaviour"),
        entropy=measured.get("entropy"),
        completion_length=measured.get("completion_length"),
    )


def read_sweep(source: Path) -> tuple[list[Cell], Path]:
    """The cells of a sweep, by its folder, its TOML file or its table, and the folder that a report of it belongs in. Raises ConfigError."""
    from analysis.cell_tables import read_cells

    folder, table = find_sweep(source)
    if table is not None:
        return read_cells(table), folder
    return [read_run(run) for run in finished_runs(folder)], folder


def find_sweep(source: Path) -> tuple[Path, Path | None]:
    """The folder of a sweep that has finished runs, or folder and table where only that is left. Raises ConfigError."""
    fix = "give a sweep's folder or TOML file, after `cli.py sweep`, or its cells.jsonl.zst"
    folder = load_sweep(source)[0].folder if source.suffix == ".toml" else source
    if folder.is_file():
        return folder.parent, folder
    if (folder / JOURNAL_NAME).exists():
        raise ConfigError(
            "SWEEP", str(source), "is a run, not a sweep", "give the folder that holds its runs; or --run for the report of one run"
        )
    if finished_runs(folder):
        return folder, None
    if (folder / TABLE).exists():
        return folder, folder / TABLE
    raise ConfigError("SWEEP", str(source), "holds no finished run" if folder.exists() else f"there is no {folder}", fix)


def finished_runs(folder: Path) -> list[Path]:
    """The runs in a sweep's folder that have come to their end, by name."""
    return sorted(path.parent for path in folder.glob(f"[!.]*/{SUMMARY}") if (path.parent / JOURNAL_NAME).exists())


def report_sweep(sources: Sequence[Path], out: Path | None) -> list[str]:
    """Write one report of some sweeps, and the table of their cells beside it. Returns lines that say what was written. Raises ConfigError."""
    from analysis.cell_tables import write_cells
    from analysis.sweep_report import write_report

    read = [read_sweep(source) for source in sources]
    cells, folder = [cell for found, _ in read for cell in found], read[0][1]
    where = out or folder / "report"
    written = write_report(cells, where)
    write_cells(cells, where / TABLE)
    num_collapsed = sum(cell.outcome == "collapsed" for cell in cells)
    planned = {plan.name for source in sources if source.suffix == ".toml" for plan in load_sweep(source)[1]}
    missing = len(planned - {cell.name for cell in cells})
    lines = [f"{len(cells)} runs, {num_collapsed} of them collapsed{f'; {missing} more are not done yet' if missing else ''}"]
    return [*lines, *(str(path) for path in written if path.suffix in (".html", ".md"))]
