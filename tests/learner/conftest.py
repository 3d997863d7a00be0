"""Tiny policies and batches that the learner's tests share, as fixtures that give factories."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.batch import Batch, Sequence
from learner.ranks import Ranks

VOCABULARY = 29


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    """A random Llama, the same for the same seed; its logits are far from flat."""

    def make(seed: int = 0, hidden: int = 16, layers: int = 2, vocabulary: int = VOCABULARY, tie: bool = True) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=tie,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def slow_logprobs() -> Callable[..., tuple[list[torch.Tensor], list[float]]]:
    """The log-probabilities of a completion's tokens and the entropy before each, one token at a time: the sequence runs alone, unpadded,
    in float64, cut off before the token that is asked about."""

    def slow(model: Any, prompt: Any, tokens: Any, temperature: float) -> tuple[list[torch.Tensor], list[float]]:
        model = model if model.dtype == torch.float64 else copy.deepcopy(model).double()
        logprobs, entropies = [], []
        for count, token in enumerate(tokens):
            ids = torch.tensor([[*map(int, prompt), *map(int, tokens[:count])]])
            logits = model(input_ids=ids).logits[0, -1] / temperature
            all_logprobs = torch.log_softmax(logits, dim=-1)
            logprobs.append(all_logprobs[int(token)])
            entropies.append(-sum((x.exp() * x).item() for x in all_logprobs.detach()))
        return logprobs, entropies

    return slow


@pytest.fixture
def make_training_batch() -> Callable[..., Batch]:
    """A batch of random completions whose behaviour log-probabilities are off the policy's own by a little noise."""

    def make(number: int = 0, groups: int = 3, group_size: int = 4, seed: int = 0, vocabulary: int = VOCABULARY, longest: int = 9) -> Batch:
        rng = np.random.default_rng([seed, number])
        sequences = []
        for _ in range(groups):
            prompt = rng.integers(3, vocabulary, rng.integers(1, 6)).astype(np.int32)
            for _ in range(group_size):
                count = int(rng.integers(1, longest + 1))
                tokens = rng.integers(3, vocabulary, count).astype(np.int32)
                behaviour = (-3.0 + 0.5 * rng.standard_normal(count)).astype(np.float32)
                sequences.append(Sequence(prompt, tokens, behaviour, float(rng.standard_normal())))
        tickets = list(range(number * groups, (number + 1) * groups))
        return Batch(number, sequences, tickets, [0] * groups, {})

    return make


DEADLINE = 60.0


class _Meeting:
    """Where the threads of a group meet: each leaves something and takes all of it along."""

    def __init__(self, size: int) -> None:
        self._left: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=DEADLINE)
        self.abort = self._barrier.abort

    def exchange(self, rank: int, thing: Any) -> list[Any]:
        self._left[rank] = thing
        self._barrier.wait()
        found = list(self._left)
        self._barrier.wait()
        return found


class ThreadRanks:
    """Ranks that are threads of one process. Gathering has a meeting of its own, as it may run beside all else."""

    def __init__(self, rank: int, world_size: int, main: _Meeting, side: _Meeting) -> None:
        self.rank, self.world_size, self._main, self._side = rank, world_size, main, side

    def broadcast(self, data: bytes | None) -> bytes:
        found: bytes = self._main.exchange(self.rank, data)[0]
        return found

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self._main.exchange(self.rank, tensor.clone())))

    def barrier(self) -> None:
        self._main.exchange(self.rank, None)

    def gather(self, data: bytes) -> list[bytes] | None:
        found = self._side.exchange(self.rank, data)
        return None if self.rank else found


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """Calls a function once for each rank, all at once, and returns what each call did."""

    def call(world_size: int, function: Callable[[Ranks], Any]) -> list[Any]:
        meetings = _Meeting(world_size), _Meeting(world_size)

        def guarded(ranks: ThreadRanks) -> Any:
            try:
                return function(ranks)
            except BaseException:
                for meeting in meetings:
                    meeting.abort()
                raise

        with ThreadPoolExecutor(world_size) as pool:
            calls = [pool.submit(guarded, ThreadRanks(rank, world_size, *meetings)) for rank in range(world_size)]
        failures = [found for call in calls if (found := call.exception()) is not None]
        for failure in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise failure
        return [call.result() for call in calls]

    return call
