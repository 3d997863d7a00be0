"""Tiny policies and their bits, for the actor's tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actor.shadow import StagedWeights
from protocol import safetensors_file
from protocol.weights import PolicyVersion, Tensor, Weights, root_hash

VOCABULARY = 23
CONTEXT = 128


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_policy() -> Callable[..., Any]:
    """A random causal LM whose parameters are exact in bf16 and whose distributions are far from flat."""

    def make(seed: int = 0, kind: str = "llama", context: int = CONTEXT) -> Any:
        torch.manual_seed(seed)
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if kind == "gpt2":
            shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": context, "initializer_range": 0.3}
            model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **ends))
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=context,
                    initializer_range=0.3,
                    tie_word_embeddings=True,
                    **ends,
                )
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        return model.eval()

    return make


@pytest.fixture
def bits_of() -> Callable[[Any], Weights]:
    """A model's parameters as bf16 bits: the upper half of each float32 pattern."""

    def bits(model: Any) -> Weights:
        weights: Weights = {}
        for name, parameter in model.named_parameters():
            patterns = parameter.detach().numpy().ravel().view(np.uint32)
            assert not (patterns & 0xFFFF).any()
            weights[name] = Tensor("BF16", tuple(parameter.shape), (patterns >> 16).astype(np.uint16))
        return weights

    return bits


@pytest.fixture
def version_of() -> Callable[..., PolicyVersion]:
    """The true version of weights under a number."""

    def version(weights: Weights, number: int) -> PolicyVersion:
        return PolicyVersion(number, number, 0, root_hash(weights))

    return version


@pytest.fixture
def stage(tmp_path: Path, version_of: Callable[..., PolicyVersion]) -> Callable[..., StagedWeights]:
    """Weights as the actor hands them to an engine, under their true version if no other is given."""

    def staged(weights: Weights, number: int, version: PolicyVersion | None = None) -> StagedWeights:
        path = tmp_path / f"staged-{number}.safetensors"
        path.write_bytes(safetensors_file.serialize(weights, {}))
        return StagedWeights(version or version_of(weights, number), weights, path, None)

    return staged


@pytest.fixture
def small_folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, as /dev/shm may be one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    # Lazily: pages of it may still be mapped by what a failed test left behind.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def fill_up() -> Callable[[Path], Path]:
    """Takes every byte that a small file system has left."""

    def fill(folder: Path) -> Path:
        assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize <= 1 << 20, "this is no small file system"
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return ballast

    return fill
