"""`advise`: where a configuration stands by the two-constraint rule (paper, Eq. 37), by what other runs have shown.

Invariant: without a calibration nothing is claimed; what is said instead is which runs would tell.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from pydantic import BaseModel

from analysis.cell_tables import read_cells
from analysis.cells import Cell, StepRow
from analysis.laws import HANDS_OFF
from analysis.sweep_reading import find_sweep, finished_runs, pipeline_of, read_config, read_run
from learner.stability.calibrate import RunRecord, StepMeasure, calibrate, fit_lag_exponent, root_mean_square_update, straightness
from learner.stability.governor import MARGIN
from learner.stability.rule import (
    MAX_LAG,
    UNKNOWN_EXPONENT,
    Calibration,
    LargestLag,
    Margin,
    Margins,
    Measured,
    Verdict,
    differences,
    largest_lag,
    largest_lr,
    margins,
)
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.journal import JOURNAL_NAME

GRID = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Learning rates of the runs that would tell, by the configuration's own."""
ROUNDING = 1e-9
CARRIED: dict[Verdict, Verdict] = {"inside": "unknown", "outside": "cannot tell"}
"""What is left of a verdict by constants of runs that are not, or not known to be, like the configuration."""


class Advice(Struct, frozen=True):
    """What is known of a configuration. `calibration` is empty where nothing was given."""

    lr: float
    staleness: int
    num_steps: int
    pipeline: str
    surrogate: str
    calibration: Calibration
    where: Margins
    largest_lr: Measured | None
    largest_lag: LargestLag | None
    strange: dict[str, tuple[str | None, str | None]]
    """In what the calibrating runs differ: there (None where that is not recorded), here."""
    verdict: Verdict
    """That of `where`, as far as constants of runs that differ, or may, can carry it: never inside, never outside."""


def fingerprint(config: Config) -> dict[str, str]:
    """What the constants of the rule depend on, beside S, the learning rate and the number of steps."""
    learner, rollout, policy = config.learner, config.rollout, config.policy
    optimizer = f"AdamW {learner.beta1} {learner.beta2} {learner.eps} decay {learner.weight_decay} norm {learner.max_grad_norm}"
    is_plain = policy.publish_every == policy.reuse and (policy.reuse == 1 or policy.lag_bound == policy.reuse - 1)
    return {
        "policy": _sorted(config.supervised) if policy.path is None else policy.path,
        "task": _sorted(config.task),
        "rollout": f"{rollout.groups_per_batch} groups of {rollout.group_size}, {rollout.max_tokens} tokens at {rollout.temperature}",
        "optimizer": f"{optimizer}, {learner.schedule} after {learner.warmup_steps}",
        "loss": _sorted(config.loss),
        "pipeline": pipeline_of(config)
        if is_plain
        else f"each batch {policy.reuse} times, weights every {policy.publish_every} steps, queued",
    }


def _sorted(section: BaseModel) -> str:
    """Options of a task are in the order in which they were written, which means nothing."""
    return json.dumps(section.model_dump(mode="json"), sort_keys=True)


def contrast(one: str, other: str) -> tuple[str, str]:
    """Two values of a fingerprint for a person: of sections, only the fields that differ."""
    try:
        ours, theirs = json.loads(one), json.loads(other)
    except ValueError:
        return one, other
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return one, other
    fields = sorted(field for field in ours.keys() | theirs.keys() if ours.get(field) != theirs.get(field))
    first, second = (", ".join(f"{field} {section.get(field)}" for field in fields) for section in (ours, theirs))
    return first, second


class Found(NamedTuple):
    """A run that was given to calibrate from: what it measured, or why it does not count."""

    cell: Cell | None
    why_not: str = ""
    example: str = ""
    is_known: bool = True
    """Whether its whole configuration is known, or only what a table of cells says."""


