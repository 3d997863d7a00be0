"""What an actor costs beside bare vLLM, and what a weight update costs an actor.

    python bench/actor.py [--size 1b] [--sequences 256] [--tokens 512] [--group 8] [--repeats 5] [--seconds 30] [--every 10]

Throughput: the same requests (prompts, seeds, lengths, log-probabilities on) go through vLLM's AsyncLLM alone, and through a whole Actor on top of
the same AsyncLLM in the same process: tickets, prompts from the task, group assembly, scoring, encoding for the wire. Turn and turn about, medians.
Updates: the same load goes on for --seconds with and without an update every --every seconds (deltas as one AdamW step at 1e-6 makes them: about
0.9 % of the weights by one ULP); tokens per second of both, and the pause of each update, with the key-value cache dropped and kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actor.engine import GenerationRequest
from actor.shadow import Shadow, StagedWeights, shadow_folders
from actor.vllm_engine import VllmEngine
from bench.random_policy import FixedLength, make_policy
from protocol.base import base_layout, base_tensors
from protocol.config import ActorConfig, RolloutConfig
from protocol.groups import Group, encode_group
from protocol.messages import ActorReport, Route, WireTicket
from protocol.sampling import prompt_index, ticket_seed
from protocol.weights import BlobRef, PolicyVersion
from tasks.prompts import encode_prompt


class Tickets:
    """Implements protocol.ports.ActorPort: a fixed number of tickets, or tickets until told to stop; weights are none of its business."""

    newest, stopping = None, ""

    def __init__(self, numbers: list[int], refill: Callable[[], bool] = lambda: False) -> None:
        self._waiting, self._refill = deque(numbers), refill
        self._next = max(numbers) + 1
        self.num_bytes = self.num_tokens = 0

    def held_tickets(self) -> list[int]:
        return []

    async def join(self, engine: str, report: Callable[[], ActorReport]) -> Any:
        raise NotImplementedError

    def report_now(self) -> None:
        pass

    async def next_ticket(self) -> WireTicket | None:
        if not self._waiting and self._refill():
            self._waiting.append(self._next)
            self._next += 1
        if not self._waiting:
            return None
        number = self._waiting.popleft()
        return WireTicket(number, 1, prompt_index(0, number, 256), ticket_seed(0, number))

    async def new_version(self, held: int) -> PolicyVersion | None:
        await asyncio.Event().wait()
        return None

    async def submit(self, group: Group, attempt: int) -> None:
        self.num_bytes += len(encode_group(group))
        self.num_tokens += group.token_ids.size

    async def fail(self, ticket: WireTicket, reason: str) -> None:
        raise RuntimeError(reason)

    async def route(self, held: int, failed: str = "") -> Route:
        raise NotImplementedError

    async def fetch(self, blob: BlobRef) -> Path:
        raise NotImplementedError

    def forget(self, blob: BlobRef) -> None:
        pass

    async def leave(self) -> None:
        pass


class KeptEngine:
    """An engine that survives the actor that closes it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def close(self) -> None:
        pass


class Bench:
    """One vLLM, loaded with random weights."""

    def __init__(self, engine: VllmEngine, tokenizer: Any, task: FixedLength, rollout: RolloutConfig, num_groups: int) -> None:
        self.engine, self._tokenizer, self._task, self._rollout, self._num_groups = engine, tokenizer, task, rollout, num_groups

    def request(self, number: int) -> GenerationRequest:
        ids = encode_prompt(self._tokenizer, self._task.train(prompt_index(0, number, 256)))
        return GenerationRequest(
            ids, self._rollout.group_size, self._rollout.max_tokens, self._rollout.temperature, ticket_seed(0, number), ()
        )

    async def bare(self) -> float:
        """Tokens per second of vLLM alone: the same requests, all at once."""
        requests = [self.request(number) for number in range(self._num_groups)]
        started = time.monotonic()
        found = await asyncio.gather(*(self.engine._complete(request, f"bare-{started}-{n}") for n, request in enumerate(requests)))
        elapsed = time.monotonic() - started
        return sum(len(output.token_ids) for outputs in found for output in outputs) / elapsed

    async def actor(self) -> float:
        """Tokens per second of an actor on the same vLLM."""
        port = Tickets(list(range(self._num_groups)))
        started = time.monotonic()
        await self._make_actor(port).run()
        return port.num_tokens / (time.monotonic() - started)

    async def under_load(self, seconds: float, every: float, update: Callable[[], Any]) -> tuple[float, list[Any]]:
        """Tokens per second over `seconds` of full load with an update every `every` seconds (0: none), and what each update took."""
        ends = time.monotonic() + seconds
        port = Tickets(list(range(self._num_groups)), lambda: time.monotonic() < ends)
        working = asyncio.ensure_future(self._make_actor(port).run())
        pauses: list[Any] = []
        started, before = time.monotonic(), self._sampled()
        while time.monotonic() < ends:
            await asyncio.sleep(min(every or seconds, max(0.01, ends - time.monotonic())))
            if every and time.monotonic() < ends:
                pauses.append(await update())
        rate = (self._sampled() - before) / (time.monotonic() - started)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return rate, pauses

    def _sampled(self) -> int:
        """Tokens sampled so far, those of unfinished requests included."""
        states = self.engine._llm.output_processor.request_states.values()
        return self.engine.num_tokens + sum(state.detokenizer.num_output_tokens() for state in states)

    def _make_actor(self, port: Tickets) -> Any:
        # Not at the top: vLLM's CPU workers import this file again, and fail where numba has been imported (vLLM 0.32).
        from actor.loop import Actor

        actor = Actor("bench", port, KeptEngine(self.engine), self._task, self._tokenizer, (), self._rollout, [], time.monotonic)  # type: ignore[arg-type]
        actor._sampling_version = 0
        return actor


