"""An actor: take tickets, generate, score, hand in; and keep up with the published weights meanwhile.

Invariant: a ticket taken is handed in as a whole group or given up with a reason, never dropped and never scored zero for a failure of ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from actor.engine import Engine, GenerationRequest
from actor.scoring import Scorer, ScoringThread
from actor.shadow import StagedWeights
from actor.watchdog import LOOK_SECONDS, Watchdog
from actor.weights import HeldWeights
from protocol.config import RolloutConfig
from protocol.errors import EngineDied, EngineError, TaskError, WeightsError
from protocol.groups import Group
from protocol.messages import ActorReport, NamedBlob, WireTicket
from protocol.ports import ActorPort
from tasks.base import Task
from tasks.prompts import Tokenizer, encode_prompt
from tasks.scoring import fetch_problem

log = logging.getLogger("actor")
MAX_FAILURES = 3
"""Times in a row that weights are fetched anew because the engine cannot take them, before the process ends and is started again."""
SAY_SECONDS = 30.0
"""An engine that is quiet for this long is worth a line."""


class Actor:
    """One actor's work, over a port that has joined."""

    def __init__(
        self,
        name: str,
        port: ActorPort,
        engine: Engine,
        task: Task,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        rollout: RolloutConfig,
        policy_files: Sequence[NamedBlob],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        scorer: Scorer | None = None,
    ) -> None:
        """Without a `scorer`, rewards are computed in a thread."""
        self._name, self._port, self._engine, self._task = name, port, engine, task
        self._tokenizer, self._stop_ids, self._rollout = tokenizer, stop_ids, rollout
        self._weights = HeldWeights(port, policy_files)
        self._sampling_version = -1
        self._serving: set[int] = set()
        self._workers: list[asyncio.Task[None]] = []
        self._monotonic = monotonic
        self._started = monotonic()
        self._sleep, self._scorer = sleep, scorer or ScoringThread(task)
        self._watchdog = Watchdog(monotonic())
        self._num_updates = self._num_generating = 0

    def report(self) -> ActorReport:
        """The heartbeat: credit is given only once there are verified weights to sample from."""
        return ActorReport(
            version=self._sampling_version,
            num_wanted=self._engine.num_groups_wanted if self._sampling_version >= 0 else 0,
            tickets=self._port.held_tickets(),
            busy_seconds=self._engine.busy_seconds,
            elapsed_seconds=self._monotonic() - self._started,
            num_tokens=self._engine.num_tokens,
            doing=self._doing(),
        )

    def _doing(self) -> str:
        if self._sampling_version < 0:
            return "waiting for weights" if self._weights.number < 0 else f"taking over version {self._weights.number}"
        if self._watchdog.quiet > SAY_SECONDS:
            return f"the engine has been quiet for {self._watchdog.quiet:.0f} s (given up after {self._watchdog.limit:.0f} s)"
        return f"generating {len(self._serving)} groups" if self._serving else "waiting for a ticket"

    async def run(self) -> None:
        """Work until the run ends. Raises what cannot be mended here (PeerError, WeightsError, ...)."""
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(self._keep_up()), group.create_task(self._watch())]
                workers = self._workers = [group.create_task(self._serve()) for _ in range(self._engine.num_groups_wanted)]
                await asyncio.wait(workers)
                for task in beside:
                    task.cancel()
        finally:
            try:
                await self._port.leave()
            finally:
                self._weights.drop()
                await self._scorer.close()
                if not self._watchdog.is_hung:  # closing a hung engine would hang as well; its process is about to end
                    await self._engine.close()

    async def _watch(self) -> None:
        """The watchdog's loop.

        consumes:     the engine's count of tokens
          waits for:    the clock
          unblocked by: time
        produces:     the end of this actor (EngineDied) once the engine has been quiet for too long while it had work
        """
        said = False
        while True:
            await self._sleep(LOOK_SECONDS)
            dog = self._watchdog
            dog.look(self._engine.num_tokens, self._num_updates + self._num_generating > 0, self._monotonic())
            if dog.is_hung:
                raise EngineDied(
                    f"it has given no token and taken no update for {dog.quiet:.0f} s, with {self._num_generating} groups to generate"
                )
            if dog.quiet > SAY_SECONDS and not said:
                log.warning("waiting for the engine, quiet for %.0f s; it is given up after %.0f s", dog.quiet, dog.limit)
            said = dog.quiet > SAY_SECONDS

    async def _keep_up(self) -> None:
        """The update loop.

        consumes:     announcements of versions
          waits for:    a version other than the one held
          unblocked by: the broker
        produces:     verified weights in the engine, and a report that says so
          waits for:    the engine to reach the next token
        """
        failures = 0
        while await self._port.new_version(self._weights.number) is not None:
            if failures >= MAX_FAILURES:
                raise EngineError(f"the engine refused the weights {failures} times in a row; the lines above say why")
            staged = await self._weights.advance()
            if staged is None:
                continue
            if await self._hand_over(staged):
                self._sampling_version = staged.version.number
                failures = 0
            else:
                self._weights.drop()
                failures += 1
            self._port.report_now()
        if self._sampling_version < 0:
            # The run ends while the engine generates nothing: what it was asked for would never come.
            for worker in self._workers:
                worker.cancel()

    async def _hand_over(self, staged: StagedWeights) -> bool:
        """Give weights to the engine: what changed, or else everything. Whether it has them now; if not, it generates nothing."""
        for attempt in (staged, staged.whole()):
            self._num_updates += 1
            try:
                pause = await self._engine.update(attempt)
            except (WeightsError, EngineError) as error:
                log.warning("the engine could not take version %d, reloading: %s", staged.version.number, error)
                self._sampling_version = -1
                self._port.report_now()
            else:
                arrival = self._weights.arrival
                log.info(
                    "version %d (step %d): %d B fetched in %.3f s, staged in %.3f s, generation stopped for %.3f s, %.3f s of it writing",
                    *(staged.version.number, staged.version.step, arrival.num_bytes, arrival.fetching, arrival.staging, *pause),
                )
                return True
            finally:
                self._num_updates -= 1
                self._watchdog.sign()
        return False

    async def _serve(self) -> None:
        """A worker.

        consumes:     tickets
          waits for:    the next ticket
          unblocked by: the broker, when pacing allows
        produces:     groups, or failures with a reason
          waits for:    the engine, the scorer, and credit for unacknowledged results
        """
        while (ticket := await self._port.next_ticket()) is not None:
            self._serving.add(ticket.number)
            try:
                group = await self._make_group(ticket)
            except (EngineError, TaskError) as error:
                log.warning("ticket %d failed: %s", ticket.number, error)
                await self._port.fail(ticket, str(error))
            else:
                await self._port.submit(group, ticket.attempt)
            finally:
                self._serving.discard(ticket.number)

    async def _make_group(self, ticket: WireTicket) -> Group:
        problem = fetch_problem(self._task, ticket.prompt)
        prompt_ids = encode_prompt(self._tokenizer, problem)
        request = GenerationRequest(
            prompt_ids,
            self._rollout.group_size,
            self._rollout.max_tokens,
            self._rollout.temperature,
            ticket.seed,
            self._stop_ids,
        )
        self._num_generating += 1
        try:
            completions = await self._engine.generate(request)
        finally:
            self._num_generating -= 1
        texts = [self._tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True) for c in completions]
        rewards = await self._scorer.score(ticket.prompt, texts)
        return Group(
            ticket=ticket.number,
            prompt=ticket.prompt,
            seed=ticket.seed,
            actor=self._name,
            engine=self._engine.name,
            prompt_ids=np.array(prompt_ids, np.int32),
            num_tokens=np.array([completion.token_ids.size for completion in completions], np.int32),
            token_ids=np.concatenate([completion.token_ids for completion in completions]),
            logprobs=np.concatenate([completion.logprobs for completion in completions]),
            versions=np.concatenate([completion.versions for completion in completions]),
            rewards=np.array(rewards, np.float32),
            finish=np.array([completion.finish for completion in completions], np.uint8),
        )
