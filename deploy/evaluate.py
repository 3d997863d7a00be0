"""`eval`: the held-out reward of a checkpoint or of any policy folder, on a run's task."""

from __future__ import annotations

from pathlib import Path

from deploy.rundir import RunDirectory
from deploy.wiring import stop_ids
from protocol.errors import CheckpointError


def evaluate_policy(run: RunDirectory, policy: Path | None, num_prompts: int | None, num_shown: int) -> list[str]:
    """Lines that say the held-out reward, and `num_shown` prompts with their greedy completions. Raises CheckpointError, ConfigError."""
    import torch
    from transformers import AutoTokenizer

    from learner.checkpoint import list_checkpoints
    from learner.evaluate import evaluate, greedy
    from learner.model import load_model
    from learner.ranks import OneRank
    from tasks.registry import load_task
    from tasks.scoring import score

    config = run.config()
    if policy is None:
        found = list_checkpoints(run.checkpoints)
        if not found:
            raise CheckpointError(f"run {run.path} has no checkpoint yet. Wait for one, or give --policy FOLDER.")
        policy = found[-1] / "policy"
    if not (policy / "config.json").exists():
        raise CheckpointError(f"{policy} has no config.json. Give a Hugging Face model folder, or a checkpoint's policy/ folder.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(policy, device), AutoTokenizer.from_pretrained(policy)
    task = load_task(config.task.name, config.task.options)
    ends = stop_ids(policy, tokenizer)
    wanted = config.learner.eval_prompts if num_prompts is None else num_prompts
    reward, count = evaluate(
        model,
        tokenizer,
        task,
        wanted,
        config.rollout.max_tokens,
        ends,
        OneRank(),
    )
    lines = [f"{policy}: held-out reward {reward:.4f} over {count} prompts"]
    problems = [task.heldout(index) for index in range(min(num_shown, task.num_heldout))]
    if problems:
        texts = greedy(model, tokenizer, problems, config.rollout.max_tokens, ends)
        lines += [
            f"  {score(task, problem, text):.2f}  {problem.prompt!r} -> {text!r}" for problem, text in zip(problems, texts, strict=True)
        ]
    return lines
