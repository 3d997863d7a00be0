"""How much of the shorter of generation and training is hidden behind the longer, by S; and how soon a new version is sampled from.

    python bench/overlap.py [--steps 40] [--generation 0.5] [--training 0.5] [--actors 2]

Broker, actors and learner are the real ones over CURVE-encrypted loopback TCP, each in a process of its own; only the engine and the optimizer step
are replaced by ones that take a known time: an engine that "samples" a token every so often and takes weights between two tokens, and a
training step that sleeps. Perfect overlap is wall = steps x max(generation, training); without overlap it is steps x (generation + training).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from actor.engine import Completion, GenerationRequest, Pause  # noqa: E402
from actor.loop import Actor  # noqa: E402
from actor.shadow import StagedWeights  # noqa: E402
from broker.actor_client import ActorClient  # noqa: E402
from broker.keys import load_key, make_keys  # noqa: E402
from broker.learner_client import LearnerClient  # noqa: E402
from deploy.rundir import RunDirectory, RunManifest  # noqa: E402
from examples.own_task import EvenDigits  # noqa: E402
from learner.batch import make_batch  # noqa: E402
from learner.publish import Publisher  # noqa: E402
from learner.ranks import OneRank  # noqa: E402
from protocol.config import Config, parse_config, parse_config_json  # noqa: E402
from protocol.groups import FULL  # noqa: E402
from protocol.messages import ActorReport, Publish, Published  # noqa: E402

GROUPS, GROUP_SIZE, TOKENS = 8, 2, 10
SKIPPED = 5
"""Steps before the measurement, in which the pipeline fills."""


class TimedEngine:
    """Implements actor.engine.Engine: one group at a time, a token every `token_seconds`; notes when each version is first sampled from."""

    name, num_groups_wanted, num_tokens = "timed", 2, 0

    def __init__(self, token_seconds: float) -> None:
        self._token_seconds, self._turn = token_seconds, asyncio.Lock()
        self._version = -1
        self.busy_seconds, self.num_groups = 0.0, 0
        self.first_tokens: dict[int, float] = {}

    async def update(self, staged: StagedWeights) -> Pause:
        self._version = staged.version.number
        return Pause(0.0, 0.0)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        async with self._turn:
            started, versions = time.monotonic(), []
            for index in range(request.max_tokens):
                # Against the start, so that late wake-ups do not add up: the engine takes its known time, no more.
                await asyncio.sleep(max(0.0, started + (index + 1) * self._token_seconds - time.monotonic()))
                versions.append(self._version)
                self.first_tokens.setdefault(self._version, time.monotonic())
            self.busy_seconds += time.monotonic() - started
            self.num_groups += 1
        ids = np.full(request.max_tokens, 5, np.int32)
        one = Completion(ids, np.full(request.max_tokens, -1.0, np.float32), np.array(versions, np.int32), FULL)
        return [one] * request.num_completions

    async def close(self) -> None:
        pass


class OneTokenizer:
    """A tokenizer that knows one word."""

    chat_template, eos_token_id = None, 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del text, add_special_tokens
        return [1, 2]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        del skip_special_tokens
        return "2" * len(token_ids)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> list[int]:
        raise NotImplementedError


async def act(address: str, key: Path, name: str, token_seconds: float, out: Path) -> None:
    """One actor process."""
    port, engine = ActorClient(address, load_key(key), name), TimedEngine(token_seconds)
    report: list[Actor] = []
    idle = ActorReport(-1, 0, [], 0.0, 0.0, 0, "starting")
    welcome = await port.join("timed", lambda: report[0].report() if report else idle)
    config = parse_config_json(welcome.config)
    report.append(Actor(name, port, engine, EvenDigits(), OneTokenizer(), (0,), config.rollout, welcome.policy_files))
    await report[0].run()
    await asyncio.to_thread(out.write_text, json.dumps([engine.first_tokens, engine.busy_seconds / max(engine.num_groups, 1)]))


class NotingClient(LearnerClient):
    """A learner's port that notes when each version was announced."""

    published: dict[int, float]

    def publish(self, publication: Publish) -> Published:
        answer = super().publish(publication)
        self.__dict__.setdefault("published", {})[answer.number] = time.monotonic()
        return answer


