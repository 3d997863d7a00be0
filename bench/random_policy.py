"""A policy of real size with random weights, and a task of fixed-length completions: what speed is measured on where no weights can be had.

Speed does not depend on the values of the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protocol.base import round_to_bf16
from protocol.errors import TaskError
from protocol.safetensors_file import header_of
from tasks.base import Problem

SHAPES = {
    # Llama-3.2-1B: 1.24e9 parameters with tied embeddings
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "vocab_size": 128256},
    "20mb": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8,
             "head_dim": 64, "vocab_size": 512},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "head_dim": 32, "vocab_size": 512},
}  # fmt: skip
SIGMA = 0.02
BLOCK = 1 << 24


class FixedLength:
    """Prompts of random words; reward is the share of even words among the first `length` of a completion."""

    def __init__(self, num_prompts: int = 256, prompt_words: int = 32, length: int = 64, vocabulary: int = 500) -> None:
        self.num_train = self.num_heldout = num_prompts
        self._words, self._length, self._vocabulary = prompt_words, length, vocabulary

    def train(self, index: int) -> Problem:
        return self._problem(index, 2 * index)

    def heldout(self, index: int) -> Problem:
        return self._problem(index, 2 * index + 1)

    def _problem(self, index: int, seed: int) -> Problem:
        words = np.random.default_rng(seed).integers(3, self._vocabulary, self._words)
        return Problem(index, " ".join(f"t{word}" for word in words), "")

    def solution(self, problem: Problem) -> str:
        raise TaskError("there is no solution; give a policy by policy.path")

    def reward(self, problem: Problem, completion: str) -> float:
        words = completion.split()[: self._length]
        return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def make_policy(folder: Path, size: str, seed: int = 0) -> Path:
    """A Hugging Face folder with a Llama of this size: bf16 weights N(0, 0.02), norms 1, and a tokenizer of words t0, t1, …"""
    shape = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "initializer_range": SIGMA,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder, shape["vocab_size"])
    tensors = tensor_shapes(size)
    layout = {name: ("BF16", dims) for name, dims in tensors.items()}
    generator = np.random.default_rng(seed)
    # One block of normal values, turned by a random amount each time: drawing a billion takes a minute.
    values = round_to_bf16(generator.standard_normal(BLOCK, np.float32) * np.float32(SIGMA))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_of(layout, {"format": "pt"})[0])
        for name, dims in tensors.items():
            count = int(np.prod(dims))
            if "norm" in name:
                file.write(np.full(count, 0x3F80, np.uint16).tobytes())
                continue
            for begin in range(0, count, BLOCK):
                file.write(np.roll(values, int(generator.integers(BLOCK)))[: count - begin].tobytes())
    return folder


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The parameters of a Llama of this size under their Hugging Face names."""
    s = SHAPES[size]
    hidden, inner, width = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    queries, keys = s["num_attention_heads"] * width, s["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab_size"], hidden)}
    for layer in range(s["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (queries, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, queries),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2").save_pretrained(folder)
