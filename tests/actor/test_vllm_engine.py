"""The engine on vLLM (its CPU build, real processes) against full forward passes of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from actor.engine import Completion, GenerationRequest
from actor.shadow import Shadow, StagedWeights, shadow_folders
from actor.vllm_engine import BITS, MARKER, POSITIONS, VllmEngine, spaced_seed, write_patch
from actor.vllm_worker import _SkipMarked
from protocol.config import ActorConfig, RolloutConfig
from protocol.delta import Delta, apply_in_place, encode_delta
from protocol.errors import EngineDied, EngineError, SlipstreamError
from protocol.groups import FULL, STOPPED
from protocol.weights import PolicyVersion, Tensor, Weights, root_hash

if sys.platform != "linux":
    pytest.skip("vLLM runs on Linux only", allow_module_level=True)
if importlib.util.find_spec("vllm") is None:
    pytest.fail("vLLM is not installed here: run `make vllm`", pytrace=False)

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("vllm_child.py")
DEADLINE = 60.0
START_DEADLINE = 180.0
VOCABULARY = 61
CONTEXT = 256
END = 2
NUM_UPDATES = 20
TOLERANCE = 0.2
"""Nats by which a log-probability in bf16 may differ from the one in fp32."""
MEAN_TOLERANCE = 0.03
LONG_PROMPT = [1, *(3 + 7 * i % 50 for i in range(139))]
"""Longer than a block of vLLM's prefix cache."""
SPECIAL_BITS = (0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFC1, 0x7F81, 0x0001, 0x8001)
"""-0, infinities, quiet and signalling NaNs with a payload, the smallest numbers."""


# --- policies and what transformers makes of them


def make_policy(seed: int, *, tied: bool = True) -> Any:
    """A random Llama whose parameters are exact in bf16; vLLM's CPU attention wants heads of 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model.eval()


def bits_of(model: Any) -> Weights:
    """A model's parameters as bf16 bits: the upper half of each float32 pattern."""
    return {
        name: Tensor("BF16", tuple(p.shape), (p.detach().numpy().ravel().view(np.uint32) >> 16).astype(np.uint16))
        for name, p in model.named_parameters()
    }


def with_bits(weights: Weights, *, tied: bool = True) -> Any:
    """The policy with these parameters."""
    model = make_policy(0, tied=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy((weights[name].bits.astype(np.uint32) << 16).view(np.float32)).view(parameter.shape))
    return model


def version_of(weights: Weights, number: int) -> PolicyVersion:
    return PolicyVersion(number, number, 0, root_hash(weights))


def moved(weights: Weights, seed: int) -> Weights:
    """A tenth of the elements moved by up to 40 units in the last place; none changes its sign or ceases to be a finite number."""
    rng = np.random.default_rng(seed)
    new: Weights = {}
    for name, tensor in weights.items():
        moves = rng.integers(-40, 41, tensor.bits.size) * (rng.random(tensor.bits.size) < 0.1)
        magnitudes = (tensor.bits & 0x7FFF).astype(np.int64)
        moves[(magnitudes < 64) | (magnitudes > 0x4000)] = 0
        new[name] = tensor._replace(bits=(tensor.bits.astype(np.int64) + moves).astype(np.uint16))
    return new


def true_logprobs(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0) -> Any:
    """Log-probability of every token of a completion by one forward pass in fp32."""
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def assert_matches(group: list[Completion], model: Any, asked: GenerationRequest) -> None:
    errors = np.concatenate([c.logprobs - true_logprobs(model, asked.prompt_ids, c, asked.temperature) for c in group])
    assert np.abs(errors).max() < TOLERANCE / asked.temperature
    assert np.abs(errors).mean() < MEAN_TOLERANCE / asked.temperature


def assert_ends_well(completion: Completion, asked: GenerationRequest) -> None:
    tokens = completion.token_ids.tolist()
    assert 1 <= len(tokens) <= asked.max_tokens
    assert completion.logprobs.size == completion.versions.size == len(tokens)
    assert not set(tokens[:-1]) & set(asked.stop_ids)
    if tokens[-1] in asked.stop_ids:
        assert completion.finish == STOPPED
    else:
        assert completion.finish == FULL
        assert len(tokens) == asked.max_tokens


def same_bits(some: list[Completion], others: list[Completion]) -> bool:
    return all(
        a.finish == b.finish and np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(some, others, strict=True)
    )


def request(prompt: list[int] | None = None, completions: int = 4, max_tokens: int = 40, **changes: Any) -> GenerationRequest:
    plain = GenerationRequest(prompt or [1, 5, 9], completions, max_tokens, 1.0, 7, (END,))
    return plain._replace(**changes)


# --- engines


