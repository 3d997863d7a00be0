"""Sweeps that obey laws we choose, with noise from a seed: what the estimators have to find again, and what figures can be drawn of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.cells import Cell, Pipeline, StepRow

LEARNING_RATES = (2.5e-8, 5e-8, 1e-7, 2e-7, 4e-7, 8e-7, 1.6e-6)
G_UPD = 40.0
NUM_ROWS_AFTER_COLLAPSE = 12
EVAL_EVERY = 50


def make_sweep(
    *,
    boundary_exponent: float = 1.0,
    product: float = 2.3e-6,
    escape: float = 3.2e-5,
    escape_lr_exponent: float = 1.0,
    escape_lag_exponent: float = 0.0,
    seeds: Sequence[int] = (0, 1),
    lags: Sequence[int] = (4, 8, 16, 32),
    learning_rates: Sequence[float] = LEARNING_RATES,
    horizon: int = 800,
    pipeline: Pipeline = "cycles",
    surrogate: str = "clip",
    noise: float = 0.1,
    rng_seed: int = 0,
    collapsing_cosine: float = 0.9,
    stable_cosine: float = 0.0,
    collapsing_drift: float = 1.0,
    stable_drift: float = 0.5,
    has_rows: bool = True,
) -> list[Cell]:
    """One cell for each S, learning rate and seed.

    With s the geometric mean of `lags` and e that of `learning_rates`, a cell collapses where lr > (product / s) (S / s)^-boundary_exponent, at
    step (escape / e) (lr / e)^-escape_lr_exponent (S / s)^-escape_lag_exponent if that lies before the horizon, in the cycles pipeline rounded
    up to the next weight sync. Both right sides are multiplied by log-normal noise of width `noise`, drawn for each cell. Cosines of new-batch
    pairs tend to `collapsing_cosine` or `stable_cosine`, those of same-batch pairs lie above; displacements grow as `collapsing_drift` or
    `stable_drift` powers of the step. Without `has_rows` cells have no rows and no validation, which is quicker.
    """
    random = np.random.default_rng(rng_seed)
    s, e = geometric_mean(lags), geometric_mean(learning_rates)
    cells = []
    for lag in lags:
        for lr in learning_rates:
            for seed in seeds:
                boundary = product / s * (lag / s) ** -boundary_exponent * math.exp(noise * random.standard_normal())
                escaped = escape / e * (lr / e) ** -escape_lr_exponent * (lag / s) ** -escape_lag_exponent
                escaped *= math.exp(noise * random.standard_normal())
                quantum = lag if pipeline == "cycles" else 1
                step = max(1, math.ceil(escaped / quantum)) * quantum
                collapse = step if lr > boundary and step < horizon else None
                cosine = stable_cosine if collapse is None else collapsing_cosine
                drift = stable_drift if collapse is None else collapsing_drift
                rows = _rows(lag, lr, horizon, pipeline, collapse, cosine, drift, random) if has_rows else []
                cells.append(
                    Cell(
                        name=f"{pipeline}-{surrogate}-S{lag}-lr{lr:g}-seed{seed}",
                        pipeline=pipeline,
                        surrogate=surrogate,
                        max_lag=lag,
                        lr=lr,
                        seed=seed,
                        horizon=horizon,
                        governor="off",
                        rows=rows,
                        validation=[(row.step, 0.9 * (row.reward or 0.0)) for row in rows if row.step % EVAL_EVERY == 0],
                        outcome="stable" if collapse is None else "collapsed",
                        collapse_step=collapse,
                    )
                )
    return cells


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _rows(
    lag: int, lr: float, horizon: int, pipeline: Pipeline, collapse: int | None, cosine: float, drift: float, random: np.random.Generator
) -> list[StepRow]:
    """What such a run measures: the reward rises and is zero from the collapse on; the cosine starts at 0.6 and goes to where it is to go."""
    reuse = lag if pipeline == "cycles" else 1
    num_rows = horizon if collapse is None else min(horizon, collapse + NUM_ROWS_AFTER_COLLAPSE)
    shakes = random.standard_normal((num_rows, 3))
    rows = []
    for step, (a, b, c) in enumerate(shakes.tolist()):
        position = step % reuse
        is_first_use = position == 0
        is_dead = collapse is not None and step >= collapse
        aligned = cosine + (0.6 - cosine) * math.exp(-step / 60)
        if not is_first_use:
            aligned += 0.5 * (1 - aligned)
        stale = position if pipeline == "cycles" else min(step, lag)
        away = lr * G_UPD * stale
        rows.append(
            StepRow(
                step=step,
                reward=0.0 if is_dead else min(1.0, max(0.01, 0.2 + 0.6 * (1 - math.exp(-step * lr / 1e-5)) + 0.02 * a)),
                lr=lr,
                lag=float(stale),
                is_first_use=is_first_use,
                cosine=None if step == 0 else max(-1.0, min(1.0, aligned + 0.03 * b)),
                g_upd=G_UPD * math.exp(0.05 * c),
                drift=away,
                displacement=lr * G_UPD * (step + 1) ** drift,
                clip_fraction=min(1.0, 400 * away),
                effective_sample_size=1 / (1 + 400 * away),
                kl_behaviour=away**2,
                entropy=0.0 if is_dead else 1.0 / (1 + step * lr / 1e-5),
                completion_length=10.0,
            )
        )
    return rows
