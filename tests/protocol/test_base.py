"""The base of a run: rounding is torch's, and the root is that of the weights which the learner publishes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from learner.model import load_model, published_weights
from protocol import safetensors_file
from protocol.base import WEIGHTS_SUFFIX, base_layout, base_root, base_tensors, round_to_bf16
from protocol.errors import DamagedDelta
from protocol.weights import DTYPE_BITS, Tensor, Weights, root_hash

UPPER = np.arange(1 << 16, dtype=np.uint32) << 16
"""Every pattern that is a bf16 already: every sign, exponent and leading digits, zeros, denormals, infinities and NaNs among them."""
LOWER = [0x0000, 0x0001, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF]
"""What is rounded away: nothing, less than half, exactly half (a tie) and more than half."""


def torch_rounds(patterns: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(patterns.view(np.float32).copy())
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def check_rounding(patterns: np.ndarray) -> None:
    """The same bits as torch's for every number. Which NaN a NaN becomes differs between torch's own kernels (0x7FC0 without vector
    instructions and from fp16, 0xFFFF with them), so here that is one of our own choice, in the same places."""
    found, expected = round_to_bf16(patterns.view(np.float32)), torch_rounds(patterns)
    nan = is_nan(patterns)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    np.testing.assert_array_equal((expected & 0x7FFF) > 0x7F80, nan)
    assert (found[nan] == 0x7FC0).all()


def is_nan(patterns: np.ndarray) -> np.ndarray:
    return (patterns & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)


@pytest.mark.parametrize("lower", LOWER)
def test_every_class_of_fp32_rounds_as_torch_rounds(lower: int) -> None:
    check_rounding(UPPER | np.uint32(lower))


@given(patterns=arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 0xFFFFFFFF)))
def test_any_fp32_rounds_as_torch_rounds(patterns: np.ndarray) -> None:
    check_rounding(patterns)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 15, 16, 31, 33, 64, 1000])
def test_nan_becomes_the_same_nan_at_every_place_and_length(size: int) -> None:
    for place in range(min(size, 40)):
        patterns = np.full(size, 0x3F800000, np.uint32)
        patterns[place] = 0xFF800001 + place
        check_rounding(patterns)


def test_ties_go_to_even_and_what_is_too_large_becomes_infinite() -> None:
    patterns = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF, 0x00008000, 0x00018000], np.uint32)
    expected = np.array([0x3F80, 0x3F82, 0xBF80, 0x7F80, 0x7F7F, 0xFF80, 0x0000, 0x0002], np.uint16)
    np.testing.assert_array_equal(round_to_bf16(patterns.view(np.float32)), expected)


def test_what_is_a_bf16_already_stays_as_it_is() -> None:
    patterns = UPPER[~is_nan(UPPER)]
    np.testing.assert_array_equal(round_to_bf16(patterns.view(np.float32)), (patterns >> 16).astype(np.uint16))


# --- files


def write(path: Path, **tensors: Tensor) -> Path:
    path.write_bytes(safetensors_file.serialize(tensors, {}))
    return path


def tensor(dtype: str, bits: list[int], shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(dtype, (len(bits),) if shape is None else shape, np.array(bits, DTYPE_BITS[dtype]))


def test_every_fp16_rounds_as_torch_rounds(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    path = write(tmp_path / "half.safetensors", half=Tensor("F16", (1 << 16,), bits))
    [(_, found)] = base_tensors([path])
    straight = torch.from_numpy(bits.view(np.float16).copy()).to(torch.bfloat16)
    np.testing.assert_array_equal(found.bits, straight.view(torch.int16).numpy().view(np.uint16))


def test_bf16_is_taken_as_it_is_nans_and_all(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    path = write(tmp_path / "same.safetensors", same=Tensor("BF16", (256, 256), bits))
    [(name, found)] = base_tensors([path])
    assert (name, found.dtype, found.shape) == ("same", "BF16", (256, 256))
    np.testing.assert_array_equal(found.bits, bits)


def test_the_base_is_in_all_files_together_whatever_their_order(tmp_path: Path) -> None:
    one = write(tmp_path / "b.safetensors", w=tensor("F32", [0x3F808001, 0x40000000], (1, 2)), scalar=tensor("F16", [0x3C00], ()))
    other = write(tmp_path / "a.safetensors", v=tensor("BF16", [1, 2, 3]), empty=tensor("F32", [], (0, 4)))
    expected: Weights = {
        "w": tensor("BF16", [0x3F81, 0x4000], (1, 2)),
        "scalar": tensor("BF16", [0x3F80], ()),
        "v": tensor("BF16", [1, 2, 3]),
        "empty": tensor("BF16", [], (0, 4)),
    }
    found = dict(base_tensors([one, other]))
    assert found.keys() == expected.keys()
    assert root_hash(found) == root_hash(expected) == base_root([one, other]) == base_root([other, one])
    assert base_layout([one, other]) == {name: ("BF16", tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 100, b"\x02" + bytes(7) + b"{}rest"])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    for read in (base_root, base_layout, lambda paths: dict(base_tensors(paths))):
        with pytest.raises(DamagedDelta):
            read([tmp_path / "x.safetensors"])  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_anything_but_floats_of_16_or_32_bits_is_refused_by_its_name(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"fine": torch.zeros(1), "steps": torch.ones(1).to(dtype)}, path)
    with pytest.raises(DamagedDelta, match="steps"):
        base_root([path])


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, twice=tensor("F32", [0])) for name in ("a.safetensors", "b.safetensors")]
    with pytest.raises(DamagedDelta, match="twice"):
        base_root(paths)


# --- the learner's first weights


def saved(folder: Path, *, tied: bool, dtype: torch.dtype, shard: str = "50GB") -> Path:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=32, tie_word_embeddings=tied, **shape))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[0, :6] = torch.tensor([1.00390625, -1.01171875, 1e-40, float("inf"), 3.4e38, -0.0])
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_base_of_a_saved_llama_is_what_its_learner_publishes_first(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "policy", tied=tied, dtype=dtype)
    weights = published_weights(load_model(folder, torch.device("cpu")))
    paths = list(folder.glob(f"*{WEIGHTS_SUFFIX}"))
    assert dict(base_tensors(paths)).keys() == weights.keys()
    assert base_root(paths) == root_hash(weights)


def test_the_base_of_a_llama_in_several_files_is_the_same(tmp_path: Path) -> None:
    whole, split = (
        saved(tmp_path / name, tied=True, dtype=torch.float32, shard=shard) for name, shard in (("one", "50GB"), ("many", "4KB"))
    )
    paths = list(split.glob(f"*{WEIGHTS_SUFFIX}"))
    assert len(paths) > 1
    assert base_root(paths) == base_root(list(whole.glob(f"*{WEIGHTS_SUFFIX}")))
    assert base_root(paths) == root_hash(published_weights(load_model(split, torch.device("cpu"))))


def test_the_base_of_the_shared_tiny_policy_is_what_its_learner_publishes_first(tiny_policy: Path) -> None:
    weights = published_weights(load_model(tiny_policy, torch.device("cpu")))
    assert base_root(list(tiny_policy.glob(f"*{WEIGHTS_SUFFIX}"))) == root_hash(weights)


def test_weights_that_are_called_otherwise_have_another_root(tmp_path: Path, tiny_policy: Path) -> None:
    paths = list(tiny_policy.glob(f"*{WEIGHTS_SUFFIX}"))
    renamed = {name.removeprefix("model."): tensor for name, tensor in base_tensors(paths)}
    path = write(tmp_path / "model.safetensors", **renamed)
    assert base_root([path]) != base_root(paths)
