from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from protocol.errors import ConfigError, TaskError
from tasks.base import Problem
from tasks.prompts import encode_prompt, end_token

_EOS = 0


class Letters:
    """A tokenizer with one token per character (its code point) and 0 as the end of a text."""

    name_or_path = "models/letters"

    def __init__(self, chat_template: str | None = None, eos_token_id: int | None = _EOS, appends_eos: bool = False) -> None:
        self.chat_template = chat_template
        self.eos_token_id = eos_token_id
        self._appends_eos = appends_eos

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        assert self.chat_template is not None
        assert options["tokenize"] is True
        text = "".join(self.chat_template.format(**turn) for turn in conversation)
        token_ids = [ord(letter) for letter in text + ("<assistant>" if options["add_generation_prompt"] else "")]
        # As transformers 5 does it.
        return {"input_ids": token_ids} if options.get("return_dict", True) else token_ids

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text] + ([_EOS] if add_special_tokens and self._appends_eos else [])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token) for token in token_ids if not (skip_special_tokens and token == _EOS))


def _problem(prompt: str) -> Problem:
    return Problem(index=3, prompt=prompt, answer="")


def _text(tokenizer: Letters, prompt: str) -> str:
    token_ids = encode_prompt(tokenizer, _problem(prompt))
    assert all(type(token) is int for token in token_ids)
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def test_without_a_chat_template_the_prompt_is_encoded_as_it_is() -> None:
    assert _text(Letters(), "1+1=") == "1+1="


def test_with_a_chat_template_the_prompt_is_the_users_turn_and_the_assistants_turn_is_open() -> None:
    assert _text(Letters(chat_template="<{role}>{content}"), "1+1=") == "<user>1+1=<assistant>"


def test_an_end_token_that_the_tokenizer_appends_is_taken_off() -> None:
    assert _text(Letters(appends_eos=True), "1+1=") == "1+1="


def test_a_tokenizer_without_an_end_token_loses_no_token() -> None:
    assert _text(Letters(eos_token_id=None), "1+1=") == "1+1="


@pytest.mark.parametrize("appends_eos", [False, True])
def test_a_prompt_without_tokens_is_refused(appends_eos: bool) -> None:
    with pytest.raises(TaskError, match="problem 3: the prompt '' encodes to no tokens"):
        encode_prompt(Letters(appends_eos=appends_eos), _problem(""))


@pytest.mark.parametrize(
    ("from_tokenizer", "from_model", "expected"),
    [
        (5, None, (5,)),
        (5, 5, (5,)),
        (5, 6, (5, 6)),
        (5, [6, 5, 7], (5, 6, 7)),
        (0, None, (0,)),
        (None, 0, (0,)),
        (None, [6, 7], (6, 7)),
    ],
)
def test_end_tokens_are_those_of_the_tokenizer_and_the_model_each_once(
    from_tokenizer: int | None, from_model: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    assert end_token(Letters(eos_token_id=from_tokenizer), from_model) == expected


@pytest.mark.parametrize("from_model", [None, []])
def test_no_end_token_anywhere_names_the_policy_and_the_fix(from_model: list[int] | None) -> None:
    with pytest.raises(ConfigError) as caught:
        end_token(Letters(eos_token_id=None), from_model)
    assert caught.value.field == "policy.path"
    assert caught.value.value == "models/letters"
    assert "eos_token" in caught.value.fix
