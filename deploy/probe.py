"""`probe RUN`: the staleness bias of a recorded run (paper Eq. 17), measured by sampling again.

    delta(theta_t, phi) = H(theta_t, phi) - H(theta_t, theta_t)                                                                   (Eq. 13, 17)

theta_t is the version of a step, phi the one of k steps before, both built again from the run's deltas. In each round the same prompts and the same
random numbers make groups of theta_t and of every phi, so that most of their noise is the same and drops out of the difference; rounds have
nothing in common. The run is only read.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from broker.blobs import BlobStore
from broker.history import History, read_history
from broker.publications import Publications
from broker.recorded_weights import RecordedWeights
from deploy.rundir import RunDirectory, assemble_policy
from deploy.wiring import learner_device, stop_ids
from learner.stability.bias import MIN_ROUNDS, Bias, Estimate, Fit, RoundProducts, fit_growth, gradient_size, staleness_bias
from protocol.config import Config, parse_config_json
from protocol.differences import distance
from protocol.errors import ConfigError, WeightsError
from protocol.groups import Group, encode_group
from protocol.journal import JOURNAL_NAME
from protocol.ports import ReceivedBatch
from protocol.weights import PolicyVersion, Weights
from tasks.base import Task

LAGS = (1, 2, 4, 8, 16)
"""Asked for by default, as far as the run has them."""
GROUPS_PER_FORWARD = 8
NUM_NAMED = 8
"""Stretches of steps that a message names."""
Say = Callable[[str], None]


class ProbeOptions(NamedTuple):
    """What to measure: by default the newest step and those of LAGS that there are."""

    step: int | None = None
    lags: Sequence[int] | None = None
    num_prompts: int = 64
    num_rounds: int = 4
    seed: int = 0


class Choice(NamedTuple):
    """The versions that are measured: theta's, and phi's by lag, with the lags ascending."""

    theta: PolicyVersion
    phis: dict[int, PolicyVersion]


class Way(msgspec.Struct, frozen=True):
    """How far phi is from theta: `distance` |theta - phi|; `path`, the sum of the steps between the versions on the way, if all can be built again;
    `drift` k eta (mean G_upd) of Eq. 25 by the recorded metrics, if they have it. The first two are between published weights, rounded to bf16."""

    lag: int
    version: int
    distance: float
    path: float | None
    drift: float | None


class LagBias(msgspec.Struct, frozen=True):
    """What was found at one lag."""

    way: Way
    bias: Bias
    is_clear: bool


class ProbeReport(msgspec.Struct, frozen=True):
    """What was found. `fresh` is |H_on|; fits are of |delta| against |theta - phi| and against k (Theorem 1)."""

    run: str
    step: int
    version: int
    num_rounds: int
    num_prompts: int
    group_size: int
    seed: int
    fresh: Estimate
    lags: list[LagBias]
    by_distance: Fit
    by_lag: Fit


def probe_command(
    directory: Path, step: int | None, lags: str | None, num_prompts: int, num_rounds: int, seed: int, *, as_json: bool
) -> str:
    """What `probe` prints: a table, or JSON. Raises what `probe_run` does."""
    report = probe_run(directory, ProbeOptions(step, _lags(lags), num_prompts, num_rounds, seed), _say)
    return msgspec.json.format(msgspec.json.encode(report)).decode() if as_json else "\n".join(report_lines(report))


def probe_run(directory: Path, options: ProbeOptions, say: Say) -> ProbeReport:
    """Measure. Raises ConfigError for what the run does not have, WeightsError, JournalError, EngineError, TaskError."""
    if options.num_rounds < MIN_ROUNDS:
        raise ConfigError("--rounds", options.num_rounds, "leave no pair of rounds when one is left out", f"at least {MIN_ROUNDS}")
    if options.num_prompts < 1:
        raise ConfigError("--prompts", options.num_prompts, "are no groups", "at least 1")
    files, history, blobs = (
        RunDirectory(directory).manifest().policy_files,
        read_history(directory / JOURNAL_NAME),
        BlobStore(directory / "blobs"),
    )
    choice = choose_versions(history, lambda number: is_whole(history.publications, blobs, number), options)
    config = _config_at(history, choice.theta.step)
    weights = RecordedWeights(history.publications, blobs, files)
    with tempfile.TemporaryDirectory(prefix="slipstream-probe-") as folder:
        policy = Path(folder) / "policy"
        assemble_policy(files, blobs, policy)
        fresh, stale = asyncio.run(_sample(policy, config, weights, choice, options, say))
        say(f"gradients of step {choice.theta.step}")
        sizes, points = _gradients(policy, config, weights.at(choice.theta.number), fresh, stale)
    ways = _ways(history, choice, weights)
    return ProbeReport(
        history.run, choice.theta.step, choice.theta.number, options.num_rounds, options.num_prompts, config.rollout.group_size, options.seed,
        sizes,
        [LagBias(way, found := staleness_bias(points[way.lag]), found.is_clear) for way in ways],
        fit_growth([way.distance for way in ways], [points[way.lag] for way in ways]),
        fit_growth([float(way.lag) for way in ways], [points[way.lag] for way in ways]),
    )  # fmt: skip


# --- which versions


def choose_versions(history: History, has_files: Callable[[int], bool], options: ProbeOptions) -> Choice:
    """The versions that are asked for; `has_files` says whether one can be built again. Raises ConfigError, naming the versions there are.

    A step that is not given is the newest that has all the lags that are; lags that are not given are those of LAGS that the step has.
    """
    versions = {step: number for step in range(history.num_steps + 1) if (number := history.version_at(step)) is not None}
    if options.step is not None and options.step not in versions:
        raise ConfigError("--step", options.step, "has no version of its own", f"the run has versions of steps {_named(versions)}")
    wanted = LAGS if options.lags is None else options.lags
    for step in reversed(versions) if options.step is None else [options.step]:
        phis = {lag: versions[step - lag] for lag in sorted(wanted) if step - lag in versions}
        if not phis or (options.lags is not None and len(phis) < len(wanted)) or not has_files(versions[step]):
            continue
        left = {lag: number for lag, number in phis.items() if has_files(number)}
        if left and (options.lags is None or len(left) == len(wanted)):
            by_number = history.publications.by_number
            return Choice(by_number[versions[step]].version, {lag: by_number[number].version for lag, number in left.items()})
    kept = [step for step, number in versions.items() if has_files(number)]
    where = "no step" if options.step is None else f"step {options.step}"
    raise ConfigError(
        "--lags", ",".join(map(str, wanted)), f"{where} has all versions so many steps before it", f"versions with their files: steps {_named(kept)}"
    )  # fmt: skip


def is_whole(publications: Publications, blobs: BlobStore, number: int) -> bool:
    """Whether the files that lead to a version are there, by name and size."""
    way = publications.way_to(number)
    if way is None:
        return False
    refs = [hop.delta for hop in way.hops] + ([way.snapshot] if way.snapshot is not None else [])
    return all(blobs.size(ref.digest) == ref.size for ref in refs)


def _named(steps: Sequence[int] | dict[int, int]) -> str:
    """Steps in words: stretches of equal stride, "0 to 60" or "0, 4 to 60 by 4"."""
    stretches: list[list[int]] = []
    for step in steps:
        last = stretches[-1] if stretches else []
        if len(last) == 1 or (len(last) > 1 and step - last[-1] == last[1] - last[0]):
            last.append(step)
        else:
            stretches.append([step])
    words = []
    for stretch in stretches[:NUM_NAMED]:
        stride = stretch[1] - stretch[0] if len(stretch) > 1 else 1
        end = "" if len(stretch) == 1 else f" to {stretch[-1]}" if len(stretch) > 2 or stride == 1 else f", {stretch[-1]}"
        words.append(f"{stretch[0]}{end}{f' by {stride}' if len(stretch) > 2 and stride > 1 else ''}")
    return ", ".join(words) + (", ..." if len(stretches) > NUM_NAMED else "") if words else "none"


def _lags(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < len(part) < 10 and int(part) > 0 for part in parts):
        raise ConfigError("--lags", text, "is not a list of steps from 1 on", "for example --lags 1,2,4")
    return sorted({int(part) for part in parts})


def _config_at(history: History, step: int) -> Config:
    """The configuration that the step was, or would have been, taken with."""
    segments = [segment for segment in history.segments if segment.first <= step]
    return parse_config_json(segments[-1].config if segments else history.config)


# --- groups


class Draw(NamedTuple):
    """The randomness of one round: training problems, with replacement, and the seed of the group of each."""

    problems: list[int]
    seeds: list[int]


def draw_round(seed: int, place: int, num_problems: int, num_prompts: int) -> Draw:
    """Round number `place`. With replacement: rounds that share out a finite set of prompts would not be independent."""
    rng = np.random.default_rng([seed, place])
    return Draw(rng.integers(num_problems, size=num_prompts).tolist(), rng.integers(1 << 62, size=num_prompts).tolist())


async def _sample(
    policy: Path, config: Config, weights: RecordedWeights, choice: Choice, options: ProbeOptions, say: Say
) -> tuple[list[ReceivedBatch], dict[int, list[ReceivedBatch]]]:
    """The groups of each round, of theta and of each phi by lag."""
    from transformers import AutoTokenizer

    from actor.shadow import StagedWeights
    from actor.transformers_engine import TransformersEngine
    from tasks.registry import load_task

    task, tokenizer = load_task(config.task.name, config.task.options), AutoTokenizer.from_pretrained(policy)
    ends = stop_ids(policy, tokenizer)
    draws = [draw_round(options.seed, place, task.num_train, options.num_prompts) for place in range(options.num_rounds)]
    engine = TransformersEngine(policy, config.actor.device, config.actor.threads, GROUPS_PER_FORWARD)

    async def groups_of(version: PolicyVersion) -> list[ReceivedBatch]:
        say(f"groups of version {version.number} (step {version.step})")
        await engine.update(StagedWeights(version, weights.at(version.number), Path(), None))
        return [await sample_round(engine, config, task, tokenizer, ends, draw, version) for draw in draws]

    try:
        return await groups_of(choice.theta), {lag: await groups_of(phi) for lag, phi in choice.phis.items()}
    finally:
        await engine.close()


async def sample_round(
    engine: Any, config: Config, task: Task, tokenizer: Any, ends: tuple[int, ...], draw: Draw, version: PolicyVersion
) -> ReceivedBatch:
    """A round's groups, generated by an engine that holds `version`, scored, as the learner takes them. Raises EngineError, TaskError."""
    from actor.engine import GenerationRequest
    from tasks.prompts import encode_prompt
    from tasks.scoring import fetch_problem, score

    rollout = config.rollout
    problems = [fetch_problem(task, index) for index in draw.problems]
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    requests = [
        GenerationRequest(prompt, rollout.group_size, rollout.max_tokens, rollout.temperature, seed, ends)
        for prompt, seed in zip(prompts, draw.seeds, strict=True)
    ]
    made = await asyncio.gather(*(engine.generate(request) for request in requests))
    payloads = []
    for place, (problem, request, completions) in enumerate(zip(problems, requests, made, strict=True)):
        texts = [tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True) for completion in completions]
        group = Group(
            ticket=place,
            prompt=problem.index,
            seed=request.seed,
            actor="probe",
            engine=engine.name,
            prompt_ids=np.array(request.prompt_ids, np.int32),
            num_tokens=np.array([completion.token_ids.size for completion in completions], np.int32),
            token_ids=np.concatenate([completion.token_ids for completion in completions]),
            logprobs=np.concatenate([completion.logprobs for completion in completions]),
            versions=np.concatenate([completion.versions for completion in completions]),
            rewards=np.array([score(task, problem, text) for text in texts], np.float32),
            finish=np.array([completion.finish for completion in completions], np.uint8),
        )
        payloads.append(encode_group(group))
    return ReceivedBatch(0, payloads, {version.number: version.step})


