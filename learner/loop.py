"""The learner: take batches, step, publish, commit, evaluate, checkpoint.

Invariant: no step uses a group with lag above max_lag (asserted here from the tokens' own versions), and what the broker was told is committed
can be computed again from the last checkpoint and the journalled batches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from learner import checkpoint
from learner.batch import Batch, make_batch
from learner.environment import environment
from learner.evaluate import evaluate
from learner.model import load_model
from learner.observe import StepObserver
from learner.publish import Published, Publisher
from learner.ranks import Ranks
from learner.rollback import RolledBack, last_good_checkpoint, next_rollback, read_rollbacks, recorded_as, roll_back, step_of
from learner.stability.monitor import COLLAPSE, Rollback
from learner.stability.rule import Calibration
from learner.step import Trainer
from learner.watch import Watch
from protocol.base import WEIGHTS_SUFFIX, base_root
from protocol.config import Config
from protocol.errors import WeightsError
from protocol.messages import LearnerWelcome, Note
from protocol.ports import LearnerPort, ReceivedBatch
from tasks.base import Task

log = logging.getLogger("learner")
SAY_SECONDS = 30.0


class _Delivery(msgspec.Struct, array_like=True):
    """A received batch on its way from rank 0 to the others; `stop` instead of a batch ends the run."""

    stop: bool
    number: int = 0
    payloads: list[bytes] = []
    version_steps: dict[int, int] = {}


class Learner:
    """One rank. `port` is given on rank 0 only."""

    def __init__(
        self,
        config: Config,
        policy: str | Path,
        run: str,
        folder: Path,
        task: Task | None,
        tokenizer: Any,
        stop_ids: tuple[int, ...],
        ranks: Ranks,
        port: LearnerPort | None,
        device: torch.device,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        beside: bool = True,
        observer: StepObserver | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Load the policy (a folder), or the newest checkpoint below `folder`.

        Without a `task` nothing is evaluated. `beside` is False where the port belongs to this thread. `observer` is told of every step.
        `calibration` is of the stability region, where it is known.
        """
        self._config, self._pacing = config, config.pacing
        self._run, self._folder = run, folder
        self._task, self._tokenizer, self._stop_ids = task, tokenizer, stop_ids
        self._ranks, self._port, self._monotonic = ranks, port, monotonic
        torch.set_num_threads(config.learner.threads)
        found = checkpoint.list_checkpoints(folder)
        self._checkpoint = found[-1] if found else None
        state = checkpoint.load_state(self._checkpoint, run) if self._checkpoint else None
        self.step = state.step if state else 0
        model = load_model(self._checkpoint / "policy" if self._checkpoint else policy, device)
        reference = load_model(policy, device) if config.loss.kl_coef > 0 else None
        self._trainer = Trainer(model, reference, config.learner, config.loss, config.run.steps, config.rollout.temperature, ranks)
        self._published: Published | None = None
        if self._checkpoint and state:
            checkpoint.load_optimizer(self._checkpoint, self._trainer)
            self._published = checkpoint.load_published(self._checkpoint, state, model, ranks.rank, ranks.world_size)
        self._rollbacks = read_rollbacks(folder)
        self._back: Rollback | None = None
        """Where to go back to after the commit of this step."""
        self._watch = Watch(config, model, self.step, calibration, ranks, self._rollbacks)
        if self._checkpoint and not self._watch.load(self._checkpoint):
            log.warning("%s has no measures of stability: displacement counts from its weights", self._checkpoint)
        self._published_step = state.version.step if state else -1
        self._policy, self._beside, self._observer = Path(policy), beside, observer
        self._publisher: Publisher | None = None
        self._busy_since = self._busy = 0.0
        self._sleep, self._said_at = sleep, float("-inf")

    def run(self) -> bool:
        """The main loop; True if the last step was reached. Raises RolledBack when the run goes back: build the learner again then.

        consumes:     batches
          waits for:    the batch of the next step
          unblocked by: actors completing its groups, or the end of the run
        produces:     commits, versions, evaluations, checkpoints
          waits for:    the broker to journal each
        """
        started = self._monotonic()
        self._publisher = self._make_publisher()
        if self._published is None:
            self._publish(0)
            self._evaluate()
        while self.step < self._pacing.num_steps:
            batch = self._receive()
            if batch is None:
                break
            end, due = self._batch_end(self.step), False
            while self.step < end:
                self._take_step(batch)
                due = due or self._is_due(self._config.learner.checkpoint_every)
            # Between batches only: in the middle of one, its proximal log-probabilities would be part of the state.
            if due and self.step < self._pacing.num_steps:
                self._save()
        finished = self.step >= self._pacing.num_steps
        if finished and not self._is_due(self._config.learner.eval_every):
            self._evaluate()
        self._save()
        self._leave(started)
        return finished

    def _make_publisher(self) -> Publisher:
        return Publisher(
            self._trainer.model,
            self._ranks,
            self._port,
            self._join(self._port) if self._port is not None else None,
            self._published,
            self._base_root,
            compact=self._config.learner.compact_deltas,
            threads=self._config.learner.threads,
            beside=self._beside,
            monotonic=self._monotonic,
        )

    def _base_root(self) -> str:
        """The root of the policy's files rounded to bf16; empty if they are not all floats in safetensors."""
        try:
            return base_root(list(self._policy.glob(f"*{WEIGHTS_SUFFIX}")))
        except WeightsError as error:
            log.info("the first version will be a snapshot: %s", error)
            return ""

    def _join(self, port: LearnerPort) -> LearnerWelcome:
        on = environment(self._trainer.device) | recorded_as(self._rollbacks)
        welcome = port.join(self.step, self._ranks.world_size, on)
        if self._checkpoint:
            log.info("resumed at step %d from %s, lineage %d", self.step, self._checkpoint, welcome.lineage)
        return welcome

    def _receive(self) -> Batch | None:
        """The next batch, on every rank; None to stop."""
        data = None
        waited_from = self._monotonic()
        if self._port is not None:
            self._rest()
            received = self._port.next_batch(self.step, self._check)
            data = msgspec.msgpack.encode(_Delivery(True) if received is None else _Delivery(False, *received))
        delivery = msgspec.msgpack.decode(self._ranks.broadcast(data), type=_Delivery)
        self._waited = self._monotonic() - waited_from
        if delivery.stop:
            return None
        return make_batch(ReceivedBatch(delivery.number, delivery.payloads, delivery.version_steps), self._config.loss)

    def _check(self) -> None:
        if self._publisher is not None:
            self._publisher.check()

    def _take_step(self, batch: Batch) -> None:
        """One optimizer step and what follows from it."""
        lags = batch.lags(self.step, self._pacing.max_lag)
        self._work(f"training step {self.step}")
        started = self._monotonic()
        if self._observer is not None:
            self._observer.before(self.step, batch, self._trainer)
        step = self.step
        metrics = self._watch.step(step, batch, lambda govern: self._trainer.apply(batch, step, govern))
        if self._observer is not None:
            self._observer.after(self.step, metrics)
        metrics |= batch.facts | {"lag_mean": sum(lags) / len(lags), "lag_max": max(lags)}
        metrics["seconds_training"] = self._monotonic() - started
        metrics["seconds_waiting"], self._waited = self._waited, 0.0
        self.step += 1
        if self._pacing.publishes(self.step):
            metrics |= self._publish(self.step)
        notes = self._notes()
        if self._port is not None:
            self._port.commit(self.step - 1, batch.number, lags, metrics, notes)
        if self._back is not None:
            self._go_back(self._back)
        if self._is_due(self._config.learner.eval_every):
            self._evaluate()

    def _notes(self) -> list[Note]:
        """What was decided or seen at this step, the same on every rank. A collapse ends the run or turns it back, as configured."""
        found = []
        for kind, text, values in self._watch.monitor.take_notes():
            if kind == COLLAPSE:
                found += self._collapsed(text, values)
            else:
                found.append(Note(kind, text, values))
        for note in found:
            log.warning("step %d: %s", self.step - 1, note.text)
        return found

    def _collapsed(self, text: str, values: dict[str, float]) -> list[Note]:
        """The note of a collapse, which ends the run or is followed by that of where the run goes back to, as configured."""
        # One rank looks, before the commit: a rank that comes later would find what another has set aside already.
        found = step_of(self._last_good_checkpoint()) if self._ranks.rank == 0 else 0
        start = int(self._ranks.broadcast(b"%d" % found if self._ranks.rank == 0 else None))
        text += f". The last good checkpoint is {f'step-{start:08d}' if start else 'the policy itself'}"
        wanted = self._config.stability.on_collapse
        best, until = self._watch.monitor.state.collapse.best, self._batch_end(self.step - 1)
        self._back = next_rollback(self._rollbacks, start, until, best) if wanted == "rollback" else None
        if self._back is not None:
            going = f"going back from step {self.step} to step {start}, with {self._back.lr_scale:g} times the learning rate"
            return [Note(COLLAPSE, text, values), Note("rollback", going, msgspec.structs.asdict(self._back))]
        if wanted == "rollback":
            text += f", and the run has gone back {len(self._rollbacks)} times"
        return [Note(COLLAPSE, text, values, ends_run=wanted != "continue")]

    def _last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint of weights that are known to be good: as old as those which may have sampled the last good batch."""
        good = self._watch.monitor.state.collapse.last_good
        return last_good_checkpoint(self._folder, self._pacing.oldest_step(self._pacing.batch_of_step(good)))

    def _go_back(self, back: Rollback) -> NoReturn:
        """All ranks leave this learner; the next one starts from the last good checkpoint."""
        assert self._publisher is not None
        self._publisher.flush()
        self._publisher.close()
        if self._port is not None:
            self._port.confirm()  # nothing is set aside for what the journal does not have
            roll_back(self._folder, [*self._rollbacks, back], log.warning)
            self._port.close()
        self._ranks.barrier()
        raise RolledBack(f"the run goes back from step {self.step} to step {back.start}")

    def _batch_end(self, step: int) -> int:
        """The step after the last that uses the batch of `step`."""
        return min(self._pacing.last_use(self._pacing.batch_of_step(step)) + 1, self._pacing.num_steps)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0

    def _publish(self, step: int) -> dict[str, float]:
        """Hand theta_step to the publisher; what it holds the loop up for is in the metrics, what it does beside in the journal's versions."""
        assert self._publisher is not None
        started = self._monotonic()
        self._work(f"publishing step {step}")
        self._publisher.publish(step)
        self._published_step = step
        return {"seconds_publishing": self._monotonic() - started}

    def _evaluate(self) -> None:
        if self._task is None:
            return
        self._work(f"evaluating step {self.step}")
        reward, count = evaluate(
            self._trainer.model,
            self._tokenizer,
            self._task,
            self._config.learner.eval_prompts,
            self._config.rollout.max_tokens,
            self._stop_ids,
            self._ranks,
        )
        if self._port is not None and count > 0:
            log.info("step %d: held-out reward %.3f over %d prompts", self.step, reward, count)
            self._port.evaluated(self.step, reward, count)

    def _save(self) -> None:
        """All ranks write a checkpoint, so that all resume from the same one."""
        assert self._publisher is not None
        self._publisher.flush()
        if self._publisher.published is None or self.step == 0:
            return
        self._work(f"writing the checkpoint of step {self.step}")
        if self._port is not None:
            self._port.confirm()  # a checkpoint ahead of the journal could not be resumed from
        checkpoint.save_checkpoint(
            self._folder,
            self._run,
            self.step,
            self._published_step,
            self._trainer,
            self._publisher.published,
            self._tokenizer,
            self._ranks,
            beside=self._watch.save,
            beside_bytes=self._watch.num_bytes,
            keep=self._last_good_checkpoint(),
            wait=self._wait_for_room,
        )

    def _wait_for_room(self, text: str) -> None:
        """Rank 0 waits a second for room on the disk, and says so: in heartbeats, and every SAY_SECONDS in the log."""
        self._work(text)
        if self._monotonic() - self._said_at >= SAY_SECONDS:
            self._said_at = self._monotonic()
            log.warning("%s", text)
        self._sleep(1.0)

    def _leave(self, started: float) -> None:
        assert self._publisher is not None
        self._publisher.close()
        if self._port is not None:
            self._rest()
            elapsed = self._monotonic() - started
            summary = {"busy_seconds": self._busy, "elapsed_seconds": elapsed, "world_size": float(self._ranks.world_size)}
            self._port.done(self.step, summary)
            self._port.close()

    # --- what this rank is busy with

    def _work(self, text: str) -> None:
        if self._port is not None:
            self._port.doing(text)
        if not self._busy_since:
            self._busy_since = self._monotonic()

    def _rest(self) -> None:
        if self._port is not None:
            self._port.doing("")
        if self._busy_since:
            self._busy += self._monotonic() - self._busy_since
            self._busy_since = 0.0
