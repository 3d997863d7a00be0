"""The gradient of the surrogate without a step, and the bias that it shows between policies that are the same, near and far."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from learner.advantage import advantages
from learner.batch import Batch, Sequence
from learner.probe import round_products, surrogate_gradient
from learner.ranks import OneRank
from learner.stability.bias import Bias, staleness_bias
from learner.step import Trainer
from protocol.config import Config, LearnerConfig, LossConfig, RolloutConfig
from tests.learner.conftest import VOCABULARY

NUM_ROUNDS, NUM_PROMPTS, GROUP_SIZE, LENGTH = 8, 12, 8, 5


def settings(tokens_per_microbatch: int = 8192, temperature: float = 1.0, **loss: Any) -> Config:
    return Config(
        learner=LearnerConfig(tokens_per_microbatch=tokens_per_microbatch),
        rollout=RolloutConfig(temperature=temperature),
        loss=LossConfig(**loss),
    )


def slow_value(model: Any, reference: Any, batch: Batch, config: Config, slow_logprobs: Any) -> torch.Tensor:
    """J, token by token from its formula, in float64 and with the gradient."""
    loss, total = config.loss, torch.zeros((), dtype=torch.float64)
    for sequence in batch.sequences:
        logprobs, _ = slow_logprobs(model, sequence.prompt_ids, sequence.token_ids, config.rollout.temperature)
        known, _ = slow_logprobs(reference, sequence.prompt_ids, sequence.token_ids, config.rollout.temperature)
        starts = sequence.behaviour.tolist() if loss.importance_cap is None else [float(lp.detach()) for lp in logprobs]
        gaps = [lp - start for lp, start in zip(logprobs, starts, strict=True)]
        for place, lp in enumerate(logprobs):
            ratio = torch.exp(gaps[place] if loss.ratio == "token" else sum(gaps))  # type: ignore[arg-type]
            surrogate = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * sequence.advantage
            if loss.surrogate == "min-clip":
                surrogate = torch.minimum(ratio * sequence.advantage, surrogate)
            if loss.importance_cap is not None:
                surrogate = surrogate * min(math.exp(starts[place] - float(sequence.behaviour[place])), loss.importance_cap)
            difference = known[place].detach() - lp
            share = len(batch.sequences) * len(logprobs) if loss.aggregate == "sequence" else batch.num_tokens
            total = total + (surrogate - loss.kl_coef * (difference.exp() - difference - 1)) / share
    return total


@pytest.mark.parametrize(
    "config",
    [
        settings(),
        settings(tokens_per_microbatch=24, temperature=0.7, aggregate="token"),
        settings(surrogate="clip", ratio="sequence", clip_low=0.95, clip_high=9.0),
        settings(kl_coef=0.3),
        settings(importance_cap=1.5),
    ],
    ids=["plain", "tempered, many microbatches", "the paper's", "with a reference", "with an importance cap"],
)
def test_the_gradient_is_that_of_the_objective_worked_out_token_by_token(
    config: Config, make_llama: Callable[..., Any], make_training_batch: Callable[..., Batch], slow_logprobs: Any
) -> None:
    model, other, batch = make_llama(), make_llama(seed=1), make_training_batch()
    found = surrogate_gradient(model, other if config.loss.kl_coef else None, batch, config)
    slow = copy.deepcopy(model).double()
    expected = torch.autograd.grad(slow_value(slow, copy.deepcopy(other).double(), batch, config, slow_logprobs), list(slow.parameters()))
    torch.testing.assert_close(found.double(), torch.cat([part.flatten() for part in expected]), rtol=1e-3, atol=2e-5)
    assert found.norm() > 0.01


def test_the_gradient_is_the_one_that_the_learner_steps_along_and_leaves_the_model_as_it_was(
    make_llama: Callable[..., Any], make_training_batch: Callable[..., Batch]
) -> None:
    model, batch, config = make_llama(), make_training_batch(), settings()
    before = copy.deepcopy(model.state_dict())
    found = surrogate_gradient(model, None, batch, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer = Trainer(model, None, LearnerConfig(max_grad_norm=1e9), config.loss, 10, 1.0, OneRank())
    trainer.apply(batch, 0)
    taken = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, -taken)


# --- the bias between policies


@torch.no_grad()
def draw_batch(model: Any, seed: int) -> Batch:
    """Fresh groups of a policy: prompts of one token, completions of LENGTH tokens, rewarded by the share that is even."""
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, VOCABULARY, (NUM_PROMPTS, 1), generator=rng).repeat_interleave(GROUP_SIZE, dim=0)
    ids, logprobs = prompts, []
    for _ in range(LENGTH):
        tempered = torch.log_softmax(model(input_ids=ids).logits[:, -1], dim=-1)
        chosen = torch.multinomial(tempered.exp(), 1, generator=rng)
        logprobs.append(tempered.gather(1, chosen))
        ids = torch.cat([ids, chosen], dim=1)
    tokens, behaviour = ids[:, 1:], torch.cat(logprobs, dim=1)
    rewards = (tokens % 2 == 0).double().mean(dim=1).reshape(NUM_PROMPTS, GROUP_SIZE)
    gains = advantages(rewards, "z-score").flatten()
    sequences = [
        Sequence(np.array([prompt], np.int32), row.numpy().astype(np.int32), known.numpy(), float(gain))
        for prompt, row, known, gain in zip(prompts[:, 0].tolist(), tokens, behaviour, gains, strict=True)
    ]
    return Batch(0, sequences, list(range(NUM_PROMPTS)), [0] * NUM_PROMPTS, {})


def moved(model: Any, distance: float) -> Any:
    """The model, `distance` away in a random direction."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(5)
    steps = [torch.randn(parameter.shape, generator=rng) for parameter in other.parameters()]
    scale = distance / math.sqrt(sum(float(step.square().sum()) for step in steps))
    with torch.no_grad():
        for parameter, step in zip(other.parameters(), steps, strict=True):
            parameter.add_(scale * step)
    return other


