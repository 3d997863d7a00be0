"""The seam between an actor and whatever generates its tokens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actor.shadow import StagedWeights


class GenerationRequest(NamedTuple):
    """One group: `num_completions` samples of one prompt. `stop_ids` are the tokens that end a completion."""

    prompt_ids: list[int]
    num_completions: int
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]


class Completion(NamedTuple):
    """One sample of T tokens, end token included.

    `logprobs[t]` is the log-probability (nats) of `token_ids[t]` under the tempered distribution it was drawn from; `versions[t]` is the
    number of the policy version that distribution belongs to; `finish` is groups.STOPPED or groups.FULL.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    finish: int


class Pause(NamedTuple):
    """What an update cost, in seconds: generation `stopped` for so long, `writing` of which weights were written."""

    stopped: float
    writing: float


class Engine(Protocol):
    """Generates groups from weights that are replaced while it runs. All methods belong to one event loop."""

    @property
    def name(self) -> str:
        """What it is, for the record of who made a group."""

    @property
    def num_groups_wanted(self) -> int:
        """Groups that should be in hand to keep it busy."""

    @property
    def num_tokens(self) -> int:
        """Tokens sampled so far; it moves with every token, by which an engine that hangs is told from one that is slow."""

    @property
    def busy_seconds(self) -> float:
        """Seconds spent generating so far."""

    async def update(self, staged: StagedWeights) -> Pause:
        """Sample from these weights from the next token on; they may change once this has returned.

        Raises WeightsError or EngineError, after which nothing is generated until an update of everything (`staged.whole()`) succeeds.
        """

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """The completions of one group. Raises EngineError."""

    async def close(self) -> None:
        """Release everything."""