def make_run(folder: Path, max_lag: int, steps: int) -> tuple[RunDirectory, Config]:
    """A run's directory without a policy."""
    config = parse_config(
        {
            "run": {"steps": steps, "name": "overlap"},
            "policy": {"max_lag": max_lag},
            "rollout": {"group_size": GROUP_SIZE, "groups_per_batch": GROUPS, "max_tokens": TOKENS},
        }
    )
    make_keys(folder / "keys")
    run = RunDirectory(folder)
    run.create(config, RunManifest("overlap", "", "", 64, [], {}, {}))
    return run, config


def learn(run: RunDirectory, config: Config, address: str, training: float) -> tuple[float, dict[int, float]]:
    """The learner's loop with a step that sleeps; returns wall seconds of the measured steps and the time of each publication."""
    port = NotingClient(address, load_key(run.keys / "learner.key"))
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    publisher = Publisher(model, OneRank(), port, port.join(0, 1, {}), None, lambda: "")
    rng = np.random.default_rng(0)

    def publish(step: int) -> None:
        with torch.no_grad():
            model.w[torch.from_numpy(rng.integers(0, 200_000, 2000))] *= 1.01
        publisher.publish(step)

    publish(0)
    started = 0.0
    for step in range(config.run.steps):
        received = port.next_batch(step, publisher.check)
        assert received is not None
        batch = make_batch(received, config.loss)
        if step == SKIPPED:
            started = time.monotonic()
        time.sleep(training)
        lags = batch.lags(step, config.pacing.max_lag)
        publish(step + 1)
        port.commit(step, batch.number, lags, {"reward": batch.facts["reward"]})
    wall = time.monotonic() - started
    publisher.flush()
    publisher.close()
    port.done(config.run.steps, {})
    port.close()
    return wall, port.published


def measure(max_lag: int, steps: int, generation: float, training: float, num_actors: int) -> tuple[float, float, list[float]]:
    """Wall seconds per step after the pipeline has filled, the seconds that generating a batch took in fact (timers fire late), and seconds from
    each publication to the first token sampled from it."""
    with tempfile.TemporaryDirectory() as folder:
        run, config = make_run(Path(folder) / "run", max_lag, steps)
        token_seconds = generation * num_actors / (GROUPS * TOKENS)
        broker = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "broker", "--run", str(run.path)], stderr=subprocess.DEVNULL)
        actors = []
        try:
            while (address := run.broker_address()) is None:
                time.sleep(0.02)
            outs = [Path(folder) / f"{index}.json" for index in range(num_actors)]
            for index, out in enumerate(outs):
                role = ["act", address, str(run.keys / "actor.key"), f"actor-{index}", str(token_seconds), str(out)]
                actors.append(subprocess.Popen([sys.executable, __file__, *role]))
            wall, published = learn(run, config, address, training)
            for process in actors:
                process.wait(20)
        finally:
            for process in [*actors, broker]:
                process.kill()
                process.wait()
        first: dict[int, float] = {}
        group_seconds = []
        for out in outs:
            first_tokens, seconds = json.loads(out.read_text())
            group_seconds.append(seconds)
            for number, at in first_tokens.items():
                first[int(number)] = min(at, first.get(int(number), at))
        took = statistics.mean(group_seconds) * GROUPS / num_actors
        delays = [first[number] - at for number, at in published.items() if number in first and number > SKIPPED]
        return wall / (steps - SKIPPED), took, delays


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "act":
        address, key, name, token_seconds, out = sys.argv[2:]
        asyncio.run(act(address, Path(key), name, float(token_seconds), Path(out)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--generation", type=float, default=0.5, help="seconds to generate one batch with all actors")
    parser.add_argument("--training", type=float, default=0.5, help="seconds of one optimizer step")
    parser.add_argument("--actors", type=int, default=2)
    settings = parser.parse_args()
    none = (settings.generation + settings.training) / max(settings.generation, settings.training)
    print(f"{settings.steps} steps, generation {settings.generation} s, training {settings.training} s, {settings.actors} actors")
    print(f"without overlap {none:.3f}, perfect overlap 1.000")
    print("wall / max(generation, training): by the time that generation took in fact, and (by its nominal time)")
    print("  S   ratio   publication to first token: median, 90th percentile")
    for max_lag in (0, 1, 2, 4):
        wall, took, delays = measure(max_lag, settings.steps, settings.generation, settings.training, settings.actors)
        tenths = statistics.quantiles(delays, n=10)
        ratio, nominal = wall / max(took, settings.training), wall / max(settings.generation, settings.training)
        print(
            f"{max_lag:3d}   {ratio:.3f} ({nominal:.3f})   {1000 * statistics.median(delays):.1f} ms, {1000 * tenths[-1]:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