def measured(theta: Any, phi: Any, *, is_common: bool) -> Bias:
    """The bias of phi; with common randomness, theta's groups and phi's are drawn with the same seeds."""
    config = settings()

    def gradients(policy: Any, begin: int) -> list[torch.Tensor]:
        return [surrogate_gradient(theta, None, draw_batch(policy, begin + place), config) for place in range(NUM_ROUNDS)]

    return staleness_bias(round_products(gradients(theta, 0), gradients(phi, 0 if is_common else 1000)))


def test_other_groups_of_the_same_policy_show_no_bias(make_llama: Callable[..., Any]) -> None:
    theta = make_llama()
    bias = measured(theta, theta, is_common=False)
    assert not bias.is_clear
    assert bias.noise_floor > 0.03  # there was something to be mistaken for a bias
    assert bias.size.value < 2 * bias.noise_floor


def test_the_same_groups_of_the_same_policy_differ_by_nothing(make_llama: Callable[..., Any]) -> None:
    theta = make_llama()
    bias = measured(theta, moved(theta, 0.0), is_common=True)
    assert (bias.squared.value, bias.noise_floor) == (0.0, 0.0)


def test_a_policy_far_away_shows_a_clear_bias_larger_than_one_near_by_and_shrinks_the_gradient(make_llama: Callable[..., Any]) -> None:
    """Far away most ratios are clipped, and what is clipped has no gradient."""
    theta = make_llama()
    far, near = (measured(theta, moved(theta, distance), is_common=True) for distance in (6.0, 0.05))
    assert far.is_clear
    assert far.squared.low > near.squared.value
    assert far.along is not None and far.along.high < 0


def test_common_random_numbers_take_noise_out_of_the_difference(make_llama: Callable[..., Any]) -> None:
    theta = make_llama()
    phi = moved(theta, 0.05)
    assert measured(theta, phi, is_common=True).noise_floor < 0.5 * measured(theta, phi, is_common=False).noise_floor
