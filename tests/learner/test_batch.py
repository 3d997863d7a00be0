"""From groups to microbatches, and from microbatches to log-probabilities, against sequences that run alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from learner.batch import Batch, Sequence, collate, make_batch, plan_microbatches
from learner.model import completion_logprobs
from protocol.config import LossConfig
from protocol.errors import InvalidGroup, StaleGroup
from protocol.groups import FULL, STOPPED, Group, encode_group
from protocol.ports import ReceivedBatch

CPU = torch.device("cpu")
VOCABULARY = 29

plans = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 5))


def make_group(ticket: int, versions: list[list[int]], rewards: list[float], finish: list[int] | None = None) -> Group:
    """A group with one completion for each list of token versions."""
    rng = np.random.default_rng(ticket)
    total = sum(len(row) for row in versions)
    return Group(
        ticket=ticket,
        prompt=7,
        seed=11,
        actor="a",
        engine="e",
        prompt_ids=np.array([3 + ticket, 4], np.int32),
        num_tokens=np.array([len(row) for row in versions], np.int32),
        token_ids=rng.integers(3, VOCABULARY, total).astype(np.int32),
        logprobs=-rng.random(total).astype(np.float32),
        versions=np.concatenate([np.array(row, np.int32) for row in versions]),
        rewards=np.array(rewards, np.float32),
        finish=np.array(finish or [STOPPED] * len(versions), np.uint8),
    )


def received(groups: list[Group], version_steps: dict[int, int], number: int = 5) -> ReceivedBatch:
    return ReceivedBatch(number, [encode_group(group) for group in groups], version_steps)


# --- make_batch


def test_every_completion_becomes_a_sequence_behind_its_prompt() -> None:
    groups = [make_group(8, [[0], [0, 0, 0]], [1.0, 0.0]), make_group(9, [[0, 0], [0]], [0.0, 0.5])]
    batch = make_batch(received(groups, {0: 0}), LossConfig(advantage="mean"))
    assert batch.number == 5
    assert batch.tickets == [8, 9]
    assert batch.num_tokens == 7
    expected = [(groups[0], 0, 1), (groups[0], 1, 4), (groups[1], 0, 2), (groups[1], 2, 3)]
    for sequence, (group, begin, end) in zip(batch.sequences, expected, strict=True):
        assert sequence.prompt_ids.tolist() == group.prompt_ids.tolist()
        assert sequence.token_ids.tolist() == group.token_ids[begin:end].tolist()
        assert sequence.behaviour.tolist() == group.logprobs[begin:end].tolist()
        assert sequence.length == 2 + end - begin
    assert [sequence.advantage for sequence in batch.sequences] == [0.5, -0.5, -0.25, 0.25]


def test_equal_rewards_that_are_no_binary_fractions_give_advantages_of_exactly_zero() -> None:
    groups = [make_group(0, [[0], [0], [0]], [0.1, 0.1, 0.1]), make_group(1, [[0], [0], [0]], [0.1, 0.2, 0.3])]
    for kind in ("z-score", "mean", "leave-one-out"):
        batch = make_batch(received(groups, {0: 0}), LossConfig(advantage=kind))
        assert [sequence.advantage for sequence in batch.sequences[:3]] == [0.0, 0.0, 0.0]
        assert batch.facts["zero_advantage_share"] == 0.5


def test_the_facts_of_a_batch_are_counted_over_its_completions() -> None:
    groups = [
        make_group(0, [[0], [0, 1, 1]], [1.0, 0.0], [STOPPED, FULL]),
        make_group(1, [[1, 1], [1, 1]], [0.0, 0.0], [FULL, FULL]),
    ]
    facts = make_batch(received(groups, {0: 0, 1: 1}), LossConfig()).facts
    assert facts == pytest.approx(
        {
            "reward": 0.25,
            "reward_std": math.sqrt(3) / 4,
            "zero_advantage_share": 0.5,
            "completion_length": 2.0,
            "full_budget_share": 0.75,
            "num_mixed_version_groups": 1.0,
        }
    )


def test_a_group_that_contradicts_itself_is_refused() -> None:
    group = make_group(0, [[0], [0]], [1.0, math.nan])
    with pytest.raises(InvalidGroup):
        make_batch(received([group], {0: 0}), LossConfig())


# --- lags


def test_the_lag_of_a_group_is_counted_from_its_oldest_token() -> None:
    steps = {4: 10, 5: 12, 6: 14}
    groups = [
        make_group(0, [[6, 6], [5, 6]], [0.0, 1.0]),
        make_group(1, [[6], [6]], [0.0, 1.0]),
        make_group(2, [[6, 4, 5], [5]], [0.0, 1.0]),
    ]
    batch = make_batch(received(groups, steps), LossConfig())
    assert batch.oldest_steps == [12, 14, 10]
    assert batch.lags(14, 4) == [2, 0, 4]


def test_the_oldest_version_is_the_one_of_the_smallest_step_not_of_the_smallest_number() -> None:
    # After a resume a version of a later number can be of an earlier step.
    group = make_group(0, [[8, 9], [8]], [0.0, 1.0])
    batch = make_batch(received([group], {8: 20, 9: 16}), LossConfig())
    assert batch.lags(20, 4) == [4]


def test_a_group_above_the_bound_is_stale() -> None:
    batch = make_batch(received([make_group(3, [[1], [1]], [0.0, 1.0]), make_group(4, [[0], [1]], [0.0, 1.0])], {0: 6, 1: 8}), LossConfig())
    assert batch.lags(9, 3) == [1, 3]
    with pytest.raises(StaleGroup) as caught:
        batch.lags(10, 3)
    assert (caught.value.ticket, caught.value.step, caught.value.lag, caught.value.max_lag) == (4, 10, 4, 3)


def test_a_group_from_the_future_is_refused_as_well() -> None:
    batch = Batch(0, [], [3], [8], {})
    with pytest.raises(StaleGroup):
        batch.lags(7, 3)


# --- plan_microbatches


@given(plan=plans)
def test_every_sequence_is_in_exactly_one_microbatch_of_one_rank(plan: tuple[list[int], int, int]) -> None:
    lengths, tokens, world_size = plan
    found = [index for rank in range(world_size) for run in plan_microbatches(lengths, tokens, rank, world_size) for index in run]
    assert sorted(found) == list(range(len(lengths)))


@given(plan=plans)
def test_a_microbatch_stays_within_the_token_budget_unless_one_sequence_exceeds_it(plan: tuple[list[int], int, int]) -> None:
    lengths, tokens, world_size = plan
    for rank in range(world_size):
        for run in plan_microbatches(lengths, tokens, rank, world_size):
            assert len(run) == 1 or len(run) * max(lengths[index] for index in run) <= tokens


@given(plan=plans)
def test_no_rank_is_idle_while_another_has_two_microbatches(plan: tuple[list[int], int, int]) -> None:
    lengths, tokens, world_size = plan
    counts = [len(plan_microbatches(lengths, tokens, rank, world_size)) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1


@given(plan=plans)
def test_a_budget_that_holds_everything_gives_each_rank_at_most_one_microbatch(plan: tuple[list[int], int, int]) -> None:
    lengths, _, world_size = plan
    counts = [len(plan_microbatches(lengths, 50 * len(lengths), rank, world_size)) for rank in range(world_size)]
    assert max(counts) == 1


# --- collate and completion_logprobs


def make_policy(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2
            )
        ).eval()
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def ragged_sequences() -> list[Sequence]:
    rng = np.random.default_rng(3)
    shapes = [(1, 1), (5, 3), (2, 8), (7, 1), (1, 6), (4, 4)]
    return [
        Sequence(
            rng.integers(0, VOCABULARY, prompt).astype(np.int32),
            rng.integers(0, VOCABULARY, count).astype(np.int32),
            np.full(count, -1, np.float32),
            0.0,
        )
        for prompt, count in shapes
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_log_probabilities_and_entropy_are_those_of_each_sequence_run_alone(
    kind: str, temperature: float, make_llama: Any, slow_logprobs: Any
) -> None:
    model = make_llama(hidden=32) if kind == "llama" else make_policy(kind)
    sequences = ragged_sequences()
    micro = collate(sequences, CPU)
    with torch.no_grad():
        found, entropy = completion_logprobs(model, micro, temperature)
        slow = [slow_logprobs(model, sequence.prompt_ids, sequence.token_ids, temperature) for sequence in sequences]
    for row, sequence, (logprobs, _) in zip(found, sequences, slow, strict=True):
        assert row[: sequence.token_ids.size].tolist() == pytest.approx([float(x) for x in logprobs], rel=1e-4, abs=1e-5)
    assert float(entropy) == pytest.approx(sum(sum(entropies) for _, entropies in slow), rel=1e-4)


def test_log_probabilities_do_not_depend_on_what_else_is_in_the_microbatch(make_llama: Any) -> None:
    model, sequences = make_llama(hidden=32), ragged_sequences()
    with torch.no_grad():
        together, _ = completion_logprobs(model, collate(sequences, CPU), 1.0)
        for row, sequence in zip(together, sequences, strict=True):
            alone, _ = completion_logprobs(model, collate([sequence], CPU), 1.0)
            assert row[: sequence.token_ids.size].tolist() == pytest.approx(alone[0].tolist(), rel=1e-4, abs=1e-5)


def test_the_gradient_of_log_probabilities_reaches_the_weights_as_if_each_sequence_ran_alone(make_llama: Any, slow_logprobs: Any) -> None:
    model = make_llama(hidden=16)
    exact = make_llama(hidden=16).double()
    sequences = ragged_sequences()
    found, _ = completion_logprobs(model, collate(sequences, CPU), 0.8)
    micro = collate(sequences, CPU)
    (found * micro.mask).sum().backward()
    slow = torch.stack([x for s in sequences for x in slow_logprobs(exact, s.prompt_ids, s.token_ids, 0.8)[0]])
    slow.sum().backward()
    for parameter, expected in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(parameter.grad.double(), expected.grad, rtol=1e-3, atol=1e-3 * float(expected.grad.abs().max()))


def test_collated_tensors_say_which_tokens_count() -> None:
    sequences = ragged_sequences()
    micro = collate(sequences, CPU)
    assert micro.input_ids.shape == (6, 10)
    assert micro.mask.shape == (6, 8)
    assert micro.num_tokens.tolist() == [1, 3, 8, 1, 6, 4]
    for row, sequence in enumerate(sequences):
        begin, count = sequence.prompt_ids.size, sequence.token_ids.size
        assert micro.input_ids[row, : begin + count].tolist() == [*sequence.prompt_ids.tolist(), *sequence.token_ids.tolist()]
        assert micro.attention_mask[row].tolist() == [1] * (begin + count) + [0] * (10 - begin - count)
        assert micro.mask[row].tolist() == [1] * count + [0] * (8 - count)
        assert micro.targets[row, :count].tolist() == sequence.token_ids.tolist()
        # A token's logits stand one place before the token itself.
        assert [int(micro.input_ids[row, p + 1]) for p in micro.positions[row, :count]] == sequence.token_ids.tolist()
