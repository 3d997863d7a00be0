"""A random Llama with a character tokenizer, as small as a test needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_random_llama(
    folder: Path, *, hidden_size: int, num_layers: int, num_heads: int, num_positions: int = 64, dtype: Any = None
) -> Path:
    """Write a Hugging Face folder, the same at every call; `dtype` is a torch dtype, float32 by default."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from learner.supervised import character_tokenizer

    tokenizer = character_tokenizer(["0123456789+-= "])
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=num_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.to(dtype or torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