def calibrate_from(sources: Sequence[Path], like: Config) -> Calibration:
    """A calibration for a configuration, from those recorded runs, of sweeps too, that differ from it in S, learning rate, seed and steps only.

    Its notes say how many were left out and why. Raises ConfigError where none is left.
    """
    found = list(_find(sources, like))
    cells = [run.cell for run in found if run.cell is not None]
    reasons = Counter(run.why_not for run in found if run.cell is None)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if not cells:
        example = next((f"; {run.example}" for run in found if run.example), "")
        fix = "give runs, or a sweep, that differ from this configuration in S, learning rate, seed and steps only"
        raise ConfigError("--from", ", ".join(map(str, sources)), f"holds no run that tells of this configuration: {told}{example}", fix)
    here = fingerprint(like)
    valid_for = here if all(run.is_known for run in found) else {"pipeline": here["pipeline"], "surrogate": like.loss.surrogate}
    calibration = calibrate_cells(cells, like.loss.clip_high, valid_for)
    left_out = f" {reasons.total()} of {len(found)} runs left out: {told}." if reasons else ""
    return msgspec.structs.replace(calibration, notes=calibration.notes + left_out)


def _find(sources: Sequence[Path], like: Config) -> Iterator[Found]:
    """All runs that sources hold, each once."""
    seen: set[Path] = set()
    for source in sources:
        is_run = (source / JOURNAL_NAME).exists()
        folder, table = (source, None) if is_run else find_sweep(source)
        for place in [folder] if is_run else finished_runs(folder) if table is None else [table]:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            if table is None:
                yield _recorded(place, fingerprint(like))
            else:
                yield from (_tabled(cell, like) for cell in read_cells(table))


def _recorded(run: Path, here: dict[str, str]) -> Found:
    there = fingerprint(read_config(run))
    if different := [name for name in here if there[name] != here[name]]:
        names, first = " and ".join(different), different[0]
        theirs, ours = contrast(there[first], here[first])
        return Found(None, f"of another {names}", f"{first} of {run.name}: {theirs}, of this configuration: {ours}")
    return _whole(read_run(run))


def _tabled(cell: Cell, like: Config) -> Found:
    here = (fingerprint(like)["pipeline"], like.loss.surrogate)
    if (cell.pipeline, cell.surrogate) != here:
        return Found(None, "of another pipeline or surrogate", f"{cell.name} is {cell.pipeline} {cell.surrogate}, this {' '.join(here)}")
    return _whole(cell)._replace(is_known=False)


def _whole(cell: Cell) -> Found:
    num_steps = cell.rows[-1].step + 1 if cell.rows else 0
    if cell.governor not in HANDS_OFF:
        return Found(None, f"whose learning rate was changed on the way ({cell.governor})")
    if cell.outcome == "stable" and num_steps < cell.horizon:
        return Found(None, "neither collapsed nor at their end", f"{cell.name} has taken {num_steps} of {cell.horizon} steps")
    return Found(cell)


def calibrate_cells(
    cells: Sequence[Cell], clip_range: float, valid_for: dict[str, str], lag_exponent: Measured | None = None
) -> Calibration:
    """Both constants from cells of one pipeline, surrogate and policy.

    The exponent of S in the batch constraint is `lag_exponent`, or else what cells of several values of S show, or else about the paper's 1.
    """
    records = [record(cell) for cell in cells]
    if lag_exponent is None and len({run.max_lag for run in records}) > 1:
        lag_exponent = fit_lag_exponent(records)
    is_known = lag_exponent is not None and lag_exponent.upper is not None
    found = calibrate(records, clip_range, valid_for, lag_exponent if is_known and lag_exponent is not None else UNKNOWN_EXPONENT)
    speeds = [speed for run in records if (speed := root_mean_square_update(run.steps)) is not None]
    paths = [(share, run.num_steps) for run in records if (share := straightness(run)) is not None]
    return msgspec.structs.replace(
        found,
        g_upd=median(speeds) if speeds else None,
        straightness=min(1.0, median(share for share, _ in paths)) if paths else 1.0,
        calibrated_steps=float(median(num_steps for _, num_steps in paths)) if paths else None,
        notes=found.notes + _short_of_lag(cells, records),
    )


