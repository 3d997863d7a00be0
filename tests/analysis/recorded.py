"""A run through the real broker, with scripted actors and a scripted learner: a recording in which everything happens that can.

As a program (`python -m tests.analysis.recorded FOLDER`) it goes on until its input ends, and prints a line after each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models

from broker.core import Broker
from protocol import messages
from protocol.config import Config, parse_config
from protocol.groups import FULL, STOPPED, Group, encode_group
from protocol.messages import PROTOCOL_VERSION, NamedBlob
from protocol.sampling import prompt_index, ticket_seed
from protocol.weights import PolicyVersion

ALPHABET = "0123456789+="
NUM_PROMPTS = 8
START = 1_700_000_000.0
ENGINE = "scripted/cpu"


def settings(steps: int) -> Config:
    return parse_config(
        {
            "run": {"steps": steps, "seed": 5},
            "policy": {"max_lag": 2},
            "rollout": {"group_size": 2, "groups_per_batch": 2, "max_tokens": 8},
        }
    )


class RecordedRun:
    """One run in a folder; the clock moves a hundredth of a second with every message."""

    def __init__(self, folder: Path, steps: int) -> None:
        (folder / "blobs").mkdir(parents=True)
        tokenizer = Tokenizer(models.WordLevel({sign: number for number, sign in enumerate(ALPHABET)}, unk_token="0"))
        tokenizer.decoder = decoders.Fuse()
        self.config, self.now, self._random = settings(steps), 0.0, np.random.default_rng(11)
        self.broker = Broker(folder, "recorded", self.config, NUM_PROMPTS, [], 0.0, START, free=lambda: 1 << 50)
        files = [NamedBlob("tokenizer.json", self.broker.blobs.add(tokenizer.to_str().encode()))]
        (folder / "run.json").write_text(
            json.dumps({"run": "recorded", "policy_files": [[f.name, [f.blob.digest, f.blob.size]] for f in files]})
        )
        self.hands: dict[str, dict[int, int]] = {}
        """Of every actor, the tickets in hand and their attempts."""
        self.accepted: dict[int, Group] = {}
        self.version_steps: dict[int, int] = {}
        self.newest, self.session, self.lineage = -1, "", -1
        self._seqs: dict[str, int] = {}
        self.answers: list[messages.Message] = []

    # --- actors

    def join(self, name: str) -> None:
        self.hands[name], self._seqs[name] = {}, 0
        self._actor(name, messages.ActorHello(PROTOCOL_VERSION, name, f"{name}-1", "any engine", "here", 1, []))
        self.report(name)

    def report(self, name: str, wanted: int = 4) -> None:
        hand = sorted(self.hands[name])
        self._actor(name, messages.ActorReport(self.newest, wanted, hand, self.now / 2, self.now, 0, "sampling"))

    def leave(self, name: str) -> None:
        self.report(name, 0)
        self._actor(name, messages.ActorBye())

    def group(self, ticket: int, versions: list[int], actor: str) -> Group:
        """A group of two completions, of three and of four tokens; the versions in turn over the tokens, ascending."""
        tokens = 7
        return Group(
            ticket=ticket,
            prompt=prompt_index(self.config.run.seed, ticket, NUM_PROMPTS),
            seed=ticket_seed(self.config.run.seed, ticket),
            actor=actor,
            engine=ENGINE,
            prompt_ids=np.array([ticket % 10, 10, 3, 11], np.int32),
            num_tokens=np.array([3, 4], np.int32),
            token_ids=self._random.integers(0, 10, tokens).astype(np.int32),
            logprobs=-self._random.random(tokens).astype(np.float32),
            versions=np.sort(np.resize(np.array(versions, np.int32), tokens)),
            rewards=np.array([1.0, float(ticket % 3 == 0)], np.float32),
            finish=np.array([STOPPED, FULL], np.uint8),
        )

    def submit(self, name: str, ticket: int, versions: list[int] | None = None, payload: bytes | None = None, attempt: int = 1) -> None:
        """Hand in the group of a ticket, sampled from `versions` (default: the newest), or other bytes in its place."""
        attempt = self.hands[name].pop(ticket, attempt)
        made = self.group(ticket, versions or [self.newest], name)
        self._seqs[name] += 1
        before = len(self.answers)
        self._actor(name, messages.SubmitGroup(self._seqs[name], ticket, attempt), payload or encode_group(made))
        if not any(isinstance(answer, messages.Refused) for answer in self.answers[before:]):
            self.accepted[ticket] = made

    def fail(self, name: str, ticket: int) -> None:
        self._seqs[name] += 1
        self._actor(name, messages.TicketFailed(self._seqs[name], ticket, self.hands[name].pop(ticket), "reward raised"))

    def serve(self) -> None:
        """Every actor hands in what it has, every third group half from the version before if its batch (ticket // 2 at most) allows."""
        for name in self.hands:
            self.report(name)
        for name, hand in self.hands.items():
            for ticket in sorted(hand):
                mixed = ticket % 3 == 0 and self.newest - 1 in self.version_steps and self.version_steps[self.newest - 1] >= ticket // 2 - 2
                self.submit(name, ticket, [self.newest - 1, self.newest] if mixed else None)

    # --- learner

    def learn(self, session: str, step: int) -> None:
        """A learner session begins at `step`."""
        self.session, self.lineage = session, self.lineage + 1
        self._learner(messages.LearnerHello(PROTOCOL_VERSION, session, step, 1))

    def publish(self, step: int, *, base: bool = False) -> None:
        number = max(self.version_steps, default=-1) + 1
        version = PolicyVersion(number, step, self.lineage, f"{number:064x}")
        full = number % 8 == 5
        delta = None if base else self.broker.blobs.add(b"delta" * (number + 1) + session_mark(self.session))
        snapshot = self.broker.blobs.add(b"snapshot" * (number + 1)) if full else None
        parent = self.newest
        self.version_steps[number], self.newest = step, number
        self._learner(messages.Publish(version, parent, delta, snapshot, 4000, 9, is_base=base, seconds={"encode": 0.01}))

    def step(self, step: int) -> None:
        """Wait for the batch of a step, commit it, publish what follows."""
        self._learner(messages.NextBatch(step))
        for _ in range(20):
            ready = next((answer for answer in reversed(self.answers) if isinstance(answer, messages.BatchReady)), None)
            if ready is not None and ready.step == step:
                break
            self.serve()
        assert ready is not None and ready.step == step, self.answers[-5:]
        groups = [self.accepted[ticket] for ticket in ready.tickets]
        lags = [step - min(self.version_steps[int(number)] for number in group.versions) for group in groups]
        flat = sum(float(group.rewards.std() == 0) for group in groups) / len(groups)
        metrics = {
            "reward": float(np.mean([group.rewards.mean() for group in groups])),
            "zero_advantage_share": flat,
            "lag_max": float(max(lags)),
            "seconds_waiting": 0.03,
            "seconds_training": 0.02,
        }
        self._learner(messages.CommitStep(step, ready.batch, lags, metrics))
        self.publish(step + 1)

    def finish(self, step: int) -> None:
        self._learner(messages.Evaluation(step, 0.5, 4))
        self._learner(messages.LearnerDone(step, {"busy_seconds": 1.0, "elapsed_seconds": 2.0}))
        for name in self.hands:
            self.leave(name)
        self.broker.close()

    # --- messages

    def _actor(self, name: str, message: messages.ActorMessage, payload: bytes = b"") -> None:
        self.now += 0.01
        self.broker.actor_message(name, f"{name}-1", message, payload, self.now, START + self.now)
        self._deliver()

    def _learner(self, message: messages.LearnerMessage) -> None:
        self.now += 0.01
        self.broker.learner_message(self.session, message, self.now, START + self.now)
        self._deliver()

    def _deliver(self) -> None:
        for outgoing in self.broker.flush():
            assert not isinstance(outgoing.message, messages.LearnerRefused), outgoing
            self.answers.append(outgoing.message)
            if isinstance(outgoing.message, messages.IssueTicket):
                self.hands[outgoing.peer.removeprefix("actor:")][outgoing.message.ticket.number] = outgoing.message.ticket.attempt


def session_mark(session: str) -> bytes:
    """Deltas of different lineages are different files."""
    return session.encode()


def start(folder: Path, steps: int) -> RecordedRun:
    """A run with two actors and a learner, before its first step."""
    run = RecordedRun(folder, steps)
    run.learn("first", 0)
    run.publish(0, base=True)
    run.join("a")
    run.join("b")
    return run


def record_eventful(folder: Path, steps: int = 8) -> RecordedRun:
    """A finished run: broken results, a ticket that fails for good, a late duplicate, a group
    that is too old, a learner that goes back and orphans a version."""
    run = start(folder, steps)
    garbled = min(run.hands["a"])
    run.submit("a", garbled, payload=b"garbled")
    run.serve()
    run.step(0)
    run.submit("b", 0, attempt=1)  # already done
    run.report("a")
    lost = min(run.hands["a"])
    while lost in run.hands["a"]:
        run.fail("a", lost)
        run.report("b", 0)
        run.report("a", 8)
    for step in range(1, 4):
        run.step(step)
    run.report("a")
    run.submit("a", max(run.hands["a"]), [0])  # too old for its batch: expires
    run.serve()
    run.learn("second", 3)
    for step in range(3, steps):
        run.step(step)
    run.finish(steps)
    return run


def main(folder: Path) -> None:
    """Go on until standard input ends; its other end decides when."""
    import selectors

    run, step = start(folder, 1_000_000), 0
    watch = selectors.DefaultSelector()
    watch.register(sys.stdin, selectors.EVENT_READ)
    while not watch.select(0):
        run.serve()
        run.step(step)
        step += 1
        print(step, flush=True)  # noqa: T201
    run.broker.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
