"""The first policy: its tokenizer, its training, its folder, and held-out evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.evaluate import evaluate, greedy
from learner.ranks import OneRank
from learner.supervised import character_tokenizer, train_supervised
from protocol.config import SupervisedConfig
from protocol.errors import TaskError
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.prompts import encode_prompt

CPU = torch.device("cpu")
MINUTE = {"hidden_size": 32, "layers": 1, "heads": 2, "batch_size": 64, "lr": 5e-3}


def task_texts(task: Any) -> list[str]:
    problems = [task.train(index) for index in range(task.num_train)]
    return [problem.prompt + task.solution(problem) for problem in problems]


def test_the_tokenizer_gives_back_every_text_of_the_task() -> None:
    texts = [*task_texts(Arithmetic(digits=1, operations="+-*", heldout=10)), "two  words , and\n\ta line's end.", "é中 !"]
    tokenizer = character_tokenizer(texts)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    texts = [*task_texts(Arithmetic(digits=1, heldout=10)), "a b , c.\n d"]
    tokenizer = character_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
    )
    for text in texts:
        assert loaded.encode(text, add_special_tokens=True) == tokenizer.encode(text, add_special_tokens=True)
        assert loaded.decode(loaded.encode(text, add_special_tokens=True), skip_special_tokens=True) == text


def test_a_prompt_starts_with_the_begin_token_and_is_not_closed() -> None:
    tokenizer = character_tokenizer(["1+2=3"])
    ids = encode_prompt(tokenizer, Problem(index=0, prompt="1+2=", answer="3"))
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2="


def test_a_character_the_vocabulary_does_not_have_is_one_unknown_token() -> None:
    tokenizer = character_tokenizer(["1+2=3"])
    ids = tokenizer.encode("1?2", add_special_tokens=False)
    assert len(ids) == 3
    assert ids[1] == tokenizer.unk_token_id


def test_training_reaches_a_low_target_and_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    task = Arithmetic(digits=1, heldout=40)
    config = SupervisedConfig(target_reward=0.15, max_steps=600, **MINUTE)
    reward = train_supervised(task, config, 4, seed=0, threads=1, folder=tmp_path, device=CPU)
    assert reward >= 0.15
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found, count = evaluate(model, tokenizer, task, 256, 4, [tokenizer.eos_token_id], OneRank())
    assert (found, count) == (reward, 40)
    record = json.loads((tmp_path / "supervised.json").read_text())
    assert record["heldout_reward"] == reward
    assert 0 < record["steps"] <= 600


def test_the_same_seed_trains_the_same_policy(tmp_path: Path) -> None:
    task = Arithmetic(digits=1, heldout=40)
    config = SupervisedConfig(target_reward=0.01, max_steps=600, **MINUTE)
    models = []
    for name in ("a", "b"):
        train_supervised(task, config, 4, seed=3, threads=1, folder=tmp_path / name, device=CPU)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_target_that_is_not_reached_is_a_task_error_and_leaves_no_policy(tmp_path: Path) -> None:
    config = SupervisedConfig(target_reward=1.0, max_steps=50, **MINUTE)
    with pytest.raises(TaskError, match="50 supervised steps"):
        train_supervised(Arithmetic(digits=1, heldout=40), config, 4, seed=0, threads=1, folder=tmp_path / "policy", device=CPU)
    assert not (tmp_path / "policy").exists()


def test_the_last_step_is_evaluated_even_between_two_evaluations(tmp_path: Path) -> None:
    """max_steps that are no multiple of the evaluation interval must not turn a good policy into a failure."""
    config = SupervisedConfig(target_reward=0.01, max_steps=40, **(MINUTE | {"lr": 2e-2, "batch_size": 128}))

    class Easy(Arithmetic):
        """Every answer is right."""

        def reward(self, problem: Problem, completion: str) -> float:
            return 1.0

    assert train_supervised(Easy(digits=1, heldout=40), config, 2, seed=0, threads=1, folder=tmp_path, device=CPU) == 1.0


# --- held-out evaluation


class Echo:
    """A task whose reward is 1 if the completion is the expected text."""

    def __init__(self, expected: list[str]) -> None:
        self._expected = expected
        self.num_train = self.num_heldout = len(expected)

    def heldout(self, index: int) -> Problem:
        return Problem(index=index, prompt="12345678"[: 1 + index % 5], answer=self._expected[index])

    train = heldout

    def solution(self, problem: Problem) -> str:
        return problem.answer

    def reward(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


def slow_greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int, stop: int) -> str:
    """The most likely token, one at a time, without cache or padding."""
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    begin = len(ids)
    with torch.no_grad():
        while len(ids) < begin + max_tokens:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == stop:
                break
            ids.append(token)
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True))


@pytest.fixture
def tokenizer() -> Any:
    return character_tokenizer(["0123456789+-*/= abcdefghi"])


def test_greedy_completions_are_the_most_likely_tokens_of_each_prompt_run_alone(make_llama: Any, tokenizer: Any) -> None:
    model = make_llama(hidden=32)
    problems = [Problem(index=i, prompt=prompt, answer="") for i, prompt in enumerate(["1", "12+3", "9 9 9=", "a", "bc"])]
    stop = tokenizer.eos_token_id
    expected = [slow_greedy(model, tokenizer, problem.prompt, 6, stop) for problem in problems]
    assert greedy(model, tokenizer, problems, 6, [stop]) == expected


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}])
def test_greedy_completions_do_not_depend_on_the_policys_own_generation_settings(
    setting: dict[str, Any], make_llama: Any, tokenizer: Any
) -> None:
    """Chat models ship settings such as repetition_penalty; actors sample without them, so held-out reward must be without them too."""
    model = make_llama(hidden=32)
    problems = [Problem(index=i, prompt=prompt, answer="") for i, prompt in enumerate(["1", "12+3", "9 9 9=", "a", "bc"])]
    stop = [tokenizer.eos_token_id, *range(4, 9)]
    expected = greedy(model, tokenizer, problems, 8, stop)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    assert greedy(model, tokenizer, problems, 8, stop) == expected


def test_the_held_out_reward_is_the_mean_over_as_many_problems_as_there_are(make_llama: Any, tokenizer: Any) -> None:
    model, stop = make_llama(hidden=32), tokenizer.eos_token_id
    prompts = [Echo([""] * 7).heldout(index).prompt for index in range(7)]
    truth = [slow_greedy(model, tokenizer, prompt, 5, stop) for prompt in prompts]
    expected = [text if index % 3 else "no such text" for index, text in enumerate(truth)]
    reward, count = evaluate(model, tokenizer, Echo(expected), 100, 5, [stop], OneRank())
    assert count == 7
    assert reward == pytest.approx(4 / 7)
    reward, count = evaluate(model, tokenizer, Echo(expected), 3, 5, [stop], OneRank())
    assert (count, reward) == (3, pytest.approx(2 / 3))


class ScriptedRank:
    """One of several ranks that run one after another: `others` is what the other ranks bring to a sum."""

    def __init__(self, rank: int, world_size: int, others: torch.Tensor | None) -> None:
        self.rank, self.world_size, self._others = rank, world_size, others
        self.brought: torch.Tensor | None = None

    def broadcast(self, data: bytes | None) -> bytes:
        raise AssertionError("an evaluation broadcasts nothing")

    def sum_(self, tensor: torch.Tensor) -> None:
        assert self.brought is None, "one sum is enough"
        self.brought = tensor.clone()
        if self._others is not None:
            tensor += self._others

    def barrier(self) -> None:
        raise AssertionError("an evaluation needs no barrier")


@pytest.mark.parametrize("world_size", [2, 7])
def test_ranks_share_the_held_out_problems(world_size: int, make_llama: Any, tokenizer: Any) -> None:
    model, stop = make_llama(hidden=32), tokenizer.eos_token_id
    prompts = [Echo([""] * 5).heldout(index).prompt for index in range(5)]
    truth = [slow_greedy(model, tokenizer, prompt, 5, stop) for prompt in prompts]
    task = Echo([*truth[:4], "no such text"])

    def run(rank: int, others: torch.Tensor | None) -> tuple[torch.Tensor, tuple[float, int]]:
        ranks = ScriptedRank(rank, world_size, others)
        result = evaluate(model, tokenizer, task, 5, 5, [stop], ranks)
        assert ranks.brought is not None
        return ranks.brought, result

    brought = [run(rank, None)[0] for rank in range(world_size)]
    for rank in range(world_size):
        _, (reward, count) = run(rank, sum(brought) - brought[rank])
        assert (reward, count) == (pytest.approx(0.8), 5)


def test_a_held_out_problem_whose_reward_fails_is_left_out(make_llama: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, stop = make_llama(hidden=32), tokenizer.eos_token_id

    class Failing(Echo):
        def reward(self, problem: Problem, completion: str) -> float:
            if problem.index == 2:
                raise ValueError("cannot score this")
            return float(problem.index)

    reward, count = evaluate(model, tokenizer, Failing([""] * 5), 5, 5, [stop], OneRank())
    assert (reward, count) == (pytest.approx((0 + 1 + 3 + 4) / 4), 4)
    assert "cannot score this" in caplog.text
