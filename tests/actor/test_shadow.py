"""The shadow: a file that other processes read, that never kills who writes to it, and that does not outlive its process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from actor.shadow import PREFIX, Shadow, StagedWeights, shadow_folders
from protocol.errors import ShadowLost
from protocol.weights import PolicyVersion, Tensor, Weights, root_hash

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE = 60.0
LAYOUT = {"a": ("BF16", (3, 5)), "empty": ("BF16", (0, 4)), "scalar": ("BF16", ()), "b": ("BF16", (129,))}


def random_weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        name: Tensor(dtype, shape, rng.integers(0, 1 << 16, int(np.prod(shape)), dtype=np.uint16))
        for name, (dtype, shape) in LAYOUT.items()
    }


def one_tensor(num_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"w": ("BF16", (num_bytes // 2,))}


@pytest.fixture
def shadow(tmp_path: Path) -> Iterator[Shadow]:
    made = Shadow(LAYOUT, [tmp_path])
    made.fill(random_weights().items())
    yield made
    made.close()


# --- the file


def test_the_file_is_one_that_the_safetensors_library_reads_with_the_same_bits(shadow: Shadow) -> None:
    found = load_file(shadow.path)
    expected = random_weights()
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert tuple(tensor.shape) == expected[name].shape
        assert tensor.view(torch.int16).reshape(-1).tolist() == expected[name].bits.view(np.int16).tolist()


def test_what_is_staged_in_place_is_what_another_reader_of_the_file_sees(shadow: Shadow) -> None:
    shadow.weights["b"].bits[7] = 0x4321
    assert load_file(shadow.path)["b"].view(torch.int16)[7] == 0x4321


def test_every_byte_is_reserved_before_one_is_written(tmp_path: Path) -> None:
    shadow = Shadow(one_tensor(3 << 20), [tmp_path])
    found = shadow.path.stat()
    assert found.st_size > 3 << 20
    assert found.st_blocks * 512 >= found.st_size
    shadow.close()


def test_nobody_else_may_read_the_file(shadow: Shadow) -> None:
    assert shadow.path.stat().st_mode & 0o077 == 0


WRITER = """
import sys
from pathlib import Path
import numpy as np
from actor.shadow import Shadow
from protocol.weights import Tensor
folder = Path(sys.argv[1])
shadow = Shadow({"w": ("BF16", (300_000,))}, [folder])
with (folder / "ballast").open("wb", buffering=0) as file:
    try:
        while file.tell() < 1 << 20:
            file.write(bytes(4096))
        sys.exit("this is no small file system")
    except OSError:
        pass
for value in range(3):
    shadow.fill([("w", Tensor("BF16", (300_000,), np.full(300_000, value, np.uint16)))])
