"""Held-out reward: greedy completions of held-out prompts, scored by the task, shared over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from learner.ranks import Ranks
from protocol.errors import TaskError
from tasks.base import Problem, Task
from tasks.prompts import encode_prompt
from tasks.scoring import score

log = logging.getLogger("learner")
ROWS_PER_PASS = 64


def evaluate(
    model: Any, tokenizer: Any, task: Task, num_prompts: int, max_tokens: int, stop_ids: Sequence[int], ranks: Ranks
) -> tuple[float, int]:
    """Mean reward over the first `num_prompts` held-out problems (fewer if the task has fewer), and how many were scored.

    A problem whose reward fails is left out and named in the log: it says something about the task, not about the policy.
    """
    count = min(num_prompts, task.num_heldout)
    mine = [task.heldout(index) for index in range(ranks.rank, count, ranks.world_size)]
    sums = torch.zeros(2, dtype=torch.float64)
    for begin in range(0, len(mine), ROWS_PER_PASS):
        problems = mine[begin : begin + ROWS_PER_PASS]
        texts = greedy(model, tokenizer, problems, max_tokens, stop_ids)
        rewards = [reward for problem, text in zip(problems, texts, strict=True) if (reward := _score(task, problem, text)) is not None]
        sums += torch.tensor([sum(rewards), len(rewards)], dtype=torch.float64)
    summed = sums.to(model.device)
    ranks.sum_(summed)
    total, num_scored = summed.tolist()
    return total / max(num_scored, 1), int(num_scored)


def _score(task: Task, problem: Problem, text: str) -> float | None:
    try:
        return score(task, problem, text)
    except TaskError as error:
        log.warning("held-out problem %d is left out: %s", problem.index, error)
        return None


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, problems: list[Problem], max_tokens: int, stop_ids: Sequence[int]) -> list[str]:
    """The most likely completion of each problem's prompt, as text without special tokens."""
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], use_cache=True
    )
    shipped = model.generation_config
    # generate() fills what is unset from the policy's own settings (a repetition penalty, say), which actors do not apply.
    model.generation_config = settings
    try:
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:]
    finally:
        model.generation_config = shipped
    return [tokenizer.decode(_until_stop(row.tolist(), stop_ids), skip_special_tokens=True) for row in output]


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:index]
    return tokens
