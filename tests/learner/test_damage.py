"""A damaged checkpoint is set aside, by name, and the one before it taken; never silently, never removed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from learner.damage import STATE_NAME, CheckpointState, damage, digests_of, list_checkpoints, set_aside_damaged
from protocol.weights import PolicyVersion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sound checkpoints."""
    for step in (10, 20, 30):
        checkpoint = tmp_path / f"step-{step:08d}"
        (checkpoint / "policy").mkdir(parents=True)
        (checkpoint / "policy" / "model.safetensors").write_bytes(bytes([step]) * 100_000)
        (checkpoint / "optimizer.safetensors").write_bytes(bytes(range(256)))
        (checkpoint / "policy" / "empty").touch()
        state = CheckpointState("run", step, PolicyVersion(step, step, 0, "r"), digests_of(checkpoint))
        (checkpoint / STATE_NAME).write_bytes(msgspec.json.encode(state))
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_sound_checkpoints_are_left_alone(folder: Path) -> None:
    assert [damage(checkpoint) for checkpoint in list_checkpoints(folder)] == ["", "", ""]
    newest = set_aside_damaged(folder, pytest.fail)
    assert newest == folder / "step-00000030"


@pytest.mark.parametrize("name", ["policy/model.safetensors", "optimizer.safetensors", STATE_NAME])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_any_change_of_any_file_is_found_and_the_checkpoint_before_is_taken(name: str, harm: object, folder: Path) -> None:
    path = folder / "step-00000030" / name
    if harm is flip and name == STATE_NAME:
        path.write_bytes(path.read_bytes().replace(b'"digests":{', b'"digests":{"other":"",'))
    else:
        harm(path)  # type: ignore[operator]
    said: list[str] = []
    assert set_aside_damaged(folder, said.append) == folder / "step-00000020"
    (line,) = said
    assert "step-00000030 is damaged" in line
    assert "going on from step-00000020" in line
    assert (folder / "damaged-0-step-00000030").is_dir()


def test_when_all_are_damaged_it_starts_from_the_policy_and_says_so(folder: Path) -> None:
    for checkpoint in list_checkpoints(folder):
        truncate(checkpoint / "optimizer.safetensors")
    said: list[str] = []
    assert set_aside_damaged(folder, said.append) is None
    assert len(said) == 3
    assert "from the policy" in said[-1]
    assert list_checkpoints(folder) == []


def test_one_of_the_same_step_can_be_set_aside_again(folder: Path) -> None:
    truncate(folder / "step-00000030" / STATE_NAME)
    set_aside_damaged(folder, lambda _: None)
    (folder / "step-00000030").mkdir()
    set_aside_damaged(folder, lambda _: None)
    assert {path.name for path in folder.glob("damaged-*")} == {"damaged-0-step-00000030", "damaged-1-step-00000030"}
