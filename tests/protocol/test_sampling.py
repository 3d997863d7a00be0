from __future__ import annotations

import inspect
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.sampling import MAX_SHUFFLED, prompt_index, ticket_seed

ROOT = Path(__file__).resolve().parents[2]
RUN_SEEDS = st.integers(0, 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=RUN_SEEDS, num_prompts=st.integers(1, 200), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation_of_all_prompts(seed: int, num_prompts: int, epoch: int) -> None:
    first = epoch * num_prompts
    assert sorted(prompt_index(seed, ticket, num_prompts) for ticket in range(first, first + num_prompts)) == list(range(num_prompts))


def test_epochs_and_runs_have_different_orders() -> None:
    orders = {tuple(prompt_index(seed, epoch * 50 + i, 50) for i in range(50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@settings(max_examples=60, deadline=None)
@given(seed=RUN_SEEDS, tickets=st.lists(st.integers(0, 10_000), min_size=2, max_size=30), num_prompts=st.integers(1, 50))
def test_the_order_of_asking_does_not_matter(seed: int, tickets: list[int], num_prompts: int) -> None:
    forward = {ticket: prompt_index(seed, ticket, num_prompts) for ticket in tickets}
    assert forward == {ticket: prompt_index(seed, ticket, num_prompts) for ticket in reversed(tickets)}


@pytest.mark.parametrize("num_prompts", [MAX_SHUFFLED + 1, 10**10 - 256, 10**18])
def test_the_prompts_of_a_generated_task_need_no_memory_however_many_they_are(num_prompts: int) -> None:
    tracemalloc.start()
    try:
        epochs = [[prompt_index(5, epoch * num_prompts + i, num_prompts) for i in range(500)] for epoch in range(2)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert all(len(set(epoch)) == 500 and min(epoch) >= 0 and max(epoch) < num_prompts for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [prompt_index(6, i, num_prompts) for i in range(500)]


def test_the_seeds_of_tickets_and_runs_are_all_different() -> None:
    seeds = [ticket_seed(run, ticket) for run in range(50) for ticket in range(400)]
    assert len(set(seeds)) == len(seeds)
    assert len({ticket_seed(1, 11), ticket_seed(11, 1), ticket_seed(111, 0)}) == 3


@given(seed=RUN_SEEDS, ticket=st.integers(0, 2**62))
def test_a_seed_leaves_room_for_every_completion_of_a_group(seed: int, ticket: int) -> None:
    assert 0 <= ticket_seed(seed, ticket) < 2**62
    assert ticket_seed(seed, ticket) + 4096 < 2**63


def test_seeds_use_all_their_bits() -> None:
    seeds = [ticket_seed(0, ticket) for ticket in range(2000)]
    for bit in range(62):
        assert 800 < sum(seed >> bit & 1 for seed in seeds) < 1200


def test_a_seed_depends_on_the_run_seed_and_the_ticket_and_nothing_else() -> None:
    assert list(inspect.signature(ticket_seed).parameters) == ["run_seed", "ticket"]
    program = "from protocol.sampling import *; print([ticket_seed(3, n) for n in range(5)], [prompt_index(3, n, 9) for n in range(20)])"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert elsewhere == str([ticket_seed(3, n) for n in range(5)]) + " " + str([prompt_index(3, n, 9) for n in range(20)])


def test_a_recorded_run_draws_the_same_prompts_and_seeds_in_every_release() -> None:
    assert [prompt_index(7, ticket, 10) for ticket in range(10)] == GOLDEN_PROMPTS
    assert [ticket_seed(7, ticket) for ticket in range(3)] == GOLDEN_SEEDS


GOLDEN_PROMPTS = [7, 1, 8, 5, 0, 3, 6, 9, 2, 4]
GOLDEN_SEEDS = [3674833875254870276, 4491016764101055117, 3460202651468065285]
