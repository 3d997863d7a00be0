"""`replay --actor TICKET`: one recorded group generated again by the real actor, and its log-probabilities worked out again.

Two questions, since a group may span versions: does the same seed under the same version give the same tokens (as far as the first change of
version), and do the recorded tokens have the recorded log-probabilities under the versions they were sampled from?
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.blobs import BlobStore
from broker.history import History, read_history
from broker.recorded_weights import RecordedWeights
from broker.replay_actor import RecordedActorPort
from deploy.rundir import RunDirectory
from deploy.wiring import build_actor
from protocol.config import Config, parse_config_json
from protocol.errors import ConfigError, EngineError
from protocol.groups import Group, decode_group
from protocol.journal import JOURNAL_NAME, open_read_only, read_payload
from protocol.messages import ActorReport, NamedBlob

CLOSE = {"transformers": 1e-3, "vllm": 5e-2}
"""Nats by which an engine's log-probability may be off from another working out; vLLM's is in bf16. docs/replay.md says what was seen."""


class CompletionDifference(NamedTuple):
    """One completion, recorded and generated again. `num_comparable` tokens were sampled before the recorded group changed version."""

    num_comparable: int
    num_tokens: int
    first_difference: int | None
    """Place of the first token that is another one, None if there is none among the comparable."""
    largest_gap: float
    """Largest difference of log-probability (nats) of a token before that place."""


class GroupReplay(NamedTuple):
    """A recorded group, what came when it was generated again, and the recorded tokens' log-probabilities under their own versions."""

    recorded: Group
    again: Group
    completions: list[CompletionDifference]
    largest_gap: float
    """Largest difference (nats) between a recorded log-probability and the one worked out again under the token's version."""

    @property
    def is_same(self) -> bool:
        """Whether every comparable token came again and every log-probability is close."""
        gaps = [self.largest_gap, *(completion.largest_gap for completion in self.completions)]
        close = max(CLOSE.get(engine_name(group), min(CLOSE.values())) for group in (self.recorded, self.again))
        return all(completion.first_difference is None for completion in self.completions) and max(gaps) <= close


def engine_name(group: Group) -> str:
    """What `--engine` calls the engine that made a group."""
    return group.engine.partition("/")[0].split("-")[0]


def replay_ticket(directory: Path, ticket: int, engine: str | None) -> GroupReplay:
    """Generate the group of a ticket again. Raises ConfigError for a ticket without a group, WeightsError, EngineError, JournalError."""
    run = RunDirectory(directory)
    path = directory / JOURNAL_NAME
    connection = open_read_only(path)
    try:
        payload = read_payload(connection, path, ticket)
    finally:
        connection.close()
    if payload is None:
        raise ConfigError("--actor", ticket, "has no group in this recording", "take one that `cli.py inspect groups RUN` lists")
    recorded, history, files = decode_group(payload), read_history(path), run.manifest().policy_files
    blobs = BlobStore(directory / "blobs")
    with tempfile.TemporaryDirectory(prefix="slipstream-replay-") as folder:
        again = asyncio.run(_generate(history, blobs, Path(folder), files, recorded, engine or engine_name(recorded)))
        gap = _gap(history, blobs, files, recorded, Path(folder) / "policy")
    return GroupReplay(recorded, again, compare(recorded, again), gap)


async def _generate(history: History, blobs: BlobStore, folder: Path, files: list[NamedBlob], recorded: Group, engine: str) -> Group:
    port = RecordedActorPort(history, blobs, BlobStore(folder / "made"), files, recorded)
    actors: list[Any] = []

    def report() -> ActorReport:
        return actors[0].report() if actors else ActorReport(-1, 0, [], 0.0, 0.0, 0, "")

    welcome = await port.join(engine, report)
    (folder / "policy").mkdir()
    actors.append(await build_actor(port, welcome, folder / "policy", recorded.actor, engine))
    await actors[0].run()
    if port.group is None:
        raise EngineError(f"ticket {recorded.ticket} could not be generated again: {port.failure or 'the engine gave nothing'}")
    return port.group


def compare(recorded: Group, again: Group) -> list[CompletionDifference]:
    """The completions of two groups of one ticket, one by one."""
    found = []
    for ours, theirs in zip(recorded.completions(), again.completions(), strict=True):
        ids, other = recorded.token_ids[ours], again.token_ids[theirs]
        changes = np.flatnonzero(recorded.versions[ours] != recorded.oldest_version)
        comparable = int(changes[0]) if changes.size else ids.size
        length = min(comparable, other.size)
        apart = np.flatnonzero(ids[:length] != other[:length])
        first = int(apart[0]) if apart.size else None
        if first is None and (other.size < comparable or (comparable == ids.size and other.size > ids.size)):
            first = length
        same = length if first is None else first
        gaps = np.abs(recorded.logprobs[ours][:same] - again.logprobs[theirs][:same])
        found.append(CompletionDifference(comparable, ids.size, first, float(gaps.max(initial=0.0))))
    return found


def _gap(history: History, blobs: BlobStore, files: list[NamedBlob], group: Group, policy: Path) -> float:
    """The largest difference between recorded log-probabilities and those that the recorded versions give, by the learner's own forward pass."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from actor.transformers_engine import to_torch
    from learner.batch import Sequence, collate
    from learner.model import completion_logprobs

    config: Config = parse_config_json(history.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy)).float().eval()
    parameters = dict(model.named_parameters())
    weights = RecordedWeights(history.publications, blobs, files)
    sequences = [Sequence(group.prompt_ids, group.token_ids[part], group.logprobs[part], 0.0) for part in group.completions()]
    batch = collate(sequences, torch.device("cpu"))
    versions = _rows([group.versions[part] for part in group.completions()], batch.mask.shape[1])
    largest = 0.0
    for number in np.unique(group.versions).tolist():
        with torch.no_grad():
            for name, tensor in weights.at(number).items():
                parameters[name].copy_(to_torch(tensor).float())
            logprobs, _ = completion_logprobs(model, batch, config.rollout.temperature)
        gaps = (logprobs - batch.behaviour).abs().numpy() * (versions == number)
        largest = max(largest, float(gaps.max(initial=0.0)))
    return largest


def _rows(rows: list[NDArray[np.int32]], width: int) -> NDArray[np.int32]:
    padded = np.full((len(rows), width), -1, np.int32)
    for place, row in enumerate(rows):
        padded[place, : row.size] = row
    return padded


def ticket_lines(found: GroupReplay) -> list[str]:
    """A replayed group in words."""
    group = found.recorded
    versions = (
        f"version {group.oldest_version}"
        if group.oldest_version == group.newest_version
        else (
            f"versions {group.oldest_version} to {group.newest_version}; generated again under {group.oldest_version}, compared up to the change"
        )
    )
    lines = [f"ticket {group.ticket}: {group.actor} ({group.engine}), seed {group.seed}, {versions}; now {found.again.engine}"]
    for place, one in enumerate(found.completions):
        tokens = f"{one.num_comparable} of {one.num_tokens} tokens comparable"
        where = "all the same" if one.first_difference is None else f"another token at place {one.first_difference}"
        lines.append(f"  completion {place}: {tokens}, {where}; log-probabilities of the same tokens within {one.largest_gap:.2e} nats")
    lines.append(f"recorded tokens under their own versions: log-probabilities within {found.largest_gap:.2e} nats of the recorded ones")
    return lines