shadow.close()
"""


def test_writing_to_a_shadow_on_a_file_system_that_is_full_by_then_does_not_end_the_process(small_folder: Path) -> None:
    done = run_python(WRITER, small_folder)
    assert done.returncode == 0, (done.returncode, done.stderr)


# --- where it lies


def test_a_folder_without_room_is_passed_over_and_left_empty(small_folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    shadow = Shadow(one_tensor(2 << 20), [small_folder, large])
    assert shadow.path.parent == large
    assert list(small_folder.iterdir()) == []
    shadow.close()


def test_a_folder_that_others_have_filled_is_passed_over(small_folder: Path, tmp_path: Path, fill_up: Callable[[Path], Path]) -> None:
    fill_up(small_folder)
    shadow = Shadow(one_tensor(4096), [small_folder, tmp_path])
    assert shadow.path.parent == tmp_path
    shadow.close()


def test_a_folder_in_which_no_file_can_be_made_is_passed_over(tmp_path: Path) -> None:
    shadow = Shadow(LAYOUT, [tmp_path / "not there", tmp_path])
    assert shadow.path.parent == tmp_path
    shadow.close()


def test_without_room_anywhere_every_folder_is_named_and_nothing_is_left(small_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "not there"
    with pytest.raises(ShadowLost) as caught:
        Shadow(one_tensor(2 << 20), [small_folder, missing])
    assert str(small_folder) in str(caught.value)
    assert str(missing) in str(caught.value)
    assert list(small_folder.iterdir()) == []


def test_the_first_folder_with_room_is_taken(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    shadow = Shadow(LAYOUT, folders)
    assert shadow.path.parent == folders[0]
    shadow.close()


# --- what is in it


def test_filling_copies_what_it_is_given(tmp_path: Path) -> None:
    weights = random_weights()
    shadow = Shadow(LAYOUT, [tmp_path])
    shadow.fill(weights.items())
    weights["a"].bits[:] ^= 1
    assert root_hash(shadow.weights) == root_hash(random_weights())
    shadow.close()


def without(weights: Weights, name: str) -> Weights:
    return {other: tensor for other, tensor in weights.items() if other != name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: without(w, "b"), "'b'"),
        (lambda w: w | {"c": w["b"]}, "'c'"),
        (lambda w: w | {"a": w["a"]._replace(shape=(5, 3))}, "'a'"),
        (lambda w: w | {"a": w["a"]._replace(dtype="F16")}, "'a'"),
        (lambda w: w | {"b": w["a"]}, "'b'"),
    ],
    ids=["missing", "unknown", "other shape", "other dtype", "other tensor"],
)
def test_tensors_that_do_not_fit_the_layout_are_refused_by_name(change: Callable[[Weights], Weights], named: str, tmp_path: Path) -> None:
    shadow = Shadow(LAYOUT, [tmp_path])
    with pytest.raises(ShadowLost, match=named):
        shadow.fill(change(random_weights()).items())
    shadow.close()


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.lists(st.tuples(st.sampled_from(["a", "scalar", "b"]), st.integers(0, 1 << 20), st.integers(1, 0xFFFF))), max_size=5)
)
def test_a_root_from_the_changed_tensors_alone_is_the_root_of_all(rounds: list[list[tuple[str, int, int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shadow = Shadow(LAYOUT, [Path(folder)])
        shadow.fill(random_weights().items())
        for changes in rounds:
            for name, index, flip in changes:
                bits = shadow.weights[name].bits
                bits[index % bits.size] ^= flip
            copies = {name: tensor._replace(bits=tensor.bits.copy()) for name, tensor in shadow.weights.items()}
            assert shadow.root([name for name, *_ in changes]) == root_hash(copies)
        assert shadow.root() == root_hash(shadow.weights)
        shadow.close()


def test_after_being_filled_anew_every_tensor_is_read_again_for_the_root(shadow: Shadow) -> None:
    shadow.root()
    shadow.fill(random_weights(1).items())
    assert shadow.root(["a"]) == root_hash(random_weights(1))


def test_staged_weights_can_be_taken_as_a_whole(shadow: Shadow) -> None:
    staged = StagedWeights(PolicyVersion(3, 3, 0, shadow.root()), shadow.weights, shadow.path, {"a": np.array([2])})
    assert staged.whole() == staged._replace(changed=None)


# --- losing it


def test_a_shadow_in_order_passes_its_check(shadow: Shadow) -> None:
    shadow.check()


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def take_its_folder_away(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize("harm", [remove, replace, cut_short, cut_to_nothing, take_its_folder_away])
def test_a_shadow_that_was_lost_says_so_and_its_check_does_not_touch_the_memory(harm: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shadow = Shadow(LAYOUT, [folder])
    harm(shadow.path)
    with pytest.raises(ShadowLost, match=shadow.path.name):
        shadow.check()
    shadow.close()


# --- the end of it


def test_closing_removes_the_file_and_views_taken_before_stay_readable(tmp_path: Path) -> None:
    shadow = Shadow(LAYOUT, [tmp_path])
    shadow.fill(random_weights().items())
    weights = shadow.weights
    shadow.close()
    assert list(tmp_path.iterdir()) == []
    assert root_hash(weights) == root_hash(random_weights())


def test_a_shadow_that_nobody_has_any_more_leaves_no_file(tmp_path: Path) -> None:
    """As when the actor is stopped while a thread still makes it."""
    shadow = Shadow(LAYOUT, [tmp_path])
    del shadow
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_shadow_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ShadowLost, match="U8"):
        Shadow({"w": ("U8", (4,))}, [tmp_path])
    gc.collect()
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys
from pathlib import Path
from actor.shadow import Shadow
shadow = Shadow({"w": ("BF16", (100,))}, [Path(sys.argv[1])])
print(shadow.path, flush=True)
sys.stdin.read()
"""


def test_a_process_that_ends_in_order_leaves_no_file_even_if_it_forgot_to_close_it(tmp_path: Path) -> None:
    assert run_python(HOLDER, tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_left_overs_of_killed_processes_are_removed_and_what_living_ones_hold_is_not(
    tmp_path: Path, temporary_folder: Path, shadow: Shadow
) -> None:
    ours = Shadow(LAYOUT, [temporary_folder])
    others = [temporary_folder / name for name in ("something else", f"{PREFIX}notes", "slipstream-other-1-x.safetensors")]
    for path in others:
        path.write_text("keep")
    with holding(temporary_folder) as (killed, left), holding(temporary_folder) as (_, alive):
        for path in (left, alive):
            path.with_suffix(".patch").write_text("what changed, for engines")
        killed.send_signal(signal.SIGKILL)
        killed.wait(DEADLINE)
        assert left.exists()
        assert temporary_folder in shadow_folders()
        assert set(temporary_folder.iterdir()) == {ours.path, alive, alive.with_suffix(".patch"), *others}
    ours.check()
    ours.close()


def test_a_left_over_is_removed_though_a_later_process_has_the_number_of_the_dead_one(temporary_folder: Path) -> None:
    """In containers every actor may be process 7, and /dev/shm outlive them all."""
    with holding(temporary_folder) as (killed, left):
        killed.send_signal(signal.SIGKILL)
        killed.wait(DEADLINE)
    renamed = left.with_name(left.name.replace(str(killed.pid), str(os.getpid())))
    left.rename(renamed)
    shadow_folders()
    assert list(temporary_folder.iterdir()) == []


def test_a_living_shadow_stays_though_its_process_has_no_number_here(temporary_folder: Path) -> None:
    """As when two containers share /dev/shm and do not see each other's processes."""
    with holding(temporary_folder) as (holder, path):
        unseen = path.with_name(path.name.replace(str(holder.pid), "4194303999"))
        path.rename(unseen)
        shadow_folders()
        assert list(temporary_folder.iterdir()) == [unseen]


def test_shared_memory_comes_before_the_folder_for_temporary_files(temporary_folder: Path) -> None:
    expected = [folder for folder in (Path("/dev/shm"), temporary_folder) if folder.is_dir()]
    assert shadow_folders() == expected


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, for this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@contextmanager
def holding(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that holds a shadow in `folder`, and the file."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                process.stdin.close()


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
