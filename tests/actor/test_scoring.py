"""A reward that never returns, or takes its process with it, costs a ticket and says which; the next one is scored as if nothing had happened."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actor.scoring import ScoringProcess, ScoringThread
from protocol.errors import TaskError
from tasks.registry import load_task

ROOT = Path(__file__).resolve().parent.parent.parent
TASK = "tests.actor.treacherous_task:Treacherous"


@asynccontextmanager
async def scoring(seconds: float = 60.0) -> AsyncIterator[ScoringProcess]:
    scorer = ScoringProcess([sys.executable, str(ROOT / "cli.py"), "score"], TASK, {"best": 3}, seconds)
    await scorer.start()
    try:
        yield scorer
    finally:
        await scorer.close()


async def test_a_process_gives_the_same_rewards_as_a_thread_in_order() -> None:
    texts = ["3", "33", "", "4"]
    expected = await ScoringThread(load_task(TASK, {"best": 3})).score(5, texts)
    async with scoring() as scorer:
        assert await scorer.score(5, texts) == expected == [1.0, 2.0, 0.0, 0.0]
        assert await scorer.score(6, []) == []


async def test_what_a_reward_prints_disturbs_nobody_and_what_it_raises_is_said() -> None:
    async with scoring() as scorer:
        assert await scorer.score(5, ["print 3"]) == [1.0]
        with pytest.raises(TaskError, match=r"problem 5 .*ValueError: as asked"):
            await scorer.score(5, ["3", "raise", "3"])
        with pytest.raises(TaskError, match="is nan"):
            await scorer.score(5, ["nan"])
        assert await scorer.score(5, ["33"]) == [2.0]


@pytest.mark.parametrize("text", ["loop", "arithmetic"])
async def test_a_reward_that_never_returns_is_ended_and_named(text: str) -> None:
    """Also one that holds the interpreter, where no thread could be asked to stop."""
    async with scoring(seconds=1.0) as scorer:
        with pytest.raises(TaskError, match=rf"'{text}' to problem 5 did not return within 1 s"):
            await scorer.score(5, ["3", text])
        scorer._seconds = 60.0
        assert await scorer.score(5, ["3"]) == [1.0]


async def test_a_reward_that_ends_its_process_is_named() -> None:
    async with scoring() as scorer:
        with pytest.raises(TaskError, match=r"'exit' to problem 5 ended its process \(exit code 7\)"):
            await scorer.score(5, ["exit"])
        assert await scorer.score(5, ["3"]) == [1.0]
