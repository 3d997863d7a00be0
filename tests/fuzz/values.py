"""Values of annotated types: one valid example of each, and random ones that decode but that no honest peer sends."""

from __future__ import annotations

import random
import types
import typing
from typing import Any

from msgspec import Struct

from protocol import messages
from tests.fuzz.mutate import FLOATS, INTEGERS, TEXTS

_TEXTS: dict[Any, list[str]] = {
    messages.Name: ["a", "b", "learner", "x" * 128, "-", "__"],
    messages.Text: ["", "why", "ä" * 100, "\0", "x" * messages.MAX_TEXT],
    messages.Digest: ["ab" * 32, "00" * 32, "f" * 64],
}
"""Words with a pattern or a length. The strings of all other types are free."""


def random_value(rng: random.Random, kind: Any, known: list[int]) -> Any:
    """A value of an annotated type; whole numbers are often among `known`. It may be out of the type's range: decoders judge that."""
    if kind in _TEXTS:
        return rng.choice(_TEXTS[kind])
    if kind in (messages.Count, messages.Number, int):
        return rng.choice(known) if rng.random() < 0.75 else rng.choice(INTEGERS)
    if kind is float or kind == messages.Figure:
        return rng.choice([*FLOATS, 0.5, 1.0])
    if kind is str:
        return rng.choice([*TEXTS, "a"])
    if kind is bool:
        return rng.random() < 0.5
    if kind is type(None):
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return random_value(rng, arguments[0], known)
    if origin is typing.Literal:
        return rng.choice(arguments)
    if origin in (typing.Union, types.UnionType):
        return random_value(rng, rng.choice(arguments), known)
    if origin is list:
        return [random_value(rng, arguments[0], known) for _ in range(rng.choice([0, 1, 2, 5]))]
    if origin is tuple:
        return tuple(random_value(rng, argument, known) for argument in arguments)
    if origin is dict:
        return {random_value(rng, arguments[0], known): random_value(rng, arguments[1], known) for _ in range(rng.choice([0, 1, 3]))}
    assert issubclass(kind, Struct), f"no values for {kind}"
    return random_struct(rng, kind, known)


def random_struct(rng: random.Random, kind: type[Any], known: list[int], **fields: Any) -> Any:
    """A message or another struct of random values, but for `fields`."""
    hints = {name: hint for name, hint in _hints(kind).items() if name in kind.__struct_fields__}
    return kind(**{name: random_value(rng, hint, known) for name, hint in hints.items() if name not in fields}, **fields)


def valid_structs(union: Any, decodes: typing.Callable[[Any], bool]) -> list[Any]:
    """A few structs of every kind in `union` that `decodes`."""
    rng = random.Random("valid structs")
    found = []
    for kind in typing.get_args(union):
        candidates = (random_struct(rng, kind, [0, 1, 2, 3]) for _ in range(2000))
        accepted = [struct for struct, _ in zip((c for c in candidates if decodes(c)), range(3), strict=False)]
        assert accepted, f"no valid {kind.__name__} was found"
        found += accepted
    return found


_known_hints: dict[type[Any], dict[str, Any]] = {}


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _known_hints:
        _known_hints[kind] = typing.get_type_hints(kind, include_extras=True)
    return _known_hints[kind]