class Background:
    """An event loop in a thread of its own: an engine belongs to one loop, and outlives those of single tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop")
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any], seconds: float = DEADLINE) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, seconds), self._loop).result(seconds + 5)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()


class Served:
    """A running engine with its shadow."""

    def __init__(self, folder: Path, background: Background, layout: Weights, *, keep_kv: bool = False) -> None:
        self._background = background
        self._folder = folder
        self.shadow = Shadow({name: (t.dtype, t.shape) for name, t in layout.items()}, [folder])
        settings = ActorConfig(max_sequences=64, keep_kv=keep_kv)
        rollout = RolloutConfig(group_size=4, max_tokens=CONTEXT)
        self.engine: VllmEngine = background.run(VllmEngine.start(folder, settings, rollout), START_DEADLINE)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._background.run(coroutine)

    async def update(self, weights: Weights, number: int) -> None:
        """Hand everything over, then spoil the shadow: the engine may not look at it any more."""
        self.shadow.fill(weights.items())
        await self.engine.update(StagedWeights(version_of(weights, number), self.shadow.weights, self.shadow.path, None))
        for tensor in self.shadow.weights.values():
            tensor.bits[:] = 0x7FC1

    async def update_by(self, delta: bytes, version: PolicyVersion) -> None:
        """Move the shadow by a delta and hand it over."""
        changed = apply_in_place(Delta(delta), self.shadow.weights)
        assert self.shadow.root(changed) == version.root
        await self.engine.update(StagedWeights(version, self.shadow.weights, self.shadow.path, changed))

    def outcome(self, coroutine: Coroutine[Any, Any, Any]) -> BaseException | None:
        """What it raises."""
        try:
            self.run(coroutine)
        except SlipstreamError as error:
            return error
        return None

    def load(self, weights: Weights, number: int) -> None:
        self.run(self.update(weights, number))

    def generate(self, *asked: GenerationRequest) -> list[list[Completion]]:
        """All of them at the same time."""

        async def together() -> list[list[Completion]]:
            return list(await asyncio.gather(*(self.engine.generate(one) for one in asked)))

        found: list[list[Completion]] = self.run(together())
        return found

    def group(self, asked: GenerationRequest) -> list[Completion]:
        return self.generate(asked)[0]

    @property
    def num_tokens_in_flight(self) -> int:
        return sum(s.detokenizer.num_output_tokens() for s in self.engine._llm.output_processor.request_states.values())

    def close(self) -> None:
        context = self.engine._llm.engine_core.resources.ctx
        self.run(self.engine.close())
        self.run(asyncio.to_thread(context.term))  # vLLM leaves that to the interpreter's end, where pytest takes it for a mistake
        self.shadow.close()


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """The segments that vLLM's processes have in common; they stay behind when all of them are killed."""
    maps = {Path(part.path) for process in processes for part in process.memory_maps()}
    return {path for path in maps if path.parent == Path("/dev/shm") and path.name.startswith("psm_")}


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop to others until `condition` holds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  # vLLM has no events for these
            await asyncio.sleep(0)


@contextlib.contextmanager
def serving(folder: Path, model: Any, *, keep_kv: bool = False) -> Iterator[Served]:
    """An engine for the model's configuration; without weights yet. What it changes in the environment is undone."""
    model.config.save_pretrained(folder)
    before = dict(os.environ)
    background = Background()
    try:
        served = Served(folder, background, bits_of(model), keep_kv=keep_kv)
        try:
            yield served
        finally:
            served.close()
    finally:
        background.close()
        os.environ.clear()
        os.environ.update(before)


class Published(NamedTuple):
    """A policy and where updates lead: weights by version number, and the deltas between them."""

    weights: list[Weights]
    deltas: list[bytes]

    def version(self, number: int) -> PolicyVersion:
        return version_of(self.weights[number], number)


def publish(first: Weights, count: int) -> Published:
    weights = [first]
    deltas = []
    for number in range(1, count + 1):
        weights.append(moved(weights[-1], number))
        versions = version_of(weights[-2], number - 1), version_of(weights[-1], number)
        deltas.append(encode_delta("run", weights[-2], weights[-1], *versions)[0])
    return Published(weights, deltas)


@pytest.fixture(scope="module")
def published() -> Published:
    return publish(bits_of(make_policy(0)), NUM_UPDATES)


