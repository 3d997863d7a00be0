"""Exact: whatever happens to weights on their way, an actor says what is wrong, gets others, and samples no token from wrong ones meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from actor.transformers_engine import to_torch
from broker.sockets import Channel
from protocol import safetensors_file
from protocol.base import base_tensors
from protocol.delta import apply_file
from protocol.facts import VersionPublished
from protocol.groups import decode_group
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.weights import Weights, root_hash
from tests.faults.link import Link
from tests.system.conftest import stopped

pytestmark = pytest.mark.system
TOLERANCE = 2e-5
"""Nats between a log-probability sampled with a key-value cache and one computed over the whole completion, both in fp32."""
AGAIN = "starting again from nothing: "
FULL_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"', "sh"]


@pytest.fixture
def slow_steps(settings: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A run whose versions do not come faster than somebody can tamper with them, and which change nearly all of the weights."""
    return settings(
        run={"steps": 100_000},
        policy={"max_lag": 16},
        task={"name": "tests.system.coin_task:Coins"},
        rollout={"groups_per_batch": 16, "max_tokens": 24},
        learner={"checkpoint_every": 100_000},
    )


def flip_last_bit(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def flip_a_weight(path: Path) -> None:
    """Turn one bit over, in place, of a tensor that every step changes."""
    tensors = safetensors_file.deserialize(path.read_bytes())[1]
    sizes = {name: tensor.bits.nbytes for name, tensor in tensors.items()}
    names = list(sizes)
    behind = names[names.index("model.layers.0.mlp.down_proj.weight") :]
    flip(path, path.stat().st_size - sum(sizes[name] for name in behind))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


class Deltas:
    """The deltas of a run as they were published, whatever was done to the store since."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._originals: dict[str, bytes] = {}

    def published(self) -> list[VersionPublished]:
        with closing(open_read_only(self._directory / JOURNAL_NAME)) as journal:
            return [entry.fact for entry in read_facts(journal, self._directory) if isinstance(entry.fact, VersionPublished)]

    def tamper(self, number: int, how: Callable[[Path], None]) -> None:
        """Do something to the file of a version."""
        delta = self.published()[number].delta
        assert delta is not None
        path = self._directory / "blobs" / delta.digest
        self._originals[delta.digest] = path.read_bytes()
        how(path)

    def weights(self, policy: Path) -> Iterator[tuple[int, Weights]]:
        """Every version with its weights, from the policy's files and the deltas alone."""
        found: dict[int, Weights] = {}
        for fact in self.published():
            number = fact.version.number
            if fact.delta is None:
                assert fact.is_base
                found[number] = dict(base_tensors(sorted(policy.glob("*.safetensors"))))
            else:
                path = self._directory / "blobs" / fact.delta.digest
                data = self._originals.get(fact.delta.digest) or path.read_bytes()
                held = found[fact.parent]
                found[number] = apply_file(data, held, root_hash(held))[1]
            assert root_hash(found[number]) == fact.version.root
            yield number, found[number]


class Actor:
    """An actor of a run, as its log and the journal show it."""

    def __init__(self, run: Any, name: str) -> None:
        self._run, self._name = run, name

    def said(self, *texts: str) -> int:
        """How many lines of its log have all of `texts`."""
        lines = (self._run.directory / "logs" / f"{self._name}.log").read_text().splitlines()
        return sum(all(text in line for text in texts) for line in lines)

    @contextlib.contextmanager
    def says(self, *texts: str) -> Iterator[None]:
        """What is done meanwhile makes it say something."""
        before = self.said(*texts)
        yield
        self._run.until(lambda _: self.said(*texts) > before)

    def recovers(self) -> None:
        """It samples again, from versions that are still to come."""
        number = self._run.status()["num_versions"]
        self._run.until_sampled(self._name, number)


def test_wrong_weights_are_named_and_replaced_and_no_token_is_sampled_from_them(
    start: Callable[..., Any], join: Callable[..., psutil.Popen], slow_steps: dict[str, Any], tiny_policy: Path
) -> None:
    run = start(slow_steps)
    run.until(lambda status: status["step"] >= 1)
    deltas = Deltas(run.directory)
    with Link(run.address()) as link:
        process, actor = join(run, "victim", link.address), Actor(run, "victim")
        run.until_sampled("victim", 0)

        def tamper(how: Callable[[Path], None], *texts: str) -> None:
            """Tamper with the file of the newest version, which the victim has not fetched yet, and everybody else has."""
            link.hold(Channel.BLOBS)
            later = run.status()["num_versions"] + 1
            run.until(lambda status: status["num_versions"] > later)
            with stopped(run.roles("learner-rank")[-1]), actor.says(AGAIN, *texts):
                newest = run.until(lambda status: _everybody_is_at(status, "actor-0"))["num_versions"] - 1
                deltas.tamper(newest, how)
                link.release(Channel.BLOBS)
            actor.recovers()

        def replace_by_another(path: Path) -> None:
            first = deltas.published()[1].delta
            assert first is not None
            shutil.copyfile(path.with_name(first.digest), path)

        tamper(flip_last_bit, "damaged weight file", "other bytes than its name says")
        tamper(cut_short, "damaged weight file", "bytes on the other side")
        tamper(replace_by_another, "damaged weight file", "bytes on the other side")
        for how, text in [
            (Path.unlink, "No such file or directory"),
            (replace_by_a_copy, "was replaced or cut short"),
            (flip_a_weight, "after decoding: root hash is"),
        ]:
            (shadow,) = Path("/dev/shm").glob(f"slipstream-shadow-{process.pid}-*.safetensors")
            with actor.says(AGAIN, text):
                how(shadow)
            actor.recovers()
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0, run.output()
        assert process.wait(30) == 0, run.output()
    assert run.summary()["broken_promises"] == []
    assert "starting again in" not in run.output(), "a process of the run has ended"
    check_tokens(run.directory, deltas, tiny_policy, {"actor-0", "victim"})


def test_an_actor_without_room_in_shared_memory_says_so_and_keeps_its_weights_elsewhere(
    start: Callable[..., Any], join: Callable[..., psutil.Popen], slow_steps: dict[str, Any], tiny_policy: Path
) -> None:
    if subprocess.run([*FULL_SHM, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    run = start(slow_steps)
    run.until(lambda status: status["step"] >= 1)
    process, actor = join(run, "cramped", run.address(), before=FULL_SHM), Actor(run, "cramped")
    with actor.says("no room for", "in /dev/shm (No space left on device)"):
        run.until_sampled("cramped", 1)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.output()
    assert process.wait(30) == 0, run.output()
    assert run.summary()["broken_promises"] == []
    check_tokens(run.directory, Deltas(run.directory), tiny_policy, {"actor-0", "cramped"})


def _everybody_is_at(status: dict[str, Any], name: str) -> bool:
    """Whether an actor samples from the newest version."""
    return any(actor["name"] == name and actor["version"] == status["num_versions"] - 1 for actor in status["actors"])


class Sampled(NamedTuple):
    """Tokens of one completion that were sampled from one version: their places, and their recorded log-probabilities."""

    token_ids: list[int]
    places: NDArray[np.int64]
    logprobs: NDArray[np.float32]


def check_tokens(directory: Path, deltas: Deltas, policy: Path, actors: set[str]) -> None:
    """Compute the log-probability of every journalled token again, under the weights of the version that is recorded for it."""
    sampled, found = sampled_tokens(directory)
    assert found == actors
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy), dtype=torch.float32).eval()
    targets = dict(model.named_parameters())
    worst, num_told_apart, before = 0.0, 0, None
    for number, weights in deltas.weights(policy):
        rows = sampled.get(number, [])
        if rows:
            error = _largest_error(model, targets, weights, rows)
            assert error < TOLERANCE, f"tokens of version {number} are {error} nats from what its weights say"
            worst = max(worst, error)
            num_told_apart += before is not None and _largest_error(model, targets, before, rows) > 10 * TOLERANCE
        before = weights
    assert num_told_apart >= len(sampled) - 1, "the weights of the version before would not have done"


def sampled_tokens(directory: Path) -> tuple[dict[int, list[Sampled]], set[str]]:
    """All journalled tokens by version, and who sampled them."""
    with closing(open_read_only(directory / JOURNAL_NAME)) as journal:
        groups = [decode_group(payload) for (payload,) in journal.execute("SELECT payload FROM groups")]
    sampled: dict[int, list[Sampled]] = defaultdict(list)
    for group in groups:
        for part in group.completions():
            token_ids = [*group.prompt_ids.tolist(), *group.token_ids[part].tolist()]
            for number in np.unique(group.versions[part]).tolist():
                places = np.flatnonzero(group.versions[part] == number)
                sampled[number].append(Sampled(token_ids, places + group.prompt_ids.size, group.logprobs[part][places]))
    return sampled, {group.actor for group in groups}


@torch.inference_mode()
def _largest_error(model: Any, targets: dict[str, torch.Tensor], weights: Weights, rows: list[Sampled]) -> float:
    for name, tensor in weights.items():
        targets[name].copy_(to_torch(tensor))
    ids = torch.zeros(len(rows), max(len(row.token_ids) for row in rows), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
    logprobs = torch.log_softmax(model(input_ids=ids).logits.double(), dim=-1)  # what is padded comes after what is read
    errors = [
        np.abs(logprobs[index, row.places - 1, ids[index, row.places]].numpy() - row.logprobs).max() for index, row in enumerate(rows)
    ]
    return float(max(errors))
