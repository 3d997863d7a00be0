"""The engine on plain transformers against slow full forward passes."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from actor.engine import Completion, GenerationRequest
from actor.transformers_engine import TransformersEngine
from protocol.errors import EngineError, RootMismatch, SlipstreamError
from protocol.groups import FULL, STOPPED

DEADLINE = 30.0
VOCABULARY = 23
CONTEXT = 128


def request(prompt: list[int] | None = None, completions: int = 3, max_tokens: int = 12, **changes: Any) -> GenerationRequest:
    plain = GenerationRequest(prompt or [1, 5, 9], completions, max_tokens, 1.0, 7, (2,))
    return plain._replace(**changes)


@asynccontextmanager
async def running_engine(folder: Path, model: Any, groups_per_forward: int = 1) -> AsyncIterator[TransformersEngine]:
    """An engine built from the model's configuration; it has no weights yet."""
    model.config.save_pretrained(folder)
    engine = TransformersEngine(folder, "cpu", 1, groups_per_forward)
    try:
        yield engine
    finally:
        await engine.close()


def slow_logprobs(model: Any, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    """Log-probability of every token, each by a full forward pass in fp32 of all tokens before it: no cache, no padding."""
    found = []
    with torch.no_grad():
        for count, token in enumerate(tokens):
            logits = model(input_ids=torch.tensor([[*prompt, *tokens[:count]]]), use_cache=False).logits[0, -1]
            found.append(torch.log_softmax(logits.float() / temperature, dim=-1)[token].item())
    return found


def assert_matches(completion: Completion, model: Any, asked: GenerationRequest) -> None:
    expected = slow_logprobs(model, asked.prompt_ids, completion.token_ids.tolist(), asked.temperature)
    assert completion.logprobs.tolist() == pytest.approx(expected, abs=2e-5, rel=1e-5)


def same_bits(some: list[Completion], others: list[Completion]) -> bool:
    return all(
        a.finish == b.finish and all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        for a, b in zip(some, others, strict=True)
    )


@contextmanager
def pause_at_forward(number: int) -> Iterator[tuple[asyncio.Event, threading.Event]]:
    """Stops whichever model runs its `number`-th forward pass from now on until the second event is set; the first says that it stands."""
    loop = asyncio.get_running_loop()
    standing, go_on = asyncio.Event(), threading.Event()
    calls = 0

    def hook(module: Any, arguments: Any, output: Any) -> None:
        nonlocal calls
        if not isinstance(module, PreTrainedModel) or not hasattr(module, "lm_head"):
            return
        calls += 1
        if calls == number:
            loop.call_soon_threadsafe(standing.set)
            assert go_on.wait(DEADLINE)

    handle = register_module_forward_hook(hook)
    try:
        yield standing, go_on
    finally:
        go_on.set()
        handle.remove()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_log_probabilities_are_those_of_a_full_forward_pass(
    kind: str, temperature: float, tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy(kind=kind)
    weights = bits_of(model)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 4))
        asked = request(temperature=temperature, completions=5)
        completions = await engine.generate(asked)
        assert len(completions) == 5
        for completion in completions:
            assert_matches(completion, model, asked)
            assert set(completion.versions.tolist()) == {4}
            assert completion.logprobs.size == completion.token_ids.size == completion.versions.size
        assert engine.num_tokens == sum(completion.token_ids.size for completion in completions)
        assert engine.busy_seconds > 0