# --- gradients and weights


def _gradients(
    policy: Path, config: Config, theta: Weights, fresh: list[ReceivedBatch], stale: dict[int, list[ReceivedBatch]]
) -> tuple[Estimate, dict[int, RoundProducts]]:
    """|H_on|, and by lag the products of the rounds' gradients at theta. Holds two gradients a round."""
    import torch
    import transformers

    from actor.transformers_engine import to_torch
    from learner.batch import make_batch
    from learner.model import load_model
    from learner.probe import round_products, surrogate_gradient

    torch.set_num_threads(config.learner.threads)
    transformers.utils.logging.disable_progress_bar()
    device = learner_device(config)
    model, reference = load_model(policy, device), load_model(policy, device) if config.loss.kl_coef > 0 else None
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in theta.items():
            parameters[name].copy_(to_torch(tensor).float())

    def gradients(rounds: list[ReceivedBatch]) -> list[Any]:
        return [surrogate_gradient(model, reference, make_batch(received, config.loss), config) for received in rounds]

    ours = gradients(fresh)
    points = {lag: round_products(ours, gradients(rounds)) for lag, rounds in stale.items()}
    return gradient_size(next(iter(points.values())).fresh), points


def _ways(history: History, choice: Choice, weights: RecordedWeights) -> list[Way]:
    """How far each phi is from theta: one walk back over the versions, by steps, from the newest to the oldest."""
    theta, lags = choice.theta, {phi.number: lag for lag, phi in choice.phis.items()}
    steps = range(theta.step - 1, theta.step - max(choice.phis) - 1, -1)
    numbers = [number for step in steps if (number := history.version_at(step)) is not None]
    end = before = _copy(weights.at(theta.number))
    path: float | None = 0.0
    found = []
    for number in numbers:
        try:
            here = weights.at(number)
        except WeightsError:
            if number in lags:
                raise
            path = None
            continue
        if path is not None:
            path += distance(before, here)
        before = _copy(here)
        if number in lags:
            lag = lags[number]
            found.append(Way(lag, number, distance(end, here), path, drift(history, theta.step, lag)))
    return found


