"""A sweep: runs of one configuration over staleness, learning rate and seed, as the paper's section 4 has them. A TOML file, checked here."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from protocol.config import Config, load_config
from protocol.errors import ConfigError

Pipeline = Literal["cycles", "queue"]
Surrogate = Literal["clip", "min-clip"]
GovernorSetting = Literal["off", "hold", "sqrt-ess"]
GRID_FIELDS: Final = {
    "run.name": "name",
    "run.seed": "seeds",
    "loss.surrogate": "surrogates",
    "learner.lr": "learning_rates",
    "policy.reuse": "pipelines and lags",
    "policy.sync_every": "pipelines and lags",
    "policy.max_lag": "pipelines and lags",
}
"""What a run's name tells of it, and from which lists of its grid that comes."""


class Grid(BaseModel):
    """One grid of runs: every combination of its lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipelines: list[Pipeline] = Field(default=["cycles"], min_length=1)
    """cycles: a batch is used for S steps, then actors get new weights. queue: a fresh batch each step, S versions old."""
    surrogates: list[Surrogate] = Field(default=["clip"], min_length=1)
    lags: list[int] = Field(min_length=1)
    """S."""
    learning_rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    governors: list[GovernorSetting] = Field(default=["off"], min_length=1)
    """off: as the configuration says."""
    set: dict[str, str | int | float | bool] = {}
    """Further fields, by section.field."""

    @field_validator("lags")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("each S should be at least 1")
        return value

    @field_validator("set")
    @classmethod
    def _not_the_lists(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _beside_the_lists(value)


class SweepConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")
    config: str
    """The configuration that all runs share, a path from the folder of this file."""
    directory: str = "runs"
    """The sweep's runs are in a folder of its name below this."""
    mode: Literal["serial", "processes"] = "serial"
    """serial: each run in one process, for small policies. processes: broker, actors and learner of their own, as `up` starts them."""
    parallel: int = Field(0, ge=0)
    """Runs at the same time; 0: as many as the machine has cores for."""
    set: dict[str, str | int | float | bool] = {}
    """Fields that all runs share, by section.field, over those of `config`."""
    grids: list[Grid] = Field(min_length=1)

    @field_validator("set")
    @classmethod
    def _not_the_lists(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _beside_the_lists(value)

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return Path(self.directory) / self.name


class CellPlan(NamedTuple):
    """One run of a sweep: its name, and its configuration."""

    name: str
    pipeline: Pipeline
    max_lag: int
    config: Config


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, list[CellPlan]]:
    """A sweep and all its runs, each once; `overrides` are set in all of them. Raises ConfigError."""
    for override in overrides:
        if (field := override.partition("=")[0].strip()) in GRID_FIELDS:
            raise ConfigError("--set", override, "is what the grids are for", f"change {GRID_FIELDS[field]} in {path}")
    try:
        sweep = SweepConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            "sweep file", str(path), f"cannot be read ({error.strerror})", "give the path of a TOML file, see examples/"
        ) from None
    except ValidationError as error:
        raise _sweep_error(error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("sweep file", str(path), f"is not valid TOML ({error})", "mend the line it names") from None
    plans: dict[str, CellPlan] = {}
    for grid in sweep.grids:
        for plan in _plans(sweep, grid, path.parent, overrides):
            if plans.setdefault(plan.name, plan).config != plan.config:
                fix = "change one of their `set` tables, or values that differ after their sixth digit"
                raise ConfigError("grids", plan.name, "two grids name this run and set it differently", fix)
    return sweep, list(plans.values())


def _plans(sweep: SweepConfig, grid: Grid, folder: Path, overrides: Sequence[str]) -> list[CellPlan]:
    plans = []
    for values in product(grid.pipelines, grid.surrogates, grid.governors, grid.lags, grid.learning_rates, grid.seeds):
        pipeline, surrogate, governor, lag, lr, seed = values
        name = f"{pipeline}-{surrogate}{'' if governor == 'off' else '-' + governor}-S{lag}-lr{lr:g}-seed{seed}"
        fields: dict[str, Any] = {**sweep.set, **grid.set}
        fields |= {"run.name": name, "run.seed": seed, "loss.surrogate": surrogate, "learner.lr": lr, **_pacing(pipeline, lag)}
        if governor != "off":
            fields |= {"stability.governor": "hold", "stability.rule": "region" if governor == "hold" else governor}
        settings = [f"{field}={_toml(value)}" for field, value in fields.items()]
        config = load_config(folder / sweep.config, [*settings, *overrides])
        if sweep.mode == "serial" and config.learner.ranks != 1:
            raise ConfigError("learner.ranks", config.learner.ranks, "serial mode has one rank", 'set it to 1, or mode = "processes"')
        plans.append(CellPlan(name, pipeline, lag, config))
    return plans


def _pacing(pipeline: Pipeline, lag: int) -> dict[str, int]:
    """The paper's S in the cycles pipeline is the number of uses, so that lags go from 0 to S - 1 (section 3.1)."""
    if pipeline == "cycles":
        return {"policy.reuse": lag, "policy.sync_every": lag, "policy.max_lag": lag - 1}
    return {"policy.reuse": 1, "policy.sync_every": 1, "policy.max_lag": lag}


def _toml(value: str | int | float | bool) -> str:
    """As TOML writes it, so that a text that looks like a number stays a text."""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _beside_the_lists(fields: dict[str, Any]) -> dict[str, Any]:
    for field in fields:
        if (name := field.strip()) in GRID_FIELDS:
            raise ValueError(f"{name} comes from the lists of a grid: {GRID_FIELDS[name]}")
    return fields


def _sweep_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = first["loc"]
    problem, fix = first["msg"].removeprefix("Value error, "), "correct it; examples/paper.toml is one"
    if first["type"] == "extra_forbidden":
        known = sorted((SweepConfig if len(location) == 1 else Grid).model_fields)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        problem, fix = "there is no such field", f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    is_missing = first["type"] == "missing"  # then its input is all that stands beside it
    problem, value = ("is missing", None) if is_missing else (problem, first.get("input"))
    return ConfigError(".".join(str(part) for part in location), value, problem[:1].lower() + problem[1:], fix)
