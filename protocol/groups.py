"""Rollout groups: one prompt, G completions, and for every token its id, behaviour log-probability and policy version.

A group is whole or it does not exist: `decode_group` refuses anything that contradicts itself, so whoever holds a `Group` may rely on it.
On the wire arrays are raw little-endian bytes (50 times cheaper to decode than lists).
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from protocol.errors import InvalidGroup

MAX_GROUP_BYTES: Final = 64 << 20
MAX_COMPLETIONS: Final = 4096
STOPPED: Final = 0
"""Finish reason: the completion ended with an end token."""
FULL: Final = 1
"""Finish reason: the completion used up its token budget."""

_Bytes = Annotated[bytes, Meta(max_length=MAX_GROUP_BYTES)]
_Name = Annotated[str, Meta(max_length=256)]


class GroupWire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of a SubmitGroup message. Lengths: G completions of T_i tokens, T tokens in all."""

    ticket: int
    prompt: int
    seed: int
    actor: _Name
    engine: _Name
    prompt_ids: _Bytes
    """int32[prompt length]"""
    num_tokens: _Bytes
    """int32[G], the T_i"""
    token_ids: _Bytes
    """int32[T]"""
    logprobs: _Bytes
    """float32[T], behaviour log-probability (nats) of each sampled token under the distribution it was drawn from"""
    versions: _Bytes
    """int32[T], number of the policy version each token was sampled from"""
    rewards: _Bytes
    """float32[G]"""
    finish: _Bytes
    """uint8[G], STOPPED or FULL"""


class Group(msgspec.Struct, frozen=True, eq=False):
    """A validated rollout group; arrays as in `GroupWire`."""

    ticket: int
    prompt: int
    seed: int
    actor: str
    engine: str
    prompt_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    rewards: NDArray[np.float32]
    finish: NDArray[np.uint8]

    @property
    def oldest_version(self) -> int:
        """The number of the oldest version any token was sampled from; the group's lag is counted from it."""
        return int(self.versions.min())

    @property
    def newest_version(self) -> int:
        """The number of the newest version any token was sampled from."""
        return int(self.versions.max())

    def completions(self) -> list[slice]:
        """For each completion, its slice of the per-token arrays."""
        ends = np.cumsum(self.num_tokens)
        return [slice(int(end - count), int(end)) for end, count in zip(ends, self.num_tokens, strict=True)]


_ARRAYS: Final[dict[str, np.dtype[Any]]] = {
    "prompt_ids": np.dtype("<i4"),
    "num_tokens": np.dtype("<i4"),
    "token_ids": np.dtype("<i4"),
    "logprobs": np.dtype("<f4"),
    "versions": np.dtype("<i4"),
    "rewards": np.dtype("<f4"),
    "finish": np.dtype("u1"),
}
_decoder = msgspec.msgpack.Decoder(GroupWire)


def encode_group(group: Group) -> bytes:
    """The wire payload of a group."""
    arrays: dict[str, Any] = {name: np.ascontiguousarray(getattr(group, name), dtype).data for name, dtype in _ARRAYS.items()}
    return msgspec.msgpack.encode(
        GroupWire(ticket=group.ticket, prompt=group.prompt, seed=group.seed, actor=group.actor, engine=group.engine, **arrays)
    )


def decode_group(payload: bytes | memoryview) -> Group:
    """A validated group from its payload. Raises InvalidGroup with the reason."""
    if len(payload) > MAX_GROUP_BYTES:
        raise InvalidGroup("oversize", f"{len(payload)} bytes, the limit is {MAX_GROUP_BYTES}")
    try:
        wire = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidGroup("malformed", str(error)) from None
    arrays: dict[str, Any] = {}
    for name, dtype in _ARRAYS.items():
        data = getattr(wire, name)
        if len(data) % dtype.itemsize:
            raise InvalidGroup("lengths", f"{name} has {len(data)} bytes, not a multiple of {dtype.itemsize}")
        arrays[name] = np.frombuffer(data, dtype)
    group = Group(ticket=wire.ticket, prompt=wire.prompt, seed=wire.seed, actor=wire.actor, engine=wire.engine, **arrays)
    check_group(group)
    return group


def check_group(group: Group) -> None:
    """Raise InvalidGroup unless the group's parts agree with one another and every number is possible."""
    num_completions, total = group.num_tokens.size, group.token_ids.size
    if not 1 <= num_completions <= MAX_COMPLETIONS:
        raise InvalidGroup("lengths", f"{num_completions} completions")
    if group.rewards.size != num_completions or group.finish.size != num_completions:
        raise InvalidGroup("lengths", f"{num_completions} completions, {group.rewards.size} rewards, {group.finish.size} finishes")
    if group.num_tokens.min() < 1 or int(group.num_tokens.sum(dtype=np.int64)) != total:
        raise InvalidGroup("lengths", f"completions of {group.num_tokens.tolist()[:8]} tokens, {total} token ids")
    if group.logprobs.size != total or group.versions.size != total:
        raise InvalidGroup("lengths", f"{total} token ids, {group.logprobs.size} log-probabilities, {group.versions.size} versions")
    if group.prompt_ids.size < 1:
        raise InvalidGroup("lengths", "the prompt is empty")
    if group.token_ids.min() < 0 or group.prompt_ids.min() < 0 or group.versions.min() < 0:
        raise InvalidGroup("range", "a token id or version is negative")
    if not np.isfinite(group.logprobs).all() or group.logprobs.max() > 1e-3:
        raise InvalidGroup("logprobs", "a log-probability is not finite or is above zero")
    if not np.isfinite(group.rewards).all():
        raise InvalidGroup("rewards", f"rewards are {group.rewards.tolist()[:8]}")
    if group.finish.max() > FULL:
        raise InvalidGroup("range", "an unknown finish reason")
