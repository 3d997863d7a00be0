"""CURVE keys and what they allow.

Each run has one key pair for the broker and one for each role. A key file is TOML, readable by its owner alone (as ssh demands of its own),
and holds what one side needs: its role, its key pair and the broker's public key.
"""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import zmq

from protocol.errors import KeyFileError

Role = Literal["actor", "learner", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class KeyFile(NamedTuple):
    """The content of a key file; keys are Z85 text. `broker` is the broker's public key."""

    role: str
    public: str
    secret: str
    broker: str


def make_keys(folder: Path) -> None:
    """Fresh keys for a run: `broker.key` and one file for each role."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    broker_public, broker_secret = _pair()
    _write(folder / "broker.key", KeyFile("broker", broker_public, broker_secret, broker_public))
    for role in ROLES:
        _write(folder / f"{role}.key", KeyFile(role, *_pair(), broker_public))


def load_key(path: Path) -> KeyFile:
    """A key file's content. Raises KeyFileError if it is missing, malformed or open to others."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise KeyFileError(path, f"cannot be read ({error.strerror})", "copy it from the keys/ directory of the run") from None
    except UnicodeDecodeError:
        raise KeyFileError(path, "is not a key file", "copy it from the keys/ directory of the run") from None
    if mode & _OTHERS:
        raise KeyFileError(path, f"can be read by others (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
    try:
        key = KeyFile(**tomllib.loads(text))
        if not all(isinstance(value, str) for value in key):
            raise ValueError("not every value is text")
        for part in (key.public, key.secret, key.broker):
            if len(part) != 40:
                raise ValueError(f"a key has {len(part)} characters, not 40")
    except (TypeError, ValueError, RecursionError) as error:
        raise KeyFileError(path, f"is not a key file ({error})", "copy it again from the keys/ directory of the run") from None
    return key


def allowed_keys(folder: Path) -> dict[Role, set[str]]:
    """The public keys of each role, from the role's key file and from any `ROLE-*.pub` beside it (one key a line). Raises KeyFileError."""
    allowed: dict[Role, set[str]] = {}
    for role in ROLES:
        keys = {load_key(folder / f"{role}.key").public}
        for extra in sorted(folder.glob(f"{role}-*.pub")):
            try:
                keys |= set(extra.read_text(encoding="ascii").split())
            except (OSError, UnicodeDecodeError) as error:
                fix = "write one public key on each line, or remove the file"
                raise KeyFileError(extra, f"is no list of keys ({error})", fix) from None
        allowed[role] = keys
    return allowed


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write(path: Path, key: KeyFile) -> None:
    text = "".join(f"{field} = '{value}'\n" for field, value in key._asdict().items())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def add_key(folder: Path, role: str, name: str) -> Path:
    """One more key file for `role`, as for another machine; its public key goes beside it, where `allowed_keys` finds it.

    Raises KeyFileError for an unknown role, a name that is no file name, or one that is taken.
    """
    path = folder / f"{role}-{name}.key"
    if role not in ROLES or not name.replace("-", "").replace("_", "").isalnum():
        raise KeyFileError(path, "is not a key of a known role", f"role is one of {', '.join(ROLES)}, the name letters, digits, - and _")
    broker = load_key(folder / "broker.key")
    key = KeyFile(role, *_pair(), broker.public)
    try:
        _write(path, key)
    except FileExistsError:
        raise KeyFileError(path, "exists already", "choose another name") from None
    path.with_suffix(".pub").write_text(key.public + "\n", encoding="ascii")
    return path