def _copy(weights: Weights) -> Weights:
    return {name: tensor._replace(bits=tensor.bits.copy()) for name, tensor in weights.items()}


def drift(history: History, step: int, lag: int) -> float | None:
    """k eta (mean G_upd) over the `lag` steps before `step`: the sum of eta G_upd; None if the metrics do not have it."""
    metrics = [history.steps[at].metrics for at in range(step - lag, step)]
    known = [lr * g_upd for each in metrics if (lr := each.get("lr")) is not None and (g_upd := each.get("g_upd")) is not None]
    return sum(known) if len(known) == lag else None


# --- in words


def report_lines(report: ProbeReport) -> list[str]:
    """A report as a table."""
    lines = [
        f"run {report.run}: theta is version {report.version} (step {report.step}); {report.num_rounds} rounds of {report.num_prompts} prompts with "
        f"{report.group_size} completions, seed {report.seed}",
        f"|H_on| {_interval(report.fresh)}",
        "",
        f"{'lag':>4}{'version':>9}{'|theta-phi|':>13}{'path':>10}{'k eta G':>10}{'|delta|':>11}  {'95 % interval':<22}{'floor':>9}"
        f"{'along H_on':>12}  {'95 % interval':<20}{'across':>8}",
    ]
    for found in report.lags:
        way, bias = found.way, found.bias
        along, between = (
            ("-", "-") if bias.along is None else (f"{bias.along.value:+.3f}", f"{bias.along.low:+.3f} to {bias.along.high:+.3f}")
        )
        size = f"{_number(bias.size.low)} to {_number(bias.size.high)}" + ("" if found.is_clear else " noise")
        lines.append(
            f"{way.lag:>4}{way.version:>9}{_number(way.distance):>13}{_number(way.path):>10}{_number(way.drift):>10}{_number(bias.size.value):>11}  "
            f"{size:<22}{_number(bias.noise_floor):>9}{along:>12}  {between:<20}{_number(bias.across):>8}"
        )
    lines += ["", _fit_line("|theta-phi|", "C_stale", report.by_distance), _fit_line("k", "slope", report.by_lag)]
    return lines


def _fit_line(against: str, slope: str, fit: Fit) -> str:
    return f"|delta| against {against}: {slope} {_interval(fit.slope)}; exponent {_interval(fit.exponent)}, {fit.num_clear} lags clear: {fit.growth}"


def _interval(estimate: Estimate) -> str:
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