class Started(NamedTuple):
    """The shared engine, and what came of a request before its first update, of a first update that lacks a tensor, of a request after it."""

    served: Served
    early: list[BaseException | None]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with serving(tmp_path_factory.mktemp("policy"), make_policy(0)) as served:
        weights = bits_of(make_policy(0))
        path = tmp_path_factory.mktemp("first") / "broken.safetensors"
        without("model.layers.1.mlp.down_proj.weight")(weights, path)
        first = StagedWeights(version_of(weights, 0), weights, path, None)
        early = [
            served.outcome(served.engine.generate(request())),
            served.outcome(served.engine.update(first)),
            served.outcome(served.engine.generate(request())),
        ]
        yield Started(served, early)


@pytest.fixture
def served(started: Started) -> Served:
    return started.served


class Kept(NamedTuple):
    """What a second engine, which keeps its key-value cache, did: a probe of the last published weights, then updates in mid-generation."""

    served: Served
    probe: list[Completion]
    transcript: Transcript
    after: list[Completion]


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory, published: Published) -> Iterator[Kept]:
    with serving(tmp_path_factory.mktemp("keeping"), make_policy(0), keep_kv=True) as served:
        served.load(published.weights[-1], 0)
        probe = served.group(PROBE)
        served.group(request(LONG_PROMPT))  # is in the prefix cache now
        transcript = served.run(updates_in_mid_generation(served, 2))
        after = served.group(request(LONG_PROMPT))
        yield Kept(served, probe, transcript, after)


PROBE = request(completions=8, max_tokens=100, stop_ids=(), seed=11)


# --- seeds


@given(st.data(), st.integers(1, 4096))
def test_no_two_tickets_share_the_seed_of_a_completion(data: st.DataObject, num_completions: int) -> None:
    limit = (1 << 62) // num_completions
    some, other = (data.draw(st.integers(0, limit - 1)) for _ in range(2))
    seeds = [range(first, first + num_completions) for first in (spaced_seed(some, num_completions), spaced_seed(other, num_completions))]
    assert all(each.start >= 0 and each.stop <= 1 << 62 for each in seeds)
    overlap = range(max(each.start for each in seeds), min(each.stop for each in seeds))
    assert len(overlap) == (num_completions if some == other else 0)


@given(st.integers(0, (1 << 62) - 1), st.integers(1, 4096))
def test_every_ticket_seed_is_spaced_within_62_bits(seed: int, num_completions: int) -> None:
    first = spaced_seed(seed, num_completions)
    assert first % num_completions == 0
    assert 0 <= first <= (1 << 62) - num_completions


def test_a_seed_decides_tokens_and_log_probabilities(served: Served) -> None:
    served.load(bits_of(make_policy(0)), 0)
    first = served.group(request(seed=3))
    assert same_bits(first, served.group(request(seed=3)))
    assert len({tuple(c.token_ids.tolist()) for c in first}) == 4
    # Of a seed torch's generators on the CPU take 32 bits, those of accelerators 64.
    others = [served.group(request(seed=seed)) for seed in (0, 2, 4, 5, 3 + (1 << 29))]
    texts = [tuple(c.token_ids.tolist()) for group in [first, *others] for c in group]
    assert len(set(texts)) == len(texts)


def test_beside_others_a_group_is_the_same_but_for_rounding(served: Served) -> None:
    """vLLM's sums depend a little on how many rows are computed together, so a draw that is nearly a tie may fall the other way."""
    served.load(bits_of(make_policy(0)), 0)
    asked = [request([1, 3 + i, *range(4, 4 + 3 * i)], 2 + i, 20 + 7 * i, seed=i) for i in range(5)]
    alone = [served.group(one) for one in asked]
    pairs = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        for i, group in zip(order, served.generate(*(asked[i] for i in order)), strict=True):
            pairs += zip(alone[i], group, strict=True)
    same = 0
    for one, other in pairs:
        if np.array_equal(one.token_ids, other.token_ids):
            same += 1
            assert np.abs(one.logprobs - other.logprobs).max() < TOLERANCE / 2
    assert same >= 0.9 * len(pairs)


# --- what is recorded


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_full_forward_pass_at_the_temperature(temperature: float, served: Served) -> None:
    model = make_policy(1)
    served.load(bits_of(model), 4)
    asked = request(completions=16, max_tokens=80, temperature=temperature, stop_ids=())
    group = served.group(asked)
    assert_matches(group, model, asked)
    for completion in group:
        assert set(completion.versions.tolist()) == {4}
    # Those of another temperature would not do.
    with pytest.raises(AssertionError):
        assert_matches(group, model, asked._replace(temperature=1.7 - temperature))


