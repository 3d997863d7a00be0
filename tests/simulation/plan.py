"""What a seed stands for: the run, its peers, its weather and the faults that will befall it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from protocol.config import Config, parse_config
from protocol.pacing import Pacing, smallest_max_lag
from tests.simulation.network import Weather

FAULTS = {
    "broker_dies": 3,
    "broker_dies_in_an_operation": 3,
    "disk_is_full": 2,
    "disk_fills_up": 2,
    "syncs_fail": 2,
    "learner_dies": 4,
    "learner_freezes": 2,
    "actor_dies": 4,
    "actor_freezes": 3,
    "machine_vanishes": 1,
    "link_is_cut": 6,
    "weather_changes": 3,
    "wall_clock_jumps": 1,
    "actors_are_desired": 1,
    "run_is_stopped": 0.3,
    "bit_flips": 0.2,
}
"""How often each fault is drawn; see `faults.py`."""


@dataclass(frozen=True)
class Plan:
    """Everything about a simulation that is fixed before it begins. Times are in seconds, what is not told otherwise is a probability."""

    config: Config
    num_prompts: int
    group_size: int
    num_actors: int
    mean_seconds: float
    """Of one group."""
    step_seconds: float
    publish_seconds: float
    checkpoint_every: int
    eval_every: int
    replays_exactly: bool
    """Whether a learner that resumes arrives at the same weights."""
    has_base: bool
    compact: bool
    engine_failures: float
    engine_refusals: float
    invalid_groups: float
    keeps_order: bool
    goes_on: bool
    """Whether a run that was stopped is started again."""
    loss: float
    repeats: float
    delay: float
    commit_seconds: float
    """What a commit takes while the broker goes on beside it; 0: the broker waits for it."""
    fault_seconds: float
    """How long faults are drawn; then everything is mended."""
    faults: tuple[tuple[float, str], ...]

    @property
    def pacing(self) -> Pacing:
        """The numbers of the pipeline."""
        return self.config.pacing

    @property
    def run_seed(self) -> int:
        """The seed of the simulated run."""
        return self.config.run.seed

    @property
    def patience(self) -> float:
        """Seconds within which a run is over once everything is mended: every step again, one group after the other, with room to spare."""
        groups = 8 * self.mean_seconds * (self.config.rollout.groups_per_batch + 1)
        return 120.0 + self.config.run.steps * (groups + 4 * self.step_seconds + 8 * self.publish_seconds + 10.0)

    def weather(self, random: Random) -> Weather:
        """What a new link is like."""
        bad = random.random() < 0.7
        return Weather(
            delay=self.delay * random.uniform(0.2, 2.0),
            jitter=self.delay * random.choice([0.1, 1.0, 5.0]),
            loss=self.loss * random.random() if bad else 0.0,
            repeats=0.0 if self.keeps_order else self.repeats * random.random(),
            keeps_order=self.keeps_order,
        )


def draw_plan(random: Random, seed: int) -> Plan:
    """What the generator says. One seed in a hundred has hundreds of actors, and is short."""
    crowd = seed % 100 == 99
    policy, size = _draw_policy(random), random.randint(1, 4)
    steps = random.randint(20, 36) if random.random() < 0.2 else random.randint(3, 14)
    mean_seconds, step_seconds = random.choice([0.1, 0.4, 1.5]), random.choice([0.05, 0.5, 2.0])
    if crowd:
        size, steps = 32, 4
    keeps_order = random.random() < 0.7
    fault_seconds = max(4.0, min(60.0, random.uniform(0.3, 1.5) * steps * (mean_seconds + step_seconds)))
    weights = [weight * random.choice([0.0, 0.0, 1.0, 3.0]) for weight in FAULTS.values()]
    num_faults = random.choice([0, 3, 6, 12, 24]) if any(weights) else 0
    kinds = random.choices(list(FAULTS), weights, k=num_faults) if num_faults else []
    gloomy = random.random() < 0.08
    return Plan(
        config=parse_config(
            {
                "run": {"seed": random.randrange(1 << 30), "steps": steps},
                "policy": policy,
                "rollout": {"group_size": 2, "groups_per_batch": size},
                "actor": {"num_actors": 1},
            }
        ),
        num_prompts=random.randint(1, 20),
        group_size=2,
        num_actors=random.randint(150, 300) if crowd else random.randint(1, 8),
        mean_seconds=mean_seconds,
        step_seconds=step_seconds,
        publish_seconds=random.choice([0.02, 0.3, 2.0]),
        checkpoint_every=random.choice([1, 3, 7, 50]),
        eval_every=random.choice([0, 2, 5]),
        replays_exactly=random.random() < 0.5,
        has_base=random.random() < 0.7,
        compact=random.random() < 0.3,
        engine_failures=random.choice([0.3, 0.8]) if gloomy else random.choice([0.0, 0.02, 0.1]),
        engine_refusals=random.choice([0.0, 0.0, 0.05]),
        invalid_groups=random.choice([0.0, 0.0, 0.05]),
        keeps_order=keeps_order,
        goes_on=random.random() < 0.6,
        loss=random.choice([0.0, 0.01, 0.1, 0.3]),
        repeats=random.choice([0.0, 0.05, 0.3]),
        delay=random.choice([0.0005, 0.01, 0.2]),
        commit_seconds=random.choice([0.0, 0.005, 0.1]),
        fault_seconds=fault_seconds,
        faults=tuple(sorted((random.uniform(0.0, fault_seconds), kind) for kind in kinds)),
    )


def _draw_policy(random: Random) -> dict[str, Any]:
    """The queue pipeline, the paper's strict cycles, or anything between."""
    kind = random.choice(["queue", "queue", "cycle", "any"])
    reuse = 1 if kind == "queue" else random.randint(1, 4)
    sync = reuse if kind == "cycle" else random.randint(1, 3)
    max_lag = smallest_max_lag(reuse, sync) + (0 if kind == "cycle" else random.randint(0, 3))
    return {"max_lag": max_lag, "reuse": reuse, "sync_every": sync, "window": random.choice([1, 1, 2, 3])}