def _short_of_lag(cells: Sequence[Cell], records: Sequence[RunRecord]) -> str:
    """Which runs never saw half of the lag that they were set to, in words."""
    short = [
        f"{run.name} {run.max_lag} of {cell.max_lag}" for cell, run in zip(cells, records, strict=True) if 2 * run.max_lag < cell.max_lag
    ]
    return f" {len(short)} runs whose lag stayed below half of their S, and counts as measured ({short[0]})." if short else ""


def record(cell: Cell) -> RunRecord:
    """A cell as the estimators take it, with the S that it reached, as it is measured while a run trains."""
    return RunRecord(
        cell.name,
        largest_measured_lag(cell),
        cell.lr,
        cell.outcome == "collapsed",
        cell.collapse_step,
        cell.horizon,
        [_measure(row) for row in cell.rows],
        unseen=2 * cell.max_lag if cell.pipeline == "queue" else cell.max_lag,
    )


def largest_measured_lag(cell: Cell) -> int:
    """S as measured: the largest lag of a step, and one more of cycles; as set, for a run that ended before a batch could get so old.

    A step's lag is the mean over its groups, which is rounded up; S as set is the most.
    """
    if len(cell.rows) <= cell.max_lag:
        return cell.max_lag
    is_reused = cell.pipeline == "cycles"
    return min(cell.max_lag, math.ceil(max(row.lag for row in cell.rows) - ROUNDING) + is_reused)


def _measure(row: StepRow) -> StepMeasure:
    return StepMeasure(row.step, row.drift, row.displacement, row.g_upd, row.kl_behaviour)


def advise(config: Config, calibration: Calibration | None) -> Advice:
    """Where a configuration stands."""
    known = calibration or Calibration()
    lr, lag, steps = config.learner.lr, config.staleness, config.run.steps
    where, here = margins(known, lr, lag, steps), fingerprint(config)
    if "surrogate" in known.valid_for:  # Of a table of cells, which tells no more of the loss.
        here["surrogate"] = config.loss.surrogate
    strange = {} if calibration is None else differences(known, here)
    return Advice(
        lr=lr,
        staleness=lag,
        num_steps=steps,
        pipeline=pipeline_of(config),
        surrogate=config.loss.surrogate,
        calibration=known,
        where=where,
        largest_lr=largest_lr(known, lag, steps),
        largest_lag=largest_lag(known, lr, steps),
        strange=strange,
        verdict=CARRIED.get(where.verdict, where.verdict) if strange else where.verdict,
    )


def advice_lines(advice: Advice, *, is_brief: bool = False) -> list[str]:
    """The advice for a person; `is_brief` leaves out what runs would tell where nothing is known."""
    lag, lr, steps = advice.staleness, advice.lr, advice.num_steps
    lines = [f"region          learning rate {lr:.3g} at S = {lag} for T = {steps} steps: {_headline(advice)}"]
    if advice.calibration == Calibration():
        return [*lines, "what would tell `cli.py advise CONFIG` says it"] if is_brief else [*lines, *_what_would_tell(advice)]
    batch, horizon = _measured(advice.calibration.bound("batch")), _measured(advice.calibration.bound("horizon"))
    lines += [
        f"batch           S x lr = {lag * lr:.3g} steps, R_batch/G_upd = {batch}: {_margin(advice.where.batch)}",
        f"horizon         T x lr = {steps * lr:.3g} steps, R_crit/G_upd = {horizon}: {_margin(advice.where.horizon)}",
        f"largest lr      {_measured(advice.largest_lr)} at S = {lag}",
    ]
    if advice.largest_lr is not None and advice.largest_lr.lower > 0:
        lines.append(
            f"governor        would hold it at {advice.largest_lr.lower / MARGIN:.3g}, {MARGIN:g} times below what is certain to be inside"
        )
    most = advice.largest_lag
    if most is not None:
        lines.append(f"largest S       {_largest_lag(most, advice.calibration.farthest_lag)} at this learning rate")
    lines.append(f"by              {len(advice.calibration.runs)} runs; {advice.calibration.notes}")
    for name, (there, here) in advice.strange.items():
        if there is not None:
            ours, theirs = (here, there) if here is None else contrast(here, there)
            lines.append(f"NOT LIKE THEM   {name}: {ours} here, {theirs} there; the constants may not hold")
    if unknown := [name for name, (there, _) in advice.strange.items() if there is None]:
        lines.append(
            f"NOT KNOWN       whether they had this {', '.join(unknown)}: that is not recorded; the constants hold only if they had"
        )
    return lines


