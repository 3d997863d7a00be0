"""Calibrations as text: a file that `advise --write` made, or its content in a run's configuration, so that every process of the run has it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from learner.stability.rule import Calibration
from protocol.config import Config
from protocol.errors import ConfigError

FIELD = "stability.calibration"


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Raises ConfigError if it cannot be written there."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError("--write", str(path), f"cannot be written ({error.strerror})", "give a name in a folder that exists") from None


def read_calibration(text: str, field: str = FIELD) -> Calibration:
    """A calibration from its JSON, or from the file of this name. Raises ConfigError."""
    where = text if len(text) < 200 else f"{text[:60]} ..."
    try:
        data = text if text.lstrip().startswith("{") else Path(text).expanduser().read_text(encoding="utf-8")
        return msgspec.json.decode(data, type=Calibration)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(field, where, f"cannot be read ({reason})", "give a file that `cli.py advise --write` made") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(
            field, where, f"is not a calibration ({error})", "make it anew by `cli.py advise CONFIG --from RUN --write FILE`"
        ) from None


def calibration_of(config: Config) -> Calibration | None:
    """The calibration that a run goes by; None if it has none. Raises ConfigError."""
    text = config.stability.calibration
    return None if text is None else read_calibration(text)


def with_calibration(config: Config) -> Config:
    """The same configuration with the calibration's content in place of its path. Raises ConfigError."""
    calibration = calibration_of(config)
    if calibration is None:
        return config
    text = msgspec.json.encode(calibration).decode()
    return config.model_copy(update={"stability": config.stability.model_copy(update={"calibration": text})})