async def test_a_seed_decides_everything_and_other_seeds_differ(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    model = make_policy()
    weights = bits_of(model)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        first = await engine.generate(request(seed=3))
        assert same_bits(first, await engine.generate(request(seed=3)))
        others = [await engine.generate(request(seed=seed)) for seed in (0, 1, 2)]
        texts = {tuple(tuple(c.token_ids.tolist()) for c in group) for group in [first, *others]}
        assert len(texts) == 4
        # The completions of one group differ as well.
        assert len({tuple(c.token_ids.tolist()) for c in first}) > 1


async def test_all_62_bits_of_a_seed_count(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    """Ticket seeds have 62 bits, so that tickets practically never share one."""
    model = make_policy()
    weights = bits_of(model)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        groups = [await engine.generate(request(seed=5 + high)) for high in (0, 1 << 33, 1 << 61)]
    assert len({tuple(tuple(c.token_ids.tolist()) for c in group) for group in groups}) == 3


async def test_a_second_engine_gives_the_same_group_bit_for_bit(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    model = make_policy()
    weights = bits_of(model)
    groups = []
    for name in ("a", "b"):
        async with running_engine(tmp_path / name, model) as engine:
            await engine.update(stage(weights, 0))
            groups.append(await engine.generate(request()))
    assert same_bits(*groups)


async def test_with_one_group_a_forward_a_group_does_not_depend_on_what_else_is_asked_for(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy()
    weights = bits_of(model)
    asked = [request([1, 3 + i, *range(4, 4 + 2 * i)], 2 + i, 8 + i, seed=i) for i in range(4)]
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        alone = [await engine.generate(one) for one in asked]
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            together = await asyncio.gather(*(engine.generate(asked[i]) for i in order))
            for i, group in zip(order, together, strict=True):
                assert same_bits(group, alone[i])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_with_four_groups_a_forward_log_probabilities_are_still_those_of_each_prompt_alone(
    kind: str, tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy(kind=kind)
    weights = bits_of(model)
    asked = [
        request([1], 3, 9, seed=0),
        request([1, *range(3, 15)], 2, 4, seed=1, temperature=0.7),
        request([1, 4, 4, 4], 4, 12, seed=2),
        request([8, 9], 2, 12, seed=3, stop_ids=(2, 5, 6)),
        request([8, 9, 10], 2, 3, seed=4),
    ]
    async with running_engine(tmp_path, model, groups_per_forward=4) as engine:
        await engine.update(stage(weights, 0))
        groups = await asyncio.gather(*(engine.generate(one) for one in asked))
        assert engine.num_tokens == sum(completion.token_ids.size for group in groups for completion in group)
    for one, group in zip(asked, groups, strict=True):
        assert len(group) == one.num_completions
        for completion in group:
            assert_matches(completion, model, one)
            assert_ends_well(completion, one)


def assert_ends_well(completion: Completion, asked: GenerationRequest) -> None:
    tokens = completion.token_ids.tolist()
    assert 1 <= len(tokens) <= asked.max_tokens
    assert not set(tokens[:-1]) & set(asked.stop_ids)
    if tokens[-1] in asked.stop_ids:
        assert completion.finish == STOPPED
    else:
        assert completion.finish == FULL
        assert len(tokens) == asked.max_tokens


async def test_a_completion_stops_at_a_stop_token_or_uses_its_whole_budget(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy()
    weights = bits_of(model)
    seen = Counter()
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        for seed in range(6):
            asked = request(completions=8, max_tokens=6, seed=seed, stop_ids=(2, 11, 12))
            for completion in await engine.generate(asked):
                assert_ends_well(completion, asked)
                seen[completion.finish] += 1
        never = request(max_tokens=6, stop_ids=())
        assert [(c.finish, c.token_ids.size) for c in await engine.generate(never)] == [(FULL, 6)] * 3
        always = request(max_tokens=6, stop_ids=tuple(range(VOCABULARY)))
        assert [(c.finish, c.token_ids.size) for c in await engine.generate(always)] == [(STOPPED, 1)] * 3
    assert seen[FULL] and seen[STOPPED]


# --- updates


async def test_an_update_in_mid_generation_counts_from_the_next_token_on(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    models = {3: make_policy(0), 4: make_policy(1)}
    weights = {number: bits_of(model) for number, model in models.items()}
    asked = request(completions=3, max_tokens=64, stop_ids=())
    async with running_engine(tmp_path, models[3]) as engine:
        await engine.update(stage(weights[3], 3))
        with pause_at_forward(20) as (standing, go_on):
            generation = asyncio.create_task(engine.generate(asked))
            async with asyncio.timeout(DEADLINE):
                await standing.wait()
                update = asyncio.create_task(engine.update(stage(weights[4], 4)))
                # Callbacks run in order: the update has been handed to the engine when the engine goes on.
                asyncio.get_running_loop().call_soon(go_on.set)
                await update
                assert not generation.done()
                completions = await generation
    for completion in completions:
        # The 20th forward pass had begun under version 3 and gives the 20th token.
        assert completion.versions.tolist() == [3] * 20 + [4] * 44
        tokens = completion.token_ids.tolist()
        slow = {number: slow_logprobs(model, asked.prompt_ids, tokens, 1.0) for number, model in models.items()}
        expected = [slow[number][t] for t, number in enumerate(completion.versions.tolist())]
        assert completion.logprobs.tolist() == pytest.approx(expected, abs=2e-5, rel=1e-5)
        others = [slow[7 - number][t] for t, number in enumerate(completion.versions.tolist())]
        assert max(abs(a - b) for a, b in zip(expected, others, strict=True)) > 0.1


async def test_an_update_in_mid_generation_is_exact_for_prompts_of_different_lengths(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    models = {0: make_policy(0), 1: make_policy(1)}
    weights = {number: bits_of(model) for number, model in models.items()}
    asked = [request([1], 2, 20, stop_ids=()), request([1, *range(3, 12)], 2, 14, stop_ids=(), seed=5)]
    async with running_engine(tmp_path, models[0], groups_per_forward=2) as engine:
        await engine.update(stage(weights[0], 0))
        # The first request finds the engine idle and runs alone, for one forward pass; the other two run side by side after it.
        asked.insert(0, request(max_tokens=1))
        with pause_at_forward(7) as (standing, go_on):
            generations = [asyncio.create_task(engine.generate(one)) for one in asked]
            async with asyncio.timeout(DEADLINE):
                await standing.wait()
                update = asyncio.create_task(engine.update(stage(weights[1], 1)))
                asyncio.get_running_loop().call_soon(go_on.set)
                await update
                groups = [await generation for generation in generations]
    for one, group in list(zip(asked, groups, strict=True))[1:]:
        for completion in group:
            versions = completion.versions.tolist()
            assert versions == sorted(versions)
            assert set(versions) == {0, 1}
            slow = {n: slow_logprobs(model, one.prompt_ids, completion.token_ids.tolist(), 1.0) for n, model in models.items()}
            expected = [slow[number][t] for t, number in enumerate(versions)]
            assert completion.logprobs.tolist() == pytest.approx(expected, abs=2e-5, rel=1e-5)


async def test_weights_may_be_staged_over_once_an_update_has_returned(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    """The next version is staged in place while the engine generates: what it reads must be its own copy by then."""
    models = {0: make_policy(0), 1: make_policy(1)}
    staged = stage(bits_of(models[0]), 0)
    asked = request(max_tokens=30, stop_ids=())
    async with running_engine(tmp_path, models[0]) as engine:
        await engine.update(staged)
        with pause_at_forward(10) as (standing, go_on):
            generation = asyncio.create_task(engine.generate(asked))
            async with asyncio.timeout(DEADLINE):
                await standing.wait()
                for name, tensor in bits_of(models[1]).items():
                    staged.weights[name].bits[:] = tensor.bits
                go_on.set()
                completions = await generation
    for completion in completions:
        assert set(completion.versions.tolist()) == {0}
        assert_matches(completion, models[0], asked)


async def test_nothing_is_generated_before_the_first_update(tmp_path: Path, make_policy: Any) -> None:
    async with running_engine(tmp_path, make_policy()) as engine:
        with pytest.raises(EngineError):
            await engine.generate(request())
        assert engine.num_tokens == 0


async def test_after_an_update_with_a_wrong_root_nothing_is_generated_until_a_good_one(
    tmp_path: Path, make_policy: Any, bits_of: Any, version_of: Any, stage: Any
) -> None:
    model, other = make_policy(0), make_policy(1)
    weights, other_weights = bits_of(model), bits_of(other)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        before = await engine.generate(request())
        with pytest.raises(RootMismatch):
            await engine.update(stage(other_weights, 1, version_of(weights, 1)))
        with pytest.raises(EngineError):
            await engine.generate(request())
        await engine.update(stage(weights, 2))
        after = await engine.generate(request())
    assert [c.token_ids.tolist() for c in after] == [c.token_ids.tolist() for c in before]
    assert {number for c in after for number in c.versions.tolist()} == {2}


async def test_a_wrong_root_in_mid_generation_ends_that_generation(
    tmp_path: Path, make_policy: Any, bits_of: Any, version_of: Any, stage: Any
) -> None:
    model = make_policy()
    weights = bits_of(model)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        with pause_at_forward(5) as (standing, go_on):
            generation = asyncio.create_task(engine.generate(request(max_tokens=40, stop_ids=())))
            async with asyncio.timeout(DEADLINE):
                await standing.wait()
                update = asyncio.create_task(engine.update(stage(weights, 1, version_of(bits_of(make_policy(1)), 1))))
                asyncio.get_running_loop().call_soon(go_on.set)
                with pytest.raises(RootMismatch):
                    await update
                with pytest.raises(EngineError):
                    await generation


def without_one(weights: Any) -> Any:
    return dict(list(weights.items())[1:])


def with_one_more(weights: Any) -> Any:
    return weights | {"model.unheard_of.weight": next(iter(weights.values()))}


def with_another_shape(weights: Any) -> Any:
    name, tensor = next(iter(weights.items()))
    return weights | {name: tensor._replace(shape=(tensor.shape[0] // 1, tensor.shape[1] // 2), bits=tensor.bits[: tensor.bits.size // 2])}


@pytest.mark.parametrize("change", [without_one, with_one_more, with_another_shape])
async def test_weights_that_do_not_fit_the_model_are_refused_and_nothing_is_generated_from_them(
    change: Callable[[Any], Any], tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy()
    weights = bits_of(model)
    wrong = change(weights)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        with pytest.raises(SlipstreamError):
            async with asyncio.timeout(3):
                await engine.update(stage(wrong, 1))
        with pytest.raises(EngineError):
            await engine.generate(request())
        await engine.update(stage(weights, 2))
        assert len(await engine.generate(request())) == 3


async def test_an_update_that_is_overtaken_by_a_newer_one_does_not_wait_for_ever(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model, other = make_policy(0), make_policy(1)
    weights, newer = bits_of(model), bits_of(other)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        with pause_at_forward(2) as (standing, go_on):
            generation = asyncio.create_task(engine.generate(request(max_tokens=6, stop_ids=())))
            async with asyncio.timeout(3):
                await standing.wait()
                updates = [
                    asyncio.create_task(engine.update(stage(weights, 1))),
                    asyncio.create_task(engine.update(stage(newer, 2))),
                ]
                asyncio.get_running_loop().call_soon(go_on.set)
                await asyncio.wait(updates)
                (completions, *_) = await generation
        assert completions.versions.tolist()[-1] == 2


# --- requests


async def test_a_prompt_and_budget_beyond_the_context_are_refused(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    model = make_policy()
    weights = bits_of(model)
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        with pytest.raises(EngineError, match=str(CONTEXT)):
            await engine.generate(request([1] * 60, max_tokens=CONTEXT - 59))
        assert len(await engine.generate(request([1] * (CONTEXT - 3), max_tokens=3))) == 3


async def test_a_group_at_the_end_of_its_context_shares_a_forward_with_a_longer_budget(
    tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    """GPT-2's learned positions end at the context: a row that has used up its budget must not be fed beyond it."""
    model = make_policy(kind="gpt2", context=24)
    weights = bits_of(model)
    # The first request finds the engine idle and runs alone; the other two run side by side after it.
    asked = [request([1], max_tokens=1), request([1] * 22, 2, 2, stop_ids=()), request([1, 5], 2, 20, stop_ids=())]
    async with running_engine(tmp_path, model, groups_per_forward=2) as engine:
        await engine.update(stage(weights, 0))
        groups = await asyncio.gather(*(engine.generate(one) for one in asked))
    for one, group in zip(asked, groups, strict=True):
        for completion in group:
            assert_matches(completion, model, one)


async def test_a_cancelled_request_does_not_take_an_equal_one_with_it(tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any) -> None:
    model = make_policy()
    weights = bits_of(model)
    async with running_engine(tmp_path, model, groups_per_forward=1) as engine:
        await engine.update(stage(weights, 0))
        with pause_at_forward(2) as (standing, go_on):
            running = asyncio.create_task(engine.generate(request(seed=1)))
            async with asyncio.timeout(DEADLINE):
                await standing.wait()
                equal = [asyncio.create_task(engine.generate(request(seed=2))) for _ in range(2)]
                asyncio.get_running_loop().call_soon(equal[1].cancel)
                with pytest.raises(asyncio.CancelledError):
                    await equal[1]
                go_on.set()
                await running
                survivor = await equal[0]
        assert same_bits(survivor, await engine.generate(request(seed=2)))


# --- the distribution


def chi_square_limit(freedom: int) -> float:
    """The 1 - 1e-4 quantile by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
async def test_tokens_are_sampled_with_their_probabilities(
    temperature: float, tmp_path: Path, make_policy: Any, bits_of: Any, stage: Any
) -> None:
    model = make_policy()
    weights = bits_of(model)
    counts: Counter[int] = Counter()
    firsts: Counter[int] = Counter()
    num_seeds, completions = 400, 10
    async with running_engine(tmp_path, model) as engine:
        await engine.update(stage(weights, 0))
        for seed in range(num_seeds):
            group = await engine.generate(request(completions=completions, max_tokens=1, temperature=temperature, seed=seed))
            counts.update(int(completion.token_ids[0]) for completion in group)
            firsts[int(group[0].token_ids[0])] += 1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 5, 9]])).logits[0, -1].double() / temperature
    probabilities = torch.softmax(logits, dim=-1).tolist()
    # Over all samples, and over the first of each group: seeds that follow one another must be independent as well.
    for observed, total in ((counts, num_seeds * completions), (firsts, num_seeds)):
        likely = [token for token in range(VOCABULARY) if probabilities[token] * total >= 5]
        rest = 1 - sum(probabilities[token] for token in likely)
        statistic = sum((observed[token] - total * probabilities[token]) ** 2 / (total * probabilities[token]) for token in likely)
        if rest * total >= 5:
            seen = total - sum(observed[token] for token in likely)
            statistic += (seen - rest * total) ** 2 / (rest * total)
        assert len(likely) >= 5
        assert statistic < chi_square_limit(len(likely))