def test_a_completion_stops_at_a_stop_token_or_uses_its_whole_budget(served: Served) -> None:
    served.load(bits_of(make_policy(0)), 0)
    asked = [request(completions=8, max_tokens=12, seed=seed, stop_ids=(END, 11, 12, 13, 14)) for seed in range(4)]
    before = served.engine.num_tokens
    groups = served.generate(*asked)
    for one, group in zip(asked, groups, strict=True):
        assert len(group) == 8
        for completion in group:
            assert_ends_well(completion, one)
    assert {completion.finish for group in groups for completion in group} == {STOPPED, FULL}
    assert served.engine.num_tokens - before == sum(completion.token_ids.size for group in groups for completion in group)
    assert served.engine.busy_seconds > 0
    never = served.group(request(max_tokens=6, stop_ids=()))
    assert [(c.finish, c.token_ids.size) for c in never] == [(FULL, 6)] * 4
    always = served.group(request(max_tokens=6, stop_ids=tuple(range(VOCABULARY))))
    assert [(c.finish, c.token_ids.size) for c in always] == [(STOPPED, 1)] * 4


def test_a_prompt_and_budget_beyond_the_context_are_refused(served: Served) -> None:
    served.load(bits_of(make_policy(0)), 0)
    with pytest.raises(EngineError, match=str(CONTEXT)):
        served.group(request([1] * 60, max_tokens=CONTEXT - 59))
    assert [c.token_ids.size for c in served.group(request([1] * (CONTEXT - 3), max_tokens=3, stop_ids=()))] == [3] * 4


def test_tokens_are_sampled_with_their_probabilities(served: Served) -> None:
    model = make_policy(0)
    served.load(bits_of(model), 0)
    num_seeds, completions, temperature = 30, 32, 0.7
    asked = [request(completions=completions, max_tokens=1, temperature=temperature, seed=seed) for seed in range(num_seeds)]
    tokens = np.array([[c.token_ids[0] for c in group] for group in served.generate(*asked)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 5, 9]])).logits[0, -1].double() / temperature
    expected = torch.softmax(logits, dim=-1).numpy() * tokens.size
    observed = np.bincount(tokens.ravel(), minlength=VOCABULARY)
    likely = expected >= 5
    both = [np.append(counts[likely], counts[~likely].sum()) for counts in (observed, expected)]
    freedom = likely.sum()
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3  # its 1 - 1e-4 quantile, by Wilson and Hilferty
    assert freedom >= 5
    assert ((both[0] - both[1]) ** 2 / both[1]).sum() < limit


# --- updates


def test_after_many_updates_the_policy_is_that_of_a_fresh_load(served: Served, published: Published, keeping: Kept) -> None:
    async def follow() -> None:
        served.shadow.fill(published.weights[0].items())
        first = StagedWeights(published.version(0), served.shadow.weights, served.shadow.path, None)
        await served.engine.update(first)
        for number, delta in enumerate(published.deltas, 1):
            await served.update_by(delta, published.version(number))

    served.run(follow())
    probe = served.group(PROBE)
    assert {number for c in probe for number in c.versions.tolist()} == {NUM_UPDATES}
    assert same_bits(probe, keeping.probe)
    assert_matches(probe, with_bits(published.weights[-1]), PROBE)
    with pytest.raises(AssertionError):
        assert_matches(probe, with_bits(published.weights[0]), PROBE)
    served.load(published.weights[-1], NUM_UPDATES)
    assert same_bits(served.group(PROBE), probe)


class Transcript(NamedTuple):
    """Groups that were generated while weights were replaced, and the policies by version number."""

    asked: list[GenerationRequest]
    groups: list[list[Completion]]
    models: Mapping[int, Any]

    def rows(self) -> Iterator[tuple[Completion, dict[int, Any]]]:
        """Each completion with how far its log-probabilities are from those of each version."""
        for one, group in zip(self.asked, self.groups, strict=True):
            for completion in group:
                found = {n: np.abs(completion.logprobs - true_logprobs(m, one.prompt_ids, completion)) for n, m in self.models.items()}
                yield completion, found


async def updates_in_mid_generation(served: Served, count: int) -> Transcript:
    models = {100 + n: make_policy(20 + n) for n in range(count + 1)}
    asked = [request([1, *range(3, 4 + 5 * i)], 4, 150, seed=i, stop_ids=() if i else (END,)) for i in range(5)]
    await served.update(bits_of(models[100]), 100)
    generations = [asyncio.create_task(served.engine.generate(one)) for one in asked]
    for number in range(1, count + 1):
        enough = 16 * 150 * number // (count + 1)
        await until(lambda enough=enough: served.num_tokens_in_flight >= enough)  # type: ignore[misc]
        await served.update(bits_of(models[100 + number]), 100 + number)
    return Transcript(asked, [await generation for generation in generations], models)


def errors_by(versions: Any, found: dict[int, Any]) -> Any:
    """The errors of a completion if its tokens had these versions."""
    return np.array([found[number][t] for t, number in enumerate(versions.tolist())])


