"""Choices that a seed decides: the same on every machine and with every version of every library.

NumPy does not promise that `permutation` keeps its output between releases, and actors on different machines must
agree on what training problem 17 is, so both choices here are built on BLAKE3.
"""

from __future__ import annotations

from blake3 import blake3

MAX_SEED = 2**63 - 1

_NUM_ROUNDS = 8


def split_key(seed: int, purpose: str) -> bytes:
    """The 32-byte key that `seed` gives for one `purpose`; keys for different purposes are unrelated."""
    return blake3(str(seed).encode(), derive_key_context=f"slipstream tasks {purpose}").digest()


class KeyedPermutation:
    """A permutation of 0..size-1 chosen by a key, computed one element at a time in constant memory.

    Invariant: every index maps to a different value in 0..size-1. A balanced Feistel network permutes the smallest
    range 0..4**k-1 that holds `size` values; walking on until the value is below `size` keeps that a permutation.
    """

    def __init__(self, size: int, key: bytes) -> None:
        self.size = size
        self._key = key
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1

    def __call__(self, index: int) -> int:
        """The value at `index`, 0 <= index < size; fewer than four passes are needed on average."""
        value = self._permute(index)
        while value >= self.size:
            value = self._permute(value)
        return value

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for round_number in range(_NUM_ROUNDS):
            message = bytes([round_number]) + right.to_bytes(8, "little")
            mixed = int.from_bytes(blake3(message, key=self._key).digest(8), "little")
            left, right = right, left ^ (mixed & self._half_mask)
        return left << self._half_bits | right
