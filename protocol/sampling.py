"""What a ticket draws: its prompt and its seed, as pure functions of the run's seed and the ticket's number.

Which actor serves a ticket therefore does not matter.
"""

from __future__ import annotations

from functools import lru_cache

import blake3
import numpy as np
from numpy.typing import NDArray

from protocol.keyed import KeyedPermutation

MAX_PROMPTS = 1 << 63
"""A ticket's prompt travels as a whole number of 64 bits, and the order of the prompts is one of so many at most."""
MAX_SHUFFLED = 1 << 20
"""Prompts whose order is held in memory (8 MB). A generated task may have any number of them; the order of more is computed place by place."""


def ticket_seed(run_seed: int, ticket: int) -> int:
    """A 62-bit seed for all completions of one ticket; completion i of an engine may use seed + i."""
    digest = blake3.blake3(f"ticket/{run_seed}/{ticket}".encode()).digest(length=8)
    return int.from_bytes(digest, "little") >> 2


def prompt_index(run_seed: int, ticket: int, num_prompts: int) -> int:
    """The training prompt of a ticket: each epoch of `num_prompts` tickets, MAX_PROMPTS at most, is a fresh permutation of all prompts."""
    epoch, position = divmod(ticket, num_prompts)
    return int(
        _shuffled(run_seed, epoch, num_prompts)[position] if num_prompts <= MAX_SHUFFLED else _order(run_seed, epoch, num_prompts)(position)
    )


@lru_cache(maxsize=2)
def _shuffled(run_seed: int, epoch: int, num_prompts: int) -> NDArray[np.int64]:
    key = int.from_bytes(_epoch_key(run_seed, epoch)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_prompts)


@lru_cache(maxsize=2)
def _order(run_seed: int, epoch: int, num_prompts: int) -> KeyedPermutation:
    return KeyedPermutation(num_prompts, _epoch_key(run_seed, epoch))


def _epoch_key(run_seed: int, epoch: int) -> bytes:
    return blake3.blake3(f"prompts/{run_seed}/{epoch}".encode()).digest()
