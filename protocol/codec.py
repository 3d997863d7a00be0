"""Frames. A message is exactly two: the header, one of the messages of its socket and direction as msgpack, and the payload.

Nothing else is accepted, and no frame, however broken, raises anything but MalformedFrame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from protocol import messages
from protocol.errors import MalformedFrame
from protocol.groups import MAX_GROUP_BYTES

MAX_HEADER_BYTES: Final = 4 << 20
MAX_PAYLOAD_BYTES: Final = MAX_GROUP_BYTES + (1 << 20)

M = TypeVar("M")
Frame = bytes | memoryview
_encoder = msgspec.msgpack.Encoder()


class MessageDecoder(Generic[M]):
    """Decodes the two frames of one socket and direction."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)

    def decode(self, frames: Sequence[Frame]) -> tuple[M, Frame]:
        """The message and its payload. Raises MalformedFrame."""
        if len(frames) != 2:
            raise MalformedFrame("frames", f"a message has two frames, this one {len(frames)}")
        header, payload = frames
        if len(header) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
            raise MalformedFrame("oversize", f"header of {len(header)} and payload of {len(payload)} bytes")
        try:
            return self._decoder.decode(header), payload
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedFrame("header", str(error)) from None


def encode(message: messages.Message, payload: Frame = b"") -> list[Frame]:
    """The two frames of a message."""
    return [_encoder.encode(message), payload]


from_actor: Final = MessageDecoder[messages.ActorMessage](messages.ActorMessage)
to_actor: Final = MessageDecoder[messages.ToActor](messages.ToActor)
from_learner: Final = MessageDecoder[messages.LearnerMessage](messages.LearnerMessage)
to_learner: Final = MessageDecoder[messages.ToLearner](messages.ToLearner)
from_blob_client: Final = MessageDecoder[messages.BlobMessage](messages.BlobMessage)
to_blob_client: Final = MessageDecoder[messages.ToBlobClient](messages.ToBlobClient)
from_control: Final = MessageDecoder[messages.ControlMessage](messages.ControlMessage)
to_control: Final = MessageDecoder[messages.FromControl](messages.FromControl)
