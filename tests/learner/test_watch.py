"""The watch over real steps of a tiny Llama: its measures against copies of the weights, and the same measures after a restart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.batch import make_batch
from learner.ranks import OneRank, Ranks
from learner.stability.rule import Calibration, Measured
from learner.stability.signs import signs
from learner.step import Trainer
from learner.watch import STATE_NAME, Watch
from protocol.config import Config, LossConfig, parse_config
from protocol.facts import StepCommitted
from protocol.groups import FULL, Group, encode_group
from protocol.journal import JOURNAL_NAME, open_read_only, read_facts
from protocol.ports import ReceivedBatch
from tests.replay.recording import Session, record

Vector = NDArray[np.float64]
STEPS = 12
MEASURES = (
    "update_norm", "displacement", "g_upd", "g_2", "cosine_new_batch", "cosine_same_batch", "drift", "effective_sample_size", "clip_fraction",
    "ratio_p01", "ratio_p10", "ratio_p50", "ratio_p90", "ratio_p99",
)  # fmt: skip


def make_config(reuse: int, max_lag: int, **stability: Any) -> Config:
    return parse_config(
        {
            "run": {"steps": STEPS},
            "policy": {"reuse": reuse, "max_lag": max_lag},
            "learner": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 3},
            "stability": {"on_collapse": "continue"} | stability,
        }
    )


class Run:
    """One rank that takes steps on random batches, of which half the tokens, of odd and even groups, are `lag` steps old at their first use."""

    def __init__(
        self, config: Config, model: Any, make_training_batch: Any, lag: int = 0, step: int = 0, ranks: Ranks | None = None
    ) -> None:
        self.config, self.ranks, self.lag, self.make_training_batch = config, ranks or OneRank(), lag, make_training_batch
        self.trainer = Trainer(model, None, config.learner, LossConfig(), STEPS, 1.0, self.ranks)
        self.watch = Watch(config, model, step, CALIBRATION, self.ranks, ())
        self.step_number = step

    def batch(self, number: int) -> Any:
        first = self.config.pacing.first_use(number)
        old = max(0, first - self.lag)
        tokens = {first: 30, old: 10} if old < first else {first: 40}
        batch = self.make_training_batch(number)
        return batch._replace(facts={"reward": 0.3 + 0.01 * number}, oldest_steps=[old] * 3, version_tokens=tokens)

    def step(self) -> dict[str, float]:
        number = self.step_number
        batch = self.batch(self.config.pacing.batch_of_step(number))
        metrics = self.watch.step(number, batch, lambda govern: self.trainer.apply(batch, number, govern))
        self.step_number += 1
        return metrics

    def weights(self) -> Vector:
        parts = [parameter.detach().numpy().ravel() for parameter in self.trainer.model.parameters()]
        found: Vector = np.concatenate(parts).astype(np.float64)
        return found


CALIBRATION = Calibration(batch=Measured(1.0, 0.5, 2.0), horizon=Measured(20.0, 10.0, 40.0))


@pytest.mark.parametrize(("reuse", "max_lag", "lag"), [(1, 3, 2), (1, 0, 0), (3, 2, 0), (2, 5, 4)])
def test_measures_are_those_of_copies_of_the_weights(reuse: int, max_lag: int, lag: int, make_llama: Any, make_training_batch: Any) -> None:
    run = Run(make_config(reuse, max_lag), make_llama(), make_training_batch, lag)
    copies, squares = [run.weights()], []
    for step in range(STEPS):
        first = step - step % reuse
        old = max(0, first - lag)
        found = run.step()
        copies.append(run.weights())
        update = copies[-1] - copies[-2]
        norm = float(np.linalg.norm(update))
        squares.append((norm / found["lr"]) ** 2)
        expected = {
            "update_norm": norm,
            "displacement": float(np.linalg.norm(copies[-1] - copies[0])),
            "g_upd": norm / found["lr"],
            "g_2": float(np.sqrt(np.mean(squares))),
            # Before the update; a quarter of the tokens is older if any is.
            "drift": float(
                np.linalg.norm(copies[step] - copies[first]) * (0.75 if old < first else 1)
                + np.linalg.norm(copies[step] - copies[old]) * (0.25 if old < first else 0)
            ),
        }
        if step:
            before = copies[-2] - copies[-3]
            name = "cosine_same_batch" if step % reuse else "cosine_new_batch"
            expected[name] = float(update @ before / np.linalg.norm(before) / norm)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert ("cosine_same_batch" in found) == (step % reuse > 0)
        assert ("cosine_new_batch" in found) == (step > 0 and step % reuse == 0)
        # The rule counts the lag of the last use, and one more in cycles of reuse.
        rule_lag = min(first + reuse - 1, STEPS - 1) - old + (reuse > 1)
        assert found.get("margin_batch") == (pytest.approx(1 / rule_lag / found["lr"]) if rule_lag else None)
        assert found["margin_horizon"] == pytest.approx(20 / STEPS / found["lr"])
    assert copies[-1].size < 1 << 18, "small enough to be exact"


def test_the_learning_rate_that_the_governor_lets_through_is_the_one_that_is_applied(make_llama: Any, make_training_batch: Any) -> None:
    free = Run(make_config(1, 3), make_llama(), make_training_batch)
    held = Run(make_config(1, 3, governor="hold", rule="sqrt-ess"), make_llama(), make_training_batch)
    for _ in range(3):
        scheduled = free.step()["lr"]
        found = held.step()
        assert found["lr"] == pytest.approx(scheduled * found["effective_sample_size"] ** 0.5)
        assert held.trainer.optimizer.param_groups[0]["lr"] == found["lr"] < scheduled
        assert found["g_upd"] == pytest.approx(found["update_norm"] / found["lr"])


def test_the_drift_is_unknown_where_a_version_s_weights_are_not_known(make_llama: Any, make_training_batch: Any) -> None:
    run = Run(make_config(1, 3), make_llama(), make_training_batch, lag=2, step=5)
    assert "drift" not in run.step(), "weights of before it was there"
    assert "drift" not in run.step()
    assert "drift" in run.step()


class Falling(Run):
    """Rewards of 0.5 in the first four batches and none after, and two of three completions worse than the rest, and less likely by `off` nats."""

    off = 0.0

    def batch(self, number: int) -> Any:
        batch = super().batch(number)
        worse = [one._replace(behaviour=one.behaviour + np.float32(self.off), advantage=-1.0) for one in batch.sequences[:8]]
        sequences = worse + [one._replace(advantage=1.0) for one in batch.sequences[8:]]
        return batch._replace(facts={"reward": 0.5 if number < 4 else 0.0}, sequences=sequences)


def test_a_batch_counts_with_all_its_completions_at_its_first_use(make_llama: Any, make_training_batch: Any) -> None:
    run = Falling(make_config(1, 3), make_llama(), make_training_batch)
    for _ in range(STEPS):
        run.step()
    collapse = run.watch.monitor.state.collapse
    assert collapse.num_expected == pytest.approx(0.5 * (STEPS - 4) * len(run.batch(0).sequences))
    assert collapse.low_since == 4
    reused = Falling(make_config(2, 3), make_llama(), make_training_batch)
    for _ in range(6):
        reused.step()
    assert reused.watch.monitor.state.collapse.steps == [0, 2, 4]


@pytest.mark.parametrize("off", [0.0, 5.0])
def test_a_batch_whose_signal_degenerates_is_told_by_the_step_s_own_metrics(off: float, make_llama: Any, make_training_batch: Any) -> None:
    run = Falling(make_config(1, 3), make_llama(), make_training_batch, lag=3, step=3)
    run.off = off
    found = run.step()
    lengths = [sequence.token_ids.size for sequence in run.batch(3).sequences]
    told = signs(found["kl_behaviour"], sum(lengths) / len(lengths), lag=3.0)
    assert [note.text for note in run.watch.monitor.take_notes() if note.kind == "warning"] == list(told.values())
    assert bool(told) == (off > 0)


def test_all_ranks_have_the_same_measures_and_state(make_llama: Any, make_training_batch: Any, on_ranks: Callable[..., Any]) -> None:
    models = [make_llama() for _ in range(3)]

    def measure(ranks: Ranks) -> tuple[list[dict[str, float]], Any]:
        run = Run(make_config(2, 3), models[ranks.rank], make_training_batch, lag=2, ranks=ranks)
        return [run.step() for _ in range(4)], run.watch.monitor.state

    alone = Run(make_config(2, 3), make_llama(), make_training_batch, lag=2)
    expected = [alone.step() for _ in range(4)]
    found = on_ranks(3, measure)
    assert all(each == found[0] for each in found)
    for one, other in zip(found[0][0], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)


# --- checkpoints


@pytest.mark.parametrize("stop", [1, 4])
def test_a_watch_goes_on_from_its_files_as_if_it_had_not_stopped(
    stop: int, tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    run = Run(make_config(2, 3), make_llama(), make_training_batch, lag=2)
    for _ in range(stop):
        run.step()
    run.watch.save(tmp_path)
    other = Run(make_config(2, 3), copy.deepcopy(run.trainer.model), make_training_batch, lag=2, step=stop)
    other.trainer.optimizer.load_state_dict(copy.deepcopy(run.trainer.optimizer.state_dict()))
    assert other.watch.load(tmp_path)
    for _ in range(stop, STEPS):
        assert other.step() == run.step()
    assert other.watch.monitor.state == run.watch.monitor.state


def test_a_checkpoint_without_measures_of_stability_is_told_apart(tmp_path: Path, make_llama: Any, make_training_batch: Any) -> None:
    run = Run(make_config(1, 3), make_llama(), make_training_batch)
    assert not run.watch.load(tmp_path)
    run.watch.save(tmp_path)
    assert run.watch.load(tmp_path)
    (tmp_path / STATE_NAME).unlink()
    assert not run.watch.load(tmp_path)


def test_what_a_checkpoint_takes_for_the_watch_is_known_before_it_is_written(
    tmp_path: Path, make_llama: Any, make_training_batch: Any
) -> None:
    run = Run(make_config(2, 3), make_llama(), make_training_batch, lag=2)
    for _ in range(5):
        run.step()
    run.watch.save(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 <= written - run.watch.num_bytes < 1 << 14


def committed(directory: Path) -> dict[tuple[int, int], dict[str, float | None]]:
    """What was journalled of every step, by lineage and step, without what depends on the clock."""
    path = directory / JOURNAL_NAME
    journal = open_read_only(path)
    try:
        facts = [entry.fact for entry in read_facts(journal, path)]
    finally:
        journal.close()
    return {
        (fact.lineage, fact.step): {name: value for name, value in fact.metrics.items() if not name.startswith("seconds")}
        for fact in facts
        if isinstance(fact, StepCommitted)
    }


@pytest.mark.parametrize("policy", [{"max_lag": 0}, {"reuse": 2, "max_lag": 1}], ids=["synchronous", "cycle"])
def test_a_learner_resumed_from_a_checkpoint_journals_the_measures_of_one_that_never_stopped(
    policy: dict[str, int], settings: Callable[..., dict[str, Any]], on_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    def train(name: str, *sessions: Session) -> dict[tuple[int, int], dict[str, float | None]]:
        config = settings(run={"steps": 10}, policy=policy, learner={"checkpoint_every": 4})
        return committed(record(config, tmp_path / name, sessions, on_ranks))

    whole, parted = train("whole", Session()), train("parted", Session(dies_after=6), Session())
    assert list(whole) == [(0, step) for step in range(10)]
    assert sorted(parted) == [*((0, step) for step in range(7)), *((1, step) for step in range(4, 10))]
    for (_, step), metrics in parted.items():
        assert metrics == whole[0, step]
    names = set().union(*whole.values())
    assert set(MEASURES) - names == (set() if "reuse" in policy else {"cosine_same_batch"})
    assert all(whole[0, step]["displacement"] > 0 for step in range(10))  # type: ignore[operator]


# --- which versions a batch's tokens came from


def test_a_batch_counts_its_tokens_by_the_step_of_the_version_each_came_from() -> None:
    def group(ticket: int, versions: list[int]) -> bytes:
        size = len(versions)
        return encode_group(
            Group(
                ticket=ticket,
                prompt=0,
                seed=0,
                actor="a",
                engine="fake",
                prompt_ids=np.ones(2, np.int32),
                num_tokens=np.array([1, size - 1], np.int32),
                token_ids=np.full(size, 5, np.int32),
                logprobs=np.full(size, -1.0, np.float32),
                versions=np.array(versions, np.int32),
                rewards=np.array([0.0, 1.0], np.float32),
                finish=np.full(2, FULL, np.uint8),
            )
        )

    # Versions 3 and 5 are of the same step, in different lineages.
    received = ReceivedBatch(0, [group(0, [2, 2, 3]), group(1, [3, 3, 5, 5, 5])], {2: 4, 3: 8, 5: 8})
    batch = make_batch(received, LossConfig())
    assert batch.version_tokens == {4: 2, 8: 6}
    assert sum(batch.version_tokens.values()) == batch.num_tokens
    assert min(batch.version_tokens) == min(batch.oldest_steps)
    assert all(isinstance(value, int) for pair in batch.version_tokens.items() for value in pair)
