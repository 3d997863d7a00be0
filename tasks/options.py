"""Checks of options that several tasks share."""

from __future__ import annotations

from protocol.errors import ConfigError


def check_whole_number(field: str, value: object, minimum: int, maximum: int) -> None:
    """Raise ConfigError naming `field` unless `value` is an int in minimum..maximum."""
    # type() rather than isinstance(): True is an int to Python and a mistake to the person who wrote it.
    if type(value) is not int or not minimum <= value <= maximum:
        raise ConfigError(field, value, "not a whole number in the accepted range", f"use a whole number in {minimum}..{maximum}")