class Updates:
    """Weights in a shadow that move by about one step of AdamW at 1e-6 each time."""

    def __init__(self, policy: Path) -> None:
        paths: list[Path] = sorted(policy.glob("*.safetensors"))
        self.shadow = Shadow(base_layout(paths), shadow_folders())
        self.shadow.fill(base_tensors(paths))
        self._generator = np.random.default_rng(1)
        self.number = 0

    def first(self) -> StagedWeights:
        return StagedWeights(PolicyVersion(0, 0, 0, ""), self.shadow.weights, self.shadow.path, None)

    def next(self, share: float = 0.009) -> StagedWeights:
        self.number += 1
        changed = {}
        for name, tensor in self.shadow.weights.items():
            count = max(1, int(tensor.bits.size * share))
            positions = np.unique(self._generator.integers(0, tensor.bits.size, count))
            tensor.bits[positions] ^= np.uint16(1)
            changed[name] = positions
        return StagedWeights(PolicyVersion(self.number, self.number, 0, ""), self.shadow.weights, self.shadow.path, changed)


class Results(dict[str, Any]):
    """Figures, printed (and written) as they come: a run that is cut short has shown what it had."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def add(self, name: str, value: Any) -> None:
        self[name] = value
        print(f"{name:62} {value}", flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self, indent=2))


async def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        await measure(make_policy(Path(folder), options.size), options, Results(options.json))


async def measure(policy: Path, options: argparse.Namespace, results: Results) -> None:
    from transformers import AutoTokenizer

    rollout = RolloutConfig(group_size=options.group, max_tokens=options.tokens)
    settings = ActorConfig(engine="vllm", max_sequences=options.sequences, memory_share=options.memory)
    updates = Updates(policy)
    started = time.monotonic()
    engine = await VllmEngine.start(policy, settings, rollout)
    results.add("engine", engine.name)
    results.add("start, s", round(time.monotonic() - started, 1))
    results.add("first load, s writing", round((await engine.update(updates.first())).writing, 3))
    task = FixedLength(length=options.tokens)
    bench = Bench(engine, AutoTokenizer.from_pretrained(policy), task, rollout, options.sequences // options.group)
    if options.repeats:
        await _throughput(bench, options, results)
    results.add("first patch with its audit, s stopped", round((await engine.update(updates.next())).stopped, 3))
    # Made beforehand: a learner makes them elsewhere, and here they would hold up the event loop.
    ready = deque(updates.next() for _ in range(2 * int(options.seconds / options.every) + 2))
    plain = [(await bench.under_load(options.seconds, 0, lambda: None))[0]]
    for kept in (False, True):
        engine._keep_kv = kept
        rate, pauses = await bench.under_load(options.seconds, options.every, lambda: engine.update(ready.popleft()))
        plain.append((await bench.under_load(options.seconds, 0, lambda: None))[0])
        _updates("cache kept" if kept else "cache dropped", rate, plain[-2:], pauses, options.every, results)
    results.add("patches exact", engine._patches)
    updates.shadow.close()
    await engine.close()


async def _throughput(bench: Bench, options: argparse.Namespace, results: Results) -> None:
    await bench.bare()
    rates: dict[str, list[float]] = {"bare": [], "actor": []}
    for _ in range(options.repeats):
        rates["bare"].append(await bench.bare())
        rates["actor"].append(await bench.actor())
    results.add("bare vLLM, tokens/s (all)", [round(rate) for rate in rates["bare"]])
    results.add("actor, tokens/s (all)", [round(rate) for rate in rates["actor"]])
    bare, actor = (statistics.median(rates[kind]) for kind in ("bare", "actor"))
    results.add("actor / bare (goal >= 0.97)", round(actor / bare, 4))


def _updates(what: str, rate: float, plain: list[float], pauses: list[Any], every: float, results: Results) -> None:
    stopped = [pause.stopped for pause in pauses]
    results.add(f"{what}: tokens/s before, with updates, after", [round(plain[0]), round(rate), round(plain[1])])
    results.add(f"{what}: pause of each update, ms", [round(1000 * seconds, 1) for seconds in stopped])
    results.add(f"{what}: of it writing, ms", [round(1000 * pause.writing, 1) for pause in pauses])
    results.add(f"{what}: pause as a share of {every} s (goal <= 2 %)", f"{statistics.median(stopped) / every:.2%}")
    results.add(f"{what}: throughput lost, re-prefill included", f"{1 - rate / statistics.mean(plain):.2%}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--every", type=float, default=10)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
