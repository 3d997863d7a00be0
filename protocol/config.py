"""The configuration of a run: a TOML file, checked here and nowhere else.

Every field stands once, with its default and what it does. Whatever follows from other fields is a property, not a field.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocol.errors import ConfigError
from protocol.pacing import Pacing, smallest_max_lag

MAX_INTEGER: Final = 1 << 62
"""What messages and the journal hold, see messages.Count."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_held(cls, value: object) -> object:
        if isinstance(value, int) and value > MAX_INTEGER:
            raise ValueError(f"should be at most {MAX_INTEGER}")
        return value


class RunConfig(_Section):
    """The run as a whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    """Prefix of the run's directory and id."""
    seed: int = Field(0, ge=0)
    """Fixes the prompts' order and every ticket's sampling seed."""
    steps: int = Field(200, ge=1)
    """Optimizer steps."""
    directory: str = "runs"
    """Where run directories are made."""


class SupervisedConfig(_Section):
    """A small Llama trained from scratch on the task's own solutions, where no policy is given by path."""

    hidden_size: int = Field(128, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    target_reward: float = Field(0.45, gt=0, le=1)
    """Training stops at the first evaluation whose held-out reward reaches this."""
    max_steps: int = Field(6000, ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(1e-3, gt=0)
    seed: int | None = Field(None, ge=0)
    """Default: the run's. Runs with other seeds start from the same policy if this is set."""


class PolicyConfig(_Section):
    """Which policy is trained, and how far behind it actors may be."""

    path: str | None = None
    """A Hugging Face folder or hub id. Without it a small policy is prepared as [supervised] says."""
    max_lag: int | None = Field(None, ge=0)
    """S: no optimizer step uses a group older than this many steps. Default: the smallest that works."""
    reuse: int = Field(1, ge=1)
    """R: optimizer steps per batch."""
    sync_every: int | None = Field(None, ge=1)
    """Optimizer steps between publications. Default: reuse."""
    window: int = Field(1, ge=1)
    """How many batches may complete out of order; 1 keeps exact ticket order."""

    @property
    def publish_every(self) -> int:
        return self.reuse if self.sync_every is None else self.sync_every

    @property
    def lag_bound(self) -> int:
        return smallest_max_lag(self.reuse, self.publish_every) if self.max_lag is None else self.max_lag


class TaskConfig(BaseModel):
    """The task by name; all other fields of the section are the task's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "arithmetic"
    """arithmetic, reasoning-gym, question-answer, or module:object."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RolloutConfig(_Section):
    """What one ticket asks for."""

    group_size: int = Field(8, ge=2, le=4096)
    """G: completions per prompt."""
    groups_per_batch: int = Field(16, ge=1)
    """P: groups per batch."""
    max_tokens: int = Field(64, ge=1)
    """Token budget of one completion, end token included."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; behaviour log-probabilities are those of the tempered distribution."""


class ActorConfig(_Section):
    """The inference side."""

    num_actors: int = Field(2, ge=0, le=4096)
    """Actor processes that `up` starts."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto is vLLM where it is installed, otherwise transformers. Each actor decides for its machine; a group says who made it."""
    groups_per_forward: int = Field(1, ge=1)
    """transformers: groups in one forward pass. 1 makes a group's log-probabilities independent of what else is generated, bit for bit."""
    device: str = "auto"
    """A torch device, or auto: the first accelerator, otherwise cpu."""
    threads: int = Field(1, ge=1)
    """CPU threads of one actor. Part of the config because it can change the last bit of a sum."""
    max_sequences: int = Field(256, ge=1)
    """vllm: completions generated at the same time."""
    tensor_parallel: int = Field(1, ge=1)
    """vllm: accelerators of one actor."""
    memory_share: float = Field(0.9, gt=0, le=1)
    """vllm: share of an accelerator's memory for the actor; less where a learner is on it too."""
    keep_kv: bool = False
    """vllm: keep the key-value cache over an update. Cheaper, but what follows is sampled from a mixture of both policies, so
    log-probabilities are not exactly those of the recorded versions."""


class LearnerConfig(_Section):
    """The training side."""

    ranks: int = Field(1, ge=1)
    """Learner processes on this machine, under torchrun."""
    lr: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of the whole batch is scaled down to this norm."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Sequences of like length are run together up to this many tokens, padding included."""
    eval_every: int = Field(50, ge=0)
    """Optimizer steps between held-out evaluations; 0: only before and after."""
    eval_prompts: int = Field(256, ge=1)
    """Held-out prompts per evaluation."""
    checkpoint_every: int = Field(50, ge=1)
    device: str = "auto"
    threads: int = Field(1, ge=1)
    """CPU threads of one rank."""
    compact_deltas: bool = False
    """Also publish each delta with positions coded by exponent class, for actors behind slow links: about a quarter smaller, slower to code."""


class LossConfig(_Section):
    """The objective; the formulas are in docs/architecture.md and learner/objective.py."""

    surrogate: Literal["clip", "min-clip"] = "min-clip"
    """clip: the paper's clip(rho) * A (Eq. 3). min-clip: min(rho * A, clip(rho) * A)."""
    ratio: Literal["token", "sequence"] = "token"
    """token: one importance ratio per token. sequence: one per completion, the product over its tokens (Eq. 2)."""
    advantage: Literal["z-score", "mean", "leave-one-out"] = "z-score"
    aggregate: Literal["sequence", "token"] = "sequence"
    """sequence: mean over tokens in each completion, then over completions. token: mean over all tokens of the batch."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    kl_coef: float = Field(0.0, ge=0)
    """beta of the KL to the reference policy (the policy the run started from). 0 loads no reference."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance weights: ratios are taken against the learner's own log-probabilities at the batch's first use, and each
    is weighted by min(learner / actor, cap). Without it ratios are taken against the actor's log-probabilities."""


class StabilityConfig(_Section):
    """Where a run stands between too stale and too fast, and what is done about it; see docs/stability.md."""

    calibration: str | None = None
    """A file that `advise --write` made from runs like this one; in a run's own configuration its content. Without it the region is unknown,
    and only signs of a collapse are told."""
    governor: Literal["off", "warn", "hold"] = "warn"
    """off: measure only. warn: say when the run leaves the region. hold: keep the learning rate inside it."""
    rule: Literal["region", "sqrt-ess"] = "region"
    """What hold goes by. region: the two-constraint rule (Eq. 37), which needs a calibration. sqrt-ess: the learning rate times the square root
    of the effective sample size (VCPO), which needs none."""
    on_collapse: Literal["continue", "stop", "rollback"] = "stop"
    """When the reward has gone to zero and stays there: go on, end the run, or go back to the last good checkpoint with a lower learning rate."""


class BrokerConfig(_Section):
    """The broker."""

    address: str = Field("tcp://127.0.0.1:0", pattern=r"^tcp://[^:/]+:\d{1,5}$")
    """Where it listens: four consecutive ports from this one. Port 0 takes free ones."""


class Config(_Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    policy: PolicyConfig = PolicyConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    actor: ActorConfig = ActorConfig()
    learner: LearnerConfig = LearnerConfig()
    loss: LossConfig = LossConfig()
    stability: StabilityConfig = StabilityConfig()
    broker: BrokerConfig = BrokerConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        reuse, sync = self.policy.reuse, self.policy.publish_every
        smallest = smallest_max_lag(reuse, sync)
        if self.policy.lag_bound < smallest:
            raise ConfigError(
                "policy.max_lag",
                self.policy.lag_bound,
                f"with reuse {reuse} and sync_every {sync} the learner would wait for a version that it has not published",
                f"max_lag = {smallest} is the smallest that works; or lower reuse or sync_every",
            )
        if self.supervised.hidden_size % (2 * self.supervised.heads):
            raise ConfigError(
                "supervised.hidden_size",
                self.supervised.hidden_size,
                f"cannot be split into {self.supervised.heads} heads of even size",
                f"a multiple of {2 * self.supervised.heads}",
            )
        return self

    @property
    def staleness(self) -> int:
        """S as the paper's rule (37) counts it: the lag of a queue, the number of uses of a reused batch (whose last lag is one less)."""
        return self.policy.lag_bound + (1 if self.policy.reuse > 1 else 0)

    @property
    def pacing(self) -> Pacing:
        """The numbers the ledger works with."""
        return Pacing(
            max_lag=self.policy.lag_bound,
            reuse=self.policy.reuse,
            sync_every=self.policy.publish_every,
            groups_per_batch=self.rollout.groups_per_batch,
            num_steps=self.run.steps,
            window=self.policy.window,
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file (or JSON, by its name), with `section.field=value` overrides applied. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            "config file", str(path), f"cannot be read ({error.strerror})", "give the path of a TOML file, see examples/"
        ) from None
    except (ValueError, RecursionError) as error:  # beside its own error, tomllib lets through those of numbers and nesting without end
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError("config file", str(path), f"is not valid {kind} ({error})", "mend the line it names") from None
    if not isinstance(data, dict):
        raise ConfigError("config file", str(path), "is not an object of sections", 'write {"run": {...}, ...}, as in a run\'s config.json')
    for override in overrides:
        _override(data, override)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> Config:
    """The configuration in a dictionary as read from TOML or JSON. Raises ConfigError for the first wrong field."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _config_error(error) from None


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.field=value` overrides applied. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for override in overrides:
        _override(data, override)
    return parse_config(data)


def parse_config_json(text: str | bytes) -> Config:
    """The configuration in JSON, as `config_json` writes it. Raises ConfigError."""
    return parse_config(json.loads(text))


def config_json(config: Config) -> str:
    """A configuration as JSON, complete; `parse_config` of it gives the same configuration.

    Raises ConfigError for options of a task that JSON cannot hold.
    """
    try:
        text = config.model_dump_json(indent=2)
        json.loads(text)  # a number can have more digits than may be read again
    except ValueError as error:
        raise ConfigError("task", config.task.name, f"its options cannot be kept as JSON ({error})", "shorten or flatten them") from None
    return text


def _override(data: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    section, dot, field = name.strip().partition(".")
    if not separator or not dot or not field:
        raise ConfigError("--set", override, "is not section.field=value", "for example --set learner.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    if not isinstance(data.setdefault(section, {}), dict):
        raise ConfigError(section, data[section], "is not a section", f"write [{section}] and its fields below it")
    data[section][field] = value


def _config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        known = _fields_beside(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return ConfigError(field, value, "there is no such field", fix)
    problem = first["msg"][:1].lower() + first["msg"][1:]
    return ConfigError(field, value, problem, "correct the value or remove the line to take the default")


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = typing.get_type_hints(model).get(str(part))
        if isinstance(annotation, types.UnionType) or not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return sorted(model.model_fields)