def advice_json(advice: Advice) -> str:
    """The advice for a program."""
    return msgspec.json.format(msgspec.json.encode(_with_names(advice))).decode()


def _with_names(value: Any) -> Any:
    if isinstance(value, Struct):
        return {field: _with_names(getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {field: _with_names(part) for field, part in value._asdict().items()}
    return value


def _headline(advice: Advice) -> str:
    binding = f"; the {advice.where.binding} constraint binds" if advice.where.binding else ""
    words = {
        "inside": "inside the safe region",
        "outside": "OUTSIDE the safe region",
        "cannot tell": "at its edge: the runs known so far cannot tell",
        "unknown": "not known",
    }
    if advice.verdict != advice.where.verdict:
        return (
            f"{words[advice.verdict]}: the calibrating runs differ, or may; by their constants it would be {advice.where.verdict}{binding}"
        )
    return words[advice.verdict] + binding


def _what_would_tell(advice: Advice) -> list[str]:
    rates = ", ".join(f"{advice.lr * factor:.3g}" for factor in GRID)
    is_lagged = advice.staleness > 0
    lists = (
        f'pipelines = ["{advice.pipeline}"]',
        f'surrogates = ["{advice.surrogate}"]',
        f"lags = [{advice.staleness}]" if is_lagged else "lags = [1]  # each batch used once, by the weights that sampled it: S = 0",
        f"learning_rates = [{rates}]",
        "seeds = [1, 2]",
    )
    if is_lagged:
        nothing = "how far this policy can drift from what sampled its batches: R_batch and R_crit are not calibrated"
        first = "from the spread of its importance ratios"
    else:
        nothing = "how far this policy can go: R_crit is not calibrated (S = 0 leaves the batch constraint absent)"
        first = "from how far it went"
    return [
        f"                nothing is known yet of {nothing}",
        f"what would tell a run of this configuration gives a first bound {first}: `advise CONFIG --from RUN`",
        "                a sweep over learning rates gives the boundary; in its file, beside name and config, stands",
        "                [[grids]]",
        *(f"                {line}" for line in lists),
        "                then `cli.py sweep SWEEP.toml` and `cli.py advise CONFIG --from SWEEP.toml --write FILE`",
    ]


def _measured(found: Measured | None) -> str:
    if found is None:
        return "unknown"
    lower = f"{found.lower:.3g}" if found.lower > 0 else "open"
    return f"{found.value:.3g} [{lower}, {'open' if found.upper is None else f'{found.upper:.3g}'}]"


def _largest_lag(most: LargestLag, farthest: int) -> str:
    """No S far beyond those of the calibrating runs is told as if it had been seen, nor one that was only not looked beyond."""
    value = f"more than {farthest}" if most.value > farthest or most.value >= MAX_LAG else str(most.value)
    return f"{value} [{most.lower}, {'open' if most.upper is None or most.upper > farthest else most.upper}]"


def _margin(margin: Margin) -> str:
    return margin.verdict if margin.ratio is None else f"margin {_measured(margin.ratio)}, {margin.verdict}"


def check_strict(advice: Advice) -> None:
    """Raise ConfigError for a configuration that is outside the safe region."""
    if advice.verdict == "outside":
        edge = f"its edge at S = {advice.staleness} is {_measured(advice.largest_lr)}; " if advice.largest_lr is not None else ""
        lower = "run.steps" if advice.where.horizon.verdict == "outside" else "policy.reuse and policy.max_lag"
        fix = f"{edge}lower learner.lr or {lower}, or leave out --strict"
        raise ConfigError("learner.lr", advice.lr, "is outside the safe region of the two-constraint rule", fix)
