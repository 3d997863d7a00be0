"""From a problem to the token ids that a policy is given, and the ids at which its completion ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from protocol.errors import ConfigError, TaskError
from tasks.base import Problem


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used, so that this room needs no transformers."""

    @property
    def chat_template(self) -> Any:
        """The template of a chat model, or None."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """The conversation as text or ids, depending on `options`."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`."""
        ...


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids of the problem's prompt, ready to be continued; never empty.

    With a chat template the prompt is the user's turn and the assistant's turn is opened; without one it is plain
    text. TaskError if there are no tokens.
    """
    if tokenizer.chat_template:
        conversation = [{"role": "user", "content": problem.prompt}]
        # return_dict=False: since transformers 5 the default is a BatchEncoding instead of the ids.
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
        token_ids = [int(token) for token in encoded]
    else:
        token_ids = _without_end(list(tokenizer.encode(problem.prompt, add_special_tokens=True)), tokenizer)
    if not token_ids:
        raise TaskError(f"problem {problem.index}: the prompt {problem.prompt!r} encodes to no tokens")
    return token_ids


def end_token(tokenizer: Tokenizer, generation_config_eos: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The ids that end a completion, each once, the tokenizer's own first.

    `generation_config_eos` is `eos_token_id` of the model's generation config: chat models list more ids there than
    the tokenizer knows. ConfigError if neither names any.
    """
    from_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if generation_config_eos is None:
        from_model: Sequence[int] = []
    elif isinstance(generation_config_eos, int):
        from_model = [generation_config_eos]
    else:
        from_model = generation_config_eos
    end_ids = tuple(dict.fromkeys([*from_tokenizer, *from_model]))
    if not end_ids:
        raise ConfigError(
            "policy.path",
            getattr(tokenizer, "name_or_path", type(tokenizer).__name__),
            "neither the tokenizer nor the generation config names a token that ends a completion",
            "set eos_token in tokenizer_config.json or eos_token_id in generation_config.json next to the weights",
        )
    return end_ids


def _without_end(token_ids: list[int], tokenizer: Tokenizer) -> list[int]:
    # Some tokenizers close every text with an end token; a policy given that has nothing left to say.
    if token_ids and token_ids[-1] == tokenizer.eos_token_id:
        return token_ids[:-1]
    return token_ids
