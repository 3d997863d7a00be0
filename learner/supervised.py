"""A first policy, trained from scratch on a task's own solutions: the supervised reference policy of a run that names no policy.

The result is an ordinary Hugging Face folder. Prompts are never taken from the held-out split.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learner.evaluate import evaluate
from learner.ranks import OneRank
from protocol.config import SupervisedConfig
from protocol.errors import TaskError
from tasks.base import Task

log = logging.getLogger("prepare")
NUM_SAMPLED = 2000
"""Training problems whose characters make the vocabulary."""
EVAL_EVERY = 10
EVAL_PROMPTS = 256
OVERSHOOT = 0.05
"""A policy that is this much better than was asked for leaves too little to learn."""
PAD, BEGIN, END = "<pad>", "<s>", "</s>"


def train_supervised(
    task: Task, config: SupervisedConfig, max_tokens: int, seed: int, threads: int, folder: Path, device: torch.device
) -> float:
    """Train a small Llama on the task's solutions, on `device`, and save it in `folder`; returns its held-out reward.

    Stops at the first evaluation that reaches config.target_reward. Raises TaskError if max_steps do not get there.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = character_tokenizer(_texts(task))
    model = _small_llama(tokenizer, config, task, max_tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    reward, lr = 0.0, config.lr
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, config.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50)
        problems = [task.train(int(index)) for index in rng.integers(0, task.num_train, config.batch_size)]
        loss = _solution_loss(model, tokenizer, [(problem.prompt, task.solution(problem)) for problem in problems])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVAL_EVERY == 0 or step == config.max_steps:
            reward, _ = evaluate(model.eval(), tokenizer, task, EVAL_PROMPTS, max_tokens, [tokenizer.eos_token_id], OneRank())
            model.train()
            log.info("supervised step %d: loss %.3f, held-out reward %.3f of %.2f", step, loss.item(), reward, config.target_reward)
            if reward > config.target_reward + OVERSHOOT and lr > config.lr / 100 and step < config.max_steps:
                # Too far in one go: back to the last evaluation, and on in smaller steps.
                model.load_state_dict(before)
                lr *= 0.3
                continue
            if reward >= config.target_reward:
                break
            before = {name: value.clone() for name, value in model.state_dict().items()}
    else:
        raise TaskError(
            f"after {config.max_steps} supervised steps the held-out reward is {reward:.3f}, {config.target_reward} was asked for. "
            "Make the task easier, the model larger, or supervised.target_reward smaller."
        )
    transformers.utils.logging.disable_progress_bar()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "supervised.json").write_text(json.dumps({"steps": step, "heldout_reward": reward}))
    return reward


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character that occurs in `texts`, a begin token in front of every prompt, and an end token."""
    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: index for index, token in enumerate([PAD, BEGIN, END, "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token="<unk>")


def _texts(task: Task) -> Iterable[str]:
    for index in range(min(NUM_SAMPLED, task.num_train)):
        problem = task.train(index * task.num_train // min(NUM_SAMPLED, task.num_train))
        yield problem.prompt + task.solution(problem)


def _small_llama(tokenizer: PreTrainedTokenizerFast, config: SupervisedConfig, task: Task, max_tokens: int) -> LlamaForCausalLM:
    longest = max(len(text) for text in _texts(task)) + max_tokens + 8
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=2 * longest,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _solution_loss(model: Any, tokenizer: Any, examples: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross-entropy (nats) of the solutions' tokens, end token included, given their prompts."""
    prompts = [tokenizer.encode(prompt, add_special_tokens=True) for prompt, _ in examples]
    rows = [
        prompt + tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
        for prompt, (_, solution) in zip(prompts, examples, strict=True)
    ]
    longest = max(len(row) for row in rows)
    ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    labels = [[-100] * len(prompt) + row[len(prompt) :] + [-100] * (longest - len(row)) for prompt, row in zip(prompts, rows, strict=True)]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss: torch.Tensor = model(**{name: torch.tensor(values, device=model.device) for name, values in inputs.items()}).loss
    return loss