def test_in_mid_generation_every_token_has_the_version_that_gave_its_log_probability(served: Served) -> None:
    transcript = served.run(updates_in_mid_generation(served, 4))
    errors, early, late, wrong = [], [], [], []
    num_cuts = 0
    for one, group in zip(transcript.asked, transcript.groups, strict=True):
        assert len(group) == one.num_completions
        for completion in group:
            assert_ends_well(completion, one)
    for completion, found in transcript.rows():
        versions = completion.versions
        assert (np.diff(versions) >= 0).all()
        num_cuts += np.count_nonzero(np.diff(versions))
        errors.append(errors_by(versions, found))
        # Labels that come a token too early or too late, or name a neighbouring version, would be found out.
        early.append(errors_by(np.append(versions[1:], versions[-1]), found))
        late.append(errors_by(np.append(versions[:1], versions[:-1]), found))
        wrong.append(errors_by(np.where(versions == 104, 103, versions + 1), found))
    assert num_cuts >= 4 * 16
    assert np.concatenate(errors).max() < TOLERANCE
    assert np.concatenate(errors).mean() < MEAN_TOLERANCE
    for shifted in (early, late):
        assert np.count_nonzero(np.concatenate(shifted) >= TOLERANCE) > num_cuts / 2
    assert np.count_nonzero(np.concatenate(wrong) >= TOLERANCE) > np.concatenate(wrong).size / 2


def test_a_prompt_that_was_seen_under_one_version_is_computed_anew_under_the_next(served: Served) -> None:
    asked = request(LONG_PROMPT)
    for number in (0, 1):
        model = make_policy(number)
        served.load(bits_of(model), number)
        for _ in range(2):
            assert_matches(served.group(asked), model, asked)


def test_with_a_kept_cache_every_token_has_the_version_it_was_sampled_under(keeping: Kept) -> None:
    caught = num_cuts = 0
    for completion, found in keeping.transcript.rows():
        versions = completion.versions
        assert (np.diff(versions) >= 0).all()
        first = np.count_nonzero(versions == 100)
        assert found[100][:first].max() < TOLERANCE
        if first < versions.size:
            # What follows is a mixture, but no longer the first version's.
            num_cuts += 1
            caught += found[100][first] >= TOLERANCE
    assert num_cuts >= 16
    assert caught > num_cuts / 2


def test_with_a_kept_cache_a_new_request_is_of_the_new_version_alone(keeping: Kept) -> None:
    assert {number for c in keeping.after for number in c.versions.tolist()} == {102}
    assert_matches(keeping.after, keeping.transcript.models[102], request(LONG_PROMPT))


# --- when something fails


def test_nothing_is_generated_before_the_first_update(started: Started) -> None:
    assert isinstance(started.early[0], EngineError)


def test_a_first_update_that_lacks_a_tensor_fails_and_still_nothing_is_generated(started: Started) -> None:
    assert [type(error) for error in started.early] == [EngineError] * 3


def missing_file(weights: Weights, path: Path) -> None:
    path.unlink()


def no_weights_file(weights: Weights, path: Path) -> None:
    path.write_bytes(b"not safetensors")


def without(name: str) -> Callable[[Weights, Path], None]:
    def change(weights: Weights, path: Path) -> None:
        write_weights({key: tensor for key, tensor in weights.items() if key != name}, path)

    change.__name__ = f"without {name}"
    return change


