"""Key files: private, checked, and each for one role."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from broker.keys import ROLES, add_key, allowed_keys, load_key, make_keys
from protocol.errors import KeyFileError


def test_fresh_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert load_key(path).role == path.stem
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_key_file_open_to_others_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / "actor.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_key(tmp_path / "actor.key")


@pytest.mark.parametrize("text", ["", "role = 'actor'", "nonsense", "role = 'actor'\npublic = 'x'\nsecret = 'y'\nbroker = 'z'", "\u00e9"])
def test_a_file_that_is_no_key_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "actor.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError):
        load_key(path)


def test_each_role_allows_its_own_keys_and_the_ones_added_for_it(tmp_path: Path) -> None:
    make_keys(tmp_path)
    added = add_key(tmp_path, "actor", "other-host")
    allowed = allowed_keys(tmp_path)
    assert load_key(added).public in allowed["actor"]
    assert load_key(added).broker == load_key(tmp_path / "broker.key").public
    for role in ROLES:
        assert load_key(tmp_path / f"{role}.key").public in allowed[role]
        assert not any(allowed[role] & allowed[other] for other in ROLES if other != role)
    with pytest.raises(KeyFileError, match="exists already"):
        add_key(tmp_path, "actor", "other-host")
    with pytest.raises(KeyFileError, match="known role"):
        add_key(tmp_path, "king", "other-host")


def test_a_key_that_is_a_list_and_nesting_without_end_are_refused(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    path = tmp_path / "keys" / "actor.key"
    whole = path.read_text()
    listed = "\n".join([*whole.splitlines()[:3], f"broker = {[1] * 40}"])
    for text in (whole.replace("role = 'actor'", "role = 5"), listed, "role = " + "[" * 2000):
        path.write_text(text)
        with pytest.raises(KeyFileError, match=r"actor\.key"):
            load_key(path)


def test_a_list_of_further_keys_that_is_no_text_is_refused_with_its_name(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / "actor-more.pub").write_bytes(b"\xd8\xff")
    with pytest.raises(KeyFileError, match=r"actor-more\.pub"):
        allowed_keys(tmp_path)
