"""The policy on the learner: fp32 master weights of any Hugging Face causal LM, and their bf16 bits."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from learner.batch import Microbatch
from protocol.weights import Tensor, Weights


def load_model(path: str | Path, device: torch.device) -> Any:
    """The causal LM at a folder or hub id, in fp32, in evaluation mode (dropout would make the ratio of a fresh batch differ from 1)."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()


class Rounded(NamedTuple):
    """Parameters rounded to bf16, on their device; `ready` is recorded there when they are."""

    tensors: dict[str, torch.Tensor]
    ready: torch.cuda.Event | None

    def bits(self) -> Weights:
        """Their bits in memory. May be called from any thread: on an accelerator the copy has a stream of its own beside the next step."""
        if self.ready is None:
            return {name: _bits(tensor) for name, tensor in self.tensors.items()}
        with torch.cuda.stream(torch.cuda.Stream(self._device())):  # type: ignore[no-untyped-call]
            self.ready.wait()
            return {name: _bits(tensor.cpu()) for name, tensor in self.tensors.items()}

    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def round_weights(model: Any, names: list[str] | None = None) -> Rounded:
    """The parameters `names` (all by default, shared ones once), copied and rounded to nearest even: the same bits on every device."""
    wanted = None if names is None else set(names)
    tensors = {
        name: parameter.detach().to(torch.bfloat16, copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if wanted is None or name in wanted
    }
    ready = None
    if any(tensor.is_cuda for tensor in tensors.values()):
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
    return Rounded(tensors, ready)


def published_weights(model: Any) -> Weights:
    """The bits of every parameter, shared ones once, rounded to bf16."""
    return round_weights(model).bits()


def _bits(tensor: torch.Tensor) -> Tensor:
    return Tensor("BF16", tuple(tensor.shape), tensor.view(torch.int16).numpy().reshape(-1).view(np.uint16))


def completion_logprobs(model: Any, batch: Microbatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, K) of the completions' tokens at `temperature`, and the mean entropy (nats) at their positions.

    On accelerators the forward pass runs in bf16, with fp32 logits.
    """
    device = batch.input_ids.device
    keep = batch.input_ids.shape[1] - int(batch.positions[:, 0].min())
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        # Only the positions from the first completion on; a model that does not know logits_to_keep gives all, of which these are the last.
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **_logits_to_keep(model, keep)
        ).logits[:, -keep:]
    first = batch.input_ids.shape[1] - keep
    index = (batch.positions - first).clamp(min=0)[:, :, None].expand(-1, -1, logits.shape[-1])
    logits = logits.gather(1, index)
    log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = log_softmax.gather(2, batch.targets[:, :, None])[:, :, 0]
    with torch.no_grad():
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        entropy = (entropies * batch.mask).sum()
    return logprobs, entropy


def _logits_to_keep(model: Any, keep: int) -> dict[str, int]:
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": keep} if accepts else {}