def another_shape(weights: Weights, path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = weights[name]
    write_weights(weights | {name: tensor._replace(shape=(tensor.shape[0] // 2, tensor.shape[1]), bits=tensor.bits[::2])}, path)


def one_more(weights: Weights, path: Path) -> None:
    write_weights(weights | {"model.layers.1.unheard_of.weight": Tensor("BF16", (2,), np.zeros(2, np.uint16))}, path)


def write_weights(weights: Weights, path: Path) -> None:
    """A safetensors file of bf16 tensors."""
    tensors = {name: torch.from_numpy(t.bits.view(np.int16).copy()).view(torch.bfloat16).reshape(t.shape) for name, t in weights.items()}
    save_file(tensors, path)


BREAKAGES = [
    missing_file,
    no_weights_file,
    without("model.layers.0.self_attn.q_proj.weight"),
    without("model.layers.1.mlp.down_proj.weight"),
    without("model.embed_tokens.weight"),
    another_shape,
    one_more,
]


@pytest.mark.parametrize("change", BREAKAGES, ids=lambda change: change.__name__)
def test_after_an_update_that_failed_nothing_is_generated_until_one_of_everything(
    change: Callable[[Weights, Path], None], served: Served, tmp_path: Path
) -> None:
    model, other = make_policy(0), make_policy(1)
    weights = bits_of(model)
    asked = request(seed=5)
    served.load(weights, 0)
    before = served.group(asked)
    path = tmp_path / "broken.safetensors"
    write_weights(bits_of(other), path)
    change(bits_of(other), path)

    async def fail_and_recover() -> list[Completion]:
        with pytest.raises(EngineError):
            await served.engine.update(StagedWeights(version_of(weights, 1), weights, path, None))
        generation = asyncio.create_task(served.engine.generate(asked))
        await until(lambda: bool(served.engine._llm.output_processor.request_states))
        for _ in range(5):  # every call is answered after a turn of vLLM's own loop
            await served.engine._llm.collective_rpc("slipstream_checksum")
        assert await served.engine._llm.is_paused()
        assert served.num_tokens_in_flight == 0
        assert not generation.done()
        await served.update(weights, 2)
        return await generation

    after = served.run(fail_and_recover())
    assert same_bits(after, before)
    assert {number for c in after for number in c.versions.tolist()} == {2}
    assert_matches(after, model, asked)


def test_a_request_that_is_cancelled_leaves_the_others_alone(served: Served) -> None:
    served.load(bits_of(make_policy(0)), 0)
    asked = request(seed=5, stop_ids=(), max_tokens=100)
    alone = served.group(asked)

    async def cancel_one() -> list[Completion]:
        doomed = asyncio.create_task(served.engine.generate(asked._replace(seed=6)))
        other = asyncio.create_task(served.engine.generate(asked))
        await until(lambda: served.num_tokens_in_flight >= 40)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await other

    assert same_bits(served.run(cancel_one()), alone)
    assert not served.engine._cuts


def test_when_the_engine_process_is_killed_whoever_waits_learns_that_it_died(keeping: Kept) -> None:
    served = keeping.served

    async def kill() -> None:
        await served.update(bits_of(make_policy(0)), 200)
        asked = request(stop_ids=(), max_tokens=200, completions=16)
        generations = [asyncio.create_task(served.engine.generate(asked._replace(seed=seed))) for seed in range(3)]
        await until(lambda: served.num_tokens_in_flight > 0)
        (core,) = served.engine._llm.engine_core.resources.engine_manager.processes
        os.kill(core.pid, signal.SIGKILL)
        for generation in generations:
            with pytest.raises(EngineDied):
                await generation
        with pytest.raises(EngineDied):
            await served.engine.generate(asked)
        with pytest.raises(EngineDied):
            await served.update(bits_of(make_policy(1)), 201)

    served.run(kill())


# --- a child process


class Child(NamedTuple):
    """An actor-like process that runs an engine with unpacked parameters; what it reported when all was done, and its other processes."""

    pid: int
    report: dict[str, Any]
    others: list[int]


@pytest.fixture(scope="module")
def untied() -> Published:
    """A policy with an output layer of its own. The last update but one brings in bits that a careless copy would lose, and the marker."""
    plain = publish(bits_of(make_policy(3, tied=False)), 4)
    rng = np.random.default_rng(5)
    special: Weights = {}
    for number, (name, tensor) in enumerate(plain.weights[-1].items()):
        bits = tensor.bits.copy()
        places = rng.choice(bits.size, 2 * len(SPECIAL_BITS), replace=False)
        bits[places] = SPECIAL_BITS * 2
        if number % 3 == 0:
            bits[places[0]] = MARKER
        special[name] = tensor._replace(bits=bits)
    weights = [*plain.weights, special, plain.weights[-1]]
    versions = [version_of(each, number) for number, each in enumerate(weights)]
    last = [encode_delta("run", weights[n - 1], weights[n], versions[n - 1], versions[n])[0] for n in (5, 6)]
    return Published(weights, [*plain.deltas, *last])


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, untied: Published) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("child")
    make_policy(3, tied=False).config.save_pretrained(folder)
    write_weights(untied.weights[0], folder / "base.safetensors")
    for number, delta in enumerate(untied.deltas, 1):
        (folder / f"{number}.delta").write_bytes(delta)
    asked = json.dumps(PROBE._asdict())
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{CHILD.parent}"}
    log = folder / "log"
    reading, writing = os.pipe()  # not standard output, which vLLM's log goes to
    with log.open("wb") as output:
        command = [sys.executable, str(CHILD), str(folder), str(len(untied.deltas)), asked, str(writing)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder, pass_fds=[writing])
    os.close(writing)
    left: set[Path] = set()
    try:
        with os.fdopen(reading) as report:
            ready, _, _ = select.select([report], [], [], START_DEADLINE)
            line = report.readline() if ready else ""
        assert line, log.read_text()[-3000:]
        others = psutil.Process(process.pid).children(recursive=True)
        left = shared_memory_of(others)
        yield Child(process.pid, json.loads(line), [other.pid for other in others])
    finally:
        for other in psutil.Process(process.pid).children(recursive=True):
            other.kill()
        process.kill()
        process.wait()
        for path in left:
            path.unlink(missing_ok=True)
        shadow_folders()  # removes its shadow


def completions_of(report: dict[str, Any]) -> list[Completion]:
    return [
        Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), np.array(versions, np.int32), finish)
        for tokens, logprobs, versions, finish in report["completions"]
    ]


def test_parameters_written_by_patches_are_those_of_a_whole_load_bit_for_bit(child: Child, untied: Published) -> None:
    checks = child.report["checks"]
    assert len(checks) == len(untied.deltas) - 1
    for patched, loaded in checks:
        assert patched == loaded
    assert len({tuple(patched) for patched, _ in checks}) == len(checks) - 1  # the last is the one before the special bits again
    assert child.report["still_patches"]


def test_after_a_patch_that_failed_the_next_update_takes_everything(child: Child, untied: Published) -> None:
    """An update of what changed since a version that the engine does not have would be wrong."""
    assert "gone.safetensors" in child.report["failure"]
    assert child.report["patches"] == len(untied.deltas) - 2


def test_after_patches_the_policy_is_the_published_one(child: Child, untied: Published) -> None:
    group = completions_of(child.report)
    assert {number for c in group for number in c.versions.tolist()} == {len(untied.deltas)}
    assert_matches(group, with_bits(untied.weights[-1], tied=False), PROBE)
    with pytest.raises(AssertionError):
        assert_matches(group, with_bits(untied.weights[0], tied=False), PROBE)


def test_when_an_actor_is_killed_in_mid_generation_its_engine_and_workers_end_too(child: Child) -> None:
    handles = {pid: os.pidfd_open(pid) for pid in child.others}
    try:
        names = [" ".join(psutil.Process(pid).cmdline()) for pid in handles]
        assert len(handles) >= 2, names
        os.kill(child.pid, signal.SIGKILL)
        waiting = {handle: pid for pid, handle in handles.items()}
        while waiting:
            ended, _, _ = select.select(list(waiting), [], [], DEADLINE)
            assert ended, f"{list(waiting.values())} outlive their actor"
            for handle in ended:
                del waiting[handle]
    finally:
        for handle in handles.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


LEAVE = """
import asyncio
import sys
from pathlib import Path

async def main(folder):
    from actor.engine import GenerationRequest
    from actor.shadow import StagedWeights
    from actor.vllm_engine import VllmEngine
    from protocol.config import ActorConfig, RolloutConfig
    from protocol.errors import EngineDied
    from protocol.weights import PolicyVersion

    engine = await VllmEngine.start(folder, ActorConfig(max_sequences=4), RolloutConfig(max_tokens=200))
    await engine.update(StagedWeights(PolicyVersion(0, 0, 0, ""), {}, folder / "base.safetensors", None))
    generation = asyncio.create_task(engine.generate(GenerationRequest([1], 4, 200, 1.0, 0, ())))
    while not engine._llm.output_processor.request_states:
        await asyncio.sleep(0)
    await engine.close()
    try:
        await generation
    except EngineDied:
        print("ended")

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_closed_engine_ends_what_is_running_and_leaves_without_a_complaint(tmp_path: Path) -> None:
    model = make_policy(0)
    model.config.save_pretrained(tmp_path)
    write_weights(bits_of(model), tmp_path / "base.safetensors")
    command = [sys.executable, "-c", LEAVE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_DEADLINE, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
    # vLLM's own processes say that they do without Triton, before anybody could stop them.
    assert [line for line in done.stderr.splitlines() if not line.startswith("Triton")] == []


# --- the masked loader


def parameter(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(rows * columns)
    return torch.nn.Parameter(torch.randn(rows, columns).to(dtype), requires_grad=False)


def load_rows_of_a_fused_one(target: Any, source: torch.Tensor) -> None:
    """As qkv and gate_up are loaded."""
    target.data.narrow(0, 8, source.shape[0]).copy_(source)


def load_the_second_half_of_rows(target: Any, source: torch.Tensor) -> None:
    """As the second of two ranks loads a column-parallel layer."""
    half = source.shape[0] // 2
    target.data.narrow(0, 0, half).copy_(source.narrow(0, half, half))


def load_the_second_half_of_columns(target: Any, source: torch.Tensor) -> None:
    """As the second of two ranks loads a row-parallel layer."""
    half = source.shape[1] // 2
    target.data.narrow(1, 0, half).copy_(source.narrow(1, half, half))


def load_padded(target: Any, source: torch.Tensor) -> None:
    """As embeddings are loaded, whose rows are filled up."""
    target[: source.shape[0]].data.copy_(source)
    target[source.shape[0] :].data.fill_(0)


def load_transposed(target: Any, source: torch.Tensor) -> None:
    target.data.t().narrow(0, 0, source.shape[1]).narrow(1, 0, source.shape[0]).copy_(source.t())


def load_by_chunks(target: Any, source: torch.Tensor) -> None:
    """As a checkpoint's fused tensor is taken apart."""
    for number, part in enumerate(source.chunk(2, dim=0)):
        target.data[number * 20 : number * 20 + part.shape[0]].copy_(part)


def load_wider(target: Any, source: torch.Tensor) -> None:
    """As parameters that are kept in fp32."""
    target.data[: source.shape[0], : source.shape[1]].copy_(source)


LOADERS = {
    load_rows_of_a_fused_one: (40, 10),
    load_the_second_half_of_rows: (16, 10),
    load_the_second_half_of_columns: (12, 24),
    load_padded: (16, 10),
    load_transposed: (16, 12),
    load_by_chunks: (40, 10),
    load_wider: (16, 12),
}
"""How vLLM's loaders copy a tensor of 12 rows and 10 columns, each with the shape of the parameter that it goes into."""


def same_patterns(one: torch.Tensor, other: torch.Tensor) -> bool:
    pattern = torch.int16 if one.element_size() == 2 else torch.int32
    return torch.equal(one.data.view(pattern), other.data.view(pattern))


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@given(seed=st.integers(0, 1 << 32), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]))
def test_a_masked_load_leaves_what_a_dense_one_would(load: Callable[[Any, Any], None], seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 12, 10
    old = rng.integers(0, 1 << 16, rows * columns).astype(np.uint16)
    if load is load_wider:
        old = (old & 0x7F7F).astype(np.uint16)  # what converts to fp32 and back; a NaN's payload is the processor's affair
    old[old == MARKER] = 0
    new = old.copy()
    places = np.flatnonzero(rng.random(old.size) < share)
    new[places] = SPECIAL_BITS[:1] if load is load_wider else rng.choice([*SPECIAL_BITS, 0x3F80, 0xC2A1], places.size)
    staged = np.full(old.size, MARKER, np.uint16)
    changed = np.flatnonzero(new != old)
    staged[changed] = new[changed]

    def tensor(bits: Any) -> torch.Tensor:
        return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).reshape(rows, columns)

    target = parameter(*LOADERS[load], torch.float32 if load is load_wider else torch.bfloat16)
    load(target, tensor(old))
    dense = target.clone()
    load(dense, tensor(new))
    with _SkipMarked():
        load(target, tensor(staged))
    assert same_patterns(target, dense)


