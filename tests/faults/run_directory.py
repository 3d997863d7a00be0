"""A run's directory as `cli.py up` makes it, for made-up weights: no model, no tokenizer, no task that is ever asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broker.blobs import BlobStore
from broker.keys import make_keys
from deploy.rundir import RunDirectory, RunManifest, policy_files
from protocol import safetensors_file
from protocol.config import parse_config
from protocol.delta import Delta, apply_in_place, encode_delta
from protocol.fold import Leg, fold
from protocol.weights import PolicyVersion, root_hash
from tests.faults.tokens import GROUP_SIZE, MAX_TOKENS, first_theta

NUM_PROMPTS = 16
RECORDS = "records"
TEMPORARY = "tmp"
PIPELINES: tuple[dict[str, Any], ...] = (
    {"max_lag": 3, "reuse": 1, "sync_every": 1},
    {"max_lag": 5, "reuse": 2, "sync_every": 2, "window": 2},
    {"max_lag": 4, "reuse": 1, "sync_every": 2, "window": 3},
    {"max_lag": 0, "reuse": 1, "sync_every": 1},
)
"""The seed of a run of chaos picks one."""


def compile_loops() -> None:
    """Code and fold deltas once, so that their compiled loops are cached: a process that is killed while it compiles leaves nothing to the next."""
    thetas = [first_theta()]
    for _ in range(2):
        thetas.append(thetas[-1].after([b""], ""))
    weights = [theta.weights() for theta in thetas]
    versions = [PolicyVersion(number, number, 0, root_hash(held)) for number, held in enumerate(weights)]
    files = [encode_delta("warm", weights[n], weights[n + 1], versions[n], versions[n + 1])[0] for n in range(2)]
    folded, _ = fold([Leg(memoryview(files[0]), inverted=False), Leg(memoryview(files[1]), inverted=False)])
    fold([Leg(memoryview(files[1]), inverted=True), Leg(memoryview(files[0]), inverted=True)])
    held = weights[0]
    apply_in_place(Delta(folded), held)
    assert root_hash(held) == versions[2].root


def make_run(path: Path, seed: int) -> RunDirectory:
    """A run that never comes to its last step."""
    policy = path / "policy"
    policy.mkdir(parents=True)
    (policy / "model.safetensors").write_bytes(safetensors_file.serialize(first_theta().weights(), {}))
    config = parse_config(
        {
            "run": {"name": "chaos", "seed": seed, "steps": 1_000_000},
            "policy": PIPELINES[seed % len(PIPELINES)],
            "rollout": {"group_size": GROUP_SIZE, "groups_per_batch": 4, "max_tokens": MAX_TOKENS},
            "learner": {"checkpoint_every": 5},
        }
    )
    make_keys(path / "keys")
    for name in (RECORDS, TEMPORARY):
        (path / name).mkdir()
    run = RunDirectory(path)
    files = policy_files(policy, BlobStore(path / "blobs"))
    run.create(config, RunManifest(path.name, "2000-01-01T00:00:00+00:00", str(policy), NUM_PROMPTS, files, {}, {}))
    return run
