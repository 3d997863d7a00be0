"""Targets: what comes over the sockets. Frames of every channel and direction, and the payload of a group."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from broker.pieces import Pieces
from broker.session import ActorSession
from protocol import codec, messages
from protocol.codec import MessageDecoder, encode
from protocol.errors import IncompatiblePeer, InvalidGroup, MalformedFrame, RequestRefused
from protocol.groups import Group, check_group, decode_group, encode_group
from tests.fuzz.fuzzing import Target
from tests.fuzz.mutate import damage_bytes, damage_msgpack
from tests.fuzz.values import valid_structs


def _headers(decoder: MessageDecoder[Any], union: Any) -> list[bytes]:
    def decodes(message: Any) -> bool:
        try:
            decoder.decode(encode(message))
        except (MalformedFrame, OverflowError):
            return False
        return True

    return [encode(message)[0] for message in valid_structs(union, decodes)]


def _channel(decoder: MessageDecoder[Any], union: Any, act: Callable[[Any], None] = lambda message: None) -> Target:
    """The first two bytes of an input say how it is cut into frames; nearly always a header and a payload."""

    def seeds() -> Sequence[bytes]:
        return [b"\0\0" + header for header in _headers(decoder, union)]

    def check(data: bytes) -> None:
        count = data[0] if data[:1] and data[0] > 250 else 0
        rest = data[2:]
        frames = [rest] * (count - 250) if count else [rest, data[:1]]
        message, _ = decoder.decode([memoryview(frame) for frame in frames] if data[1:2] == b"m" else frames)
        assert isinstance(message, messages.Message)
        again, _ = decoder.decode(encode(message))
        assert repr(again) == repr(message), "a message that was accepted does not survive being passed on"
        act(message)

    def damage(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.05:
            return damage_bytes(rng, seeds)
        return rng.choice([b"\0\0", b"\0m"]) + damage_msgpack(rng, [rng.choice(seeds)[2:]])

    return Target(seeds, check, (MalformedFrame,), damage)


def _to_session(message: messages.ToActor) -> None:
    """An actor takes it in twice, as after a repetition."""
    session = ActorSession()
    session.finish(3, 1, b"")
    with contextlib.suppress(IncompatiblePeer, RequestRefused):
        for _ in range(2):
            session.receive(message)
    session.held()


def _to_pieces(message: messages.ToBlobClient) -> None:
    """A download takes it in."""
    pieces = Pieces(5 << 20)
    asked = {piece.offset: piece.length for piece in pieces.ask()}
    if isinstance(message, messages.Chunk):
        for length in (0, 1, message.size):
            assert pieces.receive(message.offset, length) <= (asked.get(message.offset) == length)
    pieces.lose()
    assert {piece.offset: piece.length for piece in pieces.ask()}.items() >= {}.items()


def _groups() -> Sequence[bytes]:
    rng = np.random.default_rng(3)
    found = []
    for lengths in ([1], [3, 1], [5, 9, 2, 7]):
        total = sum(lengths)
        found.append(
            encode_group(
                Group(
                    ticket=7,
                    prompt=3,
                    seed=1 << 61,
                    actor="actor-1",
                    engine="transformers",
                    prompt_ids=rng.integers(0, 100, 4).astype(np.int32),
                    num_tokens=np.array(lengths, np.int32),
                    token_ids=rng.integers(0, 100, total).astype(np.int32),
                    logprobs=-rng.random(total).astype(np.float32),
                    versions=rng.integers(0, 3, total).astype(np.int32),
                    rewards=rng.random(len(lengths)).astype(np.float32),
                    finish=rng.integers(0, 2, len(lengths)).astype(np.uint8),
                )
            )
        )
    return found


def _check_group(data: bytes) -> None:
    group = decode_group(data)
    check_group(group)
    slices = group.completions()
    assert slices[0].start == 0 and slices[-1].stop == group.token_ids.size and all(s.start < s.stop for s in slices)
    assert 0 <= group.oldest_version <= group.newest_version
    assert encode_group(decode_group(encode_group(group))) == encode_group(group)


def targets() -> dict[str, Target]:
    """By name."""
    return {
        "from_control": _channel(codec.from_control, messages.ControlMessage),
        "from_actor": _channel(codec.from_actor, messages.ActorMessage),
        "from_learner": _channel(codec.from_learner, messages.LearnerMessage),
        "from_blob_client": _channel(codec.from_blob_client, messages.BlobMessage),
        "to_control": _channel(codec.to_control, messages.FromControl),
        "to_actor": _channel(codec.to_actor, messages.ToActor, _to_session),
        "to_learner": _channel(codec.to_learner, messages.ToLearner),
        "to_blob_client": _channel(codec.to_blob_client, messages.ToBlobClient, _to_pieces),
        "group": Target(_groups, _check_group, (InvalidGroup,), damage_msgpack, share=2.0),
    }