# --- patches


def staged(folder: Path, tensors: Weights, changed: Mapping[str, Any]) -> StagedWeights:
    return StagedWeights(version_of(tensors, 3), tensors, folder / "shadow.safetensors", changed)


def read_patch(path: Path) -> tuple[dict[str, Any], list[str]]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["whole"].split()  # noqa: SIM118


def test_a_patch_has_positions_and_new_bits_of_what_changed(tmp_path: Path) -> None:
    weights = {name: Tensor("BF16", (2, 50), np.arange(100, dtype=np.uint16)) for name in ("a", "b", "c")}
    positions = np.array([3, 50, 99])
    parts, whole = read_patch(write_patch(staged(tmp_path, weights, {"a": positions, "b": None, "c": positions[:0]})))
    assert set(parts) == {"a" + POSITIONS, "a" + BITS}
    assert parts["a" + POSITIONS].tolist() == parts["a" + BITS].tolist() == [3, 50, 99]
    assert whole == ["b"]


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_tensors_of_another_dtype_go_whole(dtype: str, tmp_path: Path) -> None:
    weights = {"a": Tensor(dtype, (4,), np.zeros(4, np.uint32 if dtype == "F32" else np.uint16))}
    assert read_patch(write_patch(staged(tmp_path, weights, {"a": np.array([1])}))) == ({}, ["a"])


def test_a_tensor_that_takes_the_markers_value_goes_whole(tmp_path: Path) -> None:
    bits = np.arange(100, dtype=np.uint16)
    bits[[7, 50]] = MARKER
    weights = {"a": Tensor("BF16", (100,), bits), "b": Tensor("BF16", (100,), bits)}
    # In "b" the marker stands where nothing changes, and does no harm.
    parts, whole = read_patch(write_patch(staged(tmp_path, weights, {"a": np.array([6, 7]), "b": np.array([6, 8])})))
    assert whole == ["a"]
    assert parts["b" + BITS].tolist() == [6, 8]
