from __future__ import annotations

import contextlib
import typing
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec, messages
from protocol.codec import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MessageDecoder, encode
from protocol.errors import MalformedFrame
from protocol.weights import BlobRef, PolicyVersion

DECODERS = {
    "from_actor": (codec.from_actor, messages.ActorMessage),
    "to_actor": (codec.to_actor, messages.ToActor),
    "from_learner": (codec.from_learner, messages.LearnerMessage),
    "to_learner": (codec.to_learner, messages.ToLearner),
    "from_blob_client": (codec.from_blob_client, messages.BlobMessage),
    "to_blob_client": (codec.to_blob_client, messages.ToBlobClient),
    "from_control": (codec.from_control, messages.ControlMessage),
    "to_control": (codec.to_control, messages.FromControl),
}
KINDS = [(socket, kind) for socket, (_, union) in DECODERS.items() for kind in typing.get_args(union)]
EXAMPLES: dict[object, Any] = {
    messages.Name: "peer-1",
    messages.Text: "waiting for 3 groups, ä",
    messages.Digest: "ab" * 32,
    messages.Count: 1 << 62,
    messages.Tickets: [0, 5, 1 << 40],
    int: 7,
    float: 0.25,
    str: "text",
    bool: True,
    PolicyVersion: PolicyVersion(3, 2, 1, "root"),
    BlobRef: BlobRef("cd" * 32, 10),
    messages.WireTicket: messages.WireTicket(1, 2, 3, 4),
    messages.NamedBlob: messages.NamedBlob("config.json", BlobRef("ef" * 32, 9)),
    messages.PeerStatus: messages.PeerStatus("a", "h", "e", 1, 2, [3], 0.5, 2.0, 0.1, "busy"),
}


def example(kind: Any) -> Any:
    """A value of an annotated type, every field filled."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return example(arguments[0])
    if origin is typing.Literal:
        return arguments[-1]
    if origin is list:
        return [example(arguments[0])]
    if origin is tuple:
        return tuple(example(argument) for argument in arguments)
    if origin is dict:
        return {example(arguments[0]): example(arguments[1])}
    if origin is not None:
        return example(arguments[0])
    hints = typing.get_type_hints(kind, include_extras=True)
    return kind(**{name: example(hint) for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar})


def lists(value: Any) -> Any:
    """The same value with lists for tuples: msgpack knows only one of them."""
    if isinstance(value, dict):
        return {key: lists(inner) for key, inner in value.items()}
    return [lists(inner) for inner in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(("socket", "kind"), KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_message_survives_the_wire_and_any_msgpack_library_can_read_it(socket: str, kind: Any) -> None:
    message = example(kind)
    frames = encode(message, b"payload")
    decoded, payload = DECODERS[socket][0].decode(frames)
    assert (decoded, bytes(payload)) == (message, b"payload")
    plain = msgpack.unpackb(frames[0], strict_map_key=False)
    assert plain["type"] == kind.__name__
    assert lists(plain) == lists({"type": kind.__name__, **msgspec.to_builtins(message)})
    again, _ = DECODERS[socket][0].decode([msgpack.packb(plain), b""])
    assert again == message


@settings(max_examples=150, deadline=None)
@given(socket=st.sampled_from(sorted(DECODERS)), frames=st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_raise_nothing_but_malformed_frame(socket: str, frames: list[bytes]) -> None:
    with pytest.raises(MalformedFrame):
        DECODERS[socket][0].decode(frames)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(choice=st.sampled_from(KINDS), values=st.lists(VALUES, min_size=20, max_size=20))
def test_a_known_message_with_any_fields_decodes_or_is_malformed(choice: tuple[str, Any], values: list[Any]) -> None:
    socket, kind = choice
    fields = dict(zip(kind.__struct_fields__, values, strict=False))
    header = msgpack.packb({"type": kind.__name__, **fields})
    try:
        message, _ = DECODERS[socket][0].decode([header, b""])
    except MalformedFrame as error:
        assert error.reason == "header"
    else:
        assert isinstance(message, kind)


@settings(max_examples=300, deadline=None)
@given(choice=st.sampled_from(KINDS), position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_damaged_byte_in_a_header_raises_nothing_but_malformed_frame(choice: tuple[str, Any], position: int, flip: int) -> None:
    header = bytearray(encode(example(choice[1]))[0])
    header[position % len(header)] ^= flip
    for damaged in (bytes(header), memoryview(bytes(header)), bytes(header[: position % len(header)])):
        with contextlib.suppress(MalformedFrame):
            DECODERS[choice[0]][0].decode([damaged, b""])


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_a_message_of_other_than_two_frames_is_malformed(count: int) -> None:
    with pytest.raises(MalformedFrame) as caught:
        codec.from_actor.decode([bytes(encode(messages.ActorBye())[0])] * count)
    assert caught.value.reason == "frames" and str(count) in str(caught.value)


def test_a_frame_over_its_limit_is_refused_unread() -> None:
    header = encode(messages.ActorBye())[0]
    for frames in ([bytes(MAX_HEADER_BYTES + 1), b""], [header, bytes(MAX_PAYLOAD_BYTES + 1)]):
        with pytest.raises(MalformedFrame) as caught:
            codec.from_actor.decode(frames)
        assert caught.value.reason == "oversize"
    assert codec.from_actor.decode([header, bytes(MAX_PAYLOAD_BYTES)])[0] == messages.ActorBye()


def test_nesting_without_end_is_malformed() -> None:
    for opening in (b"\x91", b"\x81\xa1a"):
        with pytest.raises(MalformedFrame):
            codec.from_actor.decode([opening * 100_000, b""])


def test_a_message_of_another_socket_or_with_a_field_too_many_is_malformed() -> None:
    with pytest.raises(MalformedFrame):
        codec.from_actor.decode(encode(messages.ShutDown()))
    with pytest.raises(MalformedFrame):
        codec.from_control.decode([msgpack.packb({"type": "ShutDown", "now": True}), b""])


@pytest.mark.parametrize(
    "message",
    [
        messages.SubmitGroup(seq=-1, ticket=0, attempt=1),
        messages.SubmitGroup(seq=1, ticket=(1 << 62) + 1, attempt=1),
        messages.ActorHello(1, "no spaces", "e", "x", "h", 1, []),
        messages.ActorHello(1, "", "e", "x", "h", 1, []),
        messages.ActorHello(1, "../../etc", "e", "x", "h", 1, []),
        messages.ActorHello(1, "a\n", "e", "x", "h", 1, []),
        messages.ActorReport(0, 4097, [], 0.0, 0.0, 0, ""),
        messages.ActorReport(0, 1, [-1], 0.0, 0.0, 0, ""),
        messages.ActorReport(0, 1, [0] * ((1 << 16) + 1), 0.0, 0.0, 0, ""),
        messages.TicketFailed(1, 0, 1, "x" * 4097),
    ],
    ids=lambda message: type(message).__name__,
)
def test_numbers_and_names_out_of_range_are_malformed(message: Any) -> None:
    with pytest.raises(MalformedFrame):
        codec.from_actor.decode(encode(message))


@pytest.mark.parametrize("digest", ["ab" * 31, "AB" * 32, "ab" * 32 + "\n", "../" + "a" * 61])
def test_a_digest_is_64_hexadecimal_digits_and_nothing_else(digest: str) -> None:
    with pytest.raises(MalformedFrame):
        codec.from_blob_client.decode(encode(messages.GetChunk(digest, 0)))


def test_a_decoder_can_be_made_for_any_union() -> None:
    assert MessageDecoder[messages.FromControl](messages.FromControl).decode(encode(messages.Done()))[0] == messages.Done()
