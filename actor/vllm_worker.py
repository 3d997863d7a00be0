"""What runs inside vLLM's worker processes: taking over weights from the actor's shadow. The engine names `ShadowWorker` as worker extension.

Invariants: nothing here decides when weights change (the engine pauses generation around every call); a worker does not outlive its actor.

On accelerators a delta is written through the model's own loaders, which know how tensors are fused, split over ranks and padded: each changed
tensor is staged whole on the device with a marker where nothing changes, and the copies that the loader makes skip the marker. Everything else goes
by vLLM's layer-wise reload from the shadow.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from actor.vllm_engine import ACTOR_PID, BITS, MARKER, POSITIONS

_SUM_ELEMENTS = 1 << 24


def die_with(pid: int) -> None:
    """End this worker, and vLLM's engine process above it, when the process `pid` ends: vLLM itself leaves them behind after kill -9."""
    parent = os.getppid()
    try:
        actor = os.pidfd_open(pid)
    except ProcessLookupError:
        actor = None

    def watch() -> None:
        if actor is not None:
            select.select([actor], [], [])
        if parent not in (pid, 1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-actor", daemon=True).start()


class _SkipMarked(TorchFunctionMode):
    """Makes `Tensor.copy_` leave alone what its source marks as not changed; bits are compared, so every other pattern is copied exactly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        target, source = args[0], args[1].to(args[0].device)
        new = source.view(torch.int16)
        if target.dtype == source.dtype:
            ours = target.view(torch.int16)
            ours.copy_(torch.where(new == MARKER, ours, new))
        else:  # a parameter that vLLM holds in another dtype
            target.copy_(torch.where(new == MARKER, target, source.to(target.dtype)))
        return target


class ShadowWorker:
    """Mixed into vLLM's Worker; the methods are called by collective_rpc on every rank. The attributes below are the worker's."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    reload_weights: Any
    _slipstream_layout: dict[str, list[int]] | None = None

    def slipstream_load(self, path: str) -> None:
        """Take over every tensor of the safetensors file at `path`. Raises ValueError, before anything is written, if one is missing."""
        model = self.model_runner.get_model()
        with safe_open(path, "pt") as file:
            layout = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self._check_layout(layout)
            try:
                with _nothing_missing(model, self.vllm_config.model_config.quantization):
                    self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in layout))
            except BaseException:
                _abandon_reload(model, self.vllm_config.model_config)
                raise
        self._repair_tied_embeddings()
        self._slipstream_layout = layout

    def slipstream_patch(self, path: str, patch: str) -> None:
        """Take over what the file `patch` lists: tensors by positions and bits, others whole from `path` (their name alone)."""
        model = self.model_runner.get_model()
        with torch.no_grad(), safe_open(path, "pt") as shadow, safe_open(patch, "pt") as listed:
            metadata = listed.metadata() or {}
            with _SkipMarked():
                model.load_weights(self._marked(shadow, listed))
            model.load_weights((name, shadow.get_tensor(name)) for name in metadata.get("whole", "").split("\n") if name)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def slipstream_checksum(self) -> int:
        """A number that depends on every bit of this rank's model and on its place: parameters, buffers, and whatever modules have derived
        from them, but not the key-value cache; only for comparing with another time."""
        model = self.model_runner.get_model()
        fields = [field for module in model.modules() for field in vars(module).items()]
        derived = [value for name, value in fields if isinstance(value, torch.Tensor) and name != "kv_cache"]
        total = 0
        for number, tensor in enumerate([*model.parameters(), *model.buffers(), *derived]):
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for begin in range(0, flat.numel(), _SUM_ELEMENTS):
                part = flat[begin : begin + _SUM_ELEMENTS].to(torch.int64) + 1
                places = torch.arange(begin, begin + part.numel(), device=part.device) % 1_000_003 + number + 1
                total = (total * 31 + int((part * places).sum())) % (1 << 61)
        return total

    def _check_layout(self, layout: dict[str, list[int]]) -> None:
        """vLLM takes a part of a fused layer and leaves the rest of it undefined, without an error."""
        expected = self._slipstream_layout
        wrong = [name for name, shape in (expected or {}).items() if layout.get(name) != shape]
        if wrong:
            raise ValueError(f"tensors {sorted(wrong)[:3]} are not there, or of another shape than before")

    def _marked(self, shadow: Any, listed: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for key in listed.keys():  # noqa: SIM118
            if not key.endswith(POSITIONS):
                continue
            name = key.removesuffix(POSITIONS)
            shape = shadow.get_slice(name).get_shape()
            staged = torch.full(shape, MARKER, dtype=torch.int16, device=self.device)
            positions = listed.get_tensor(key).to(self.device, torch.int64)
            staged.view(-1)[positions] = listed.get_tensor(name + BITS).view(torch.int16).to(self.device)
            yield name, staged.view(torch.bfloat16)

    def _repair_tied_embeddings(self) -> None:
        """On the CPU vLLM 0.32 keeps the output layer's old packed copy of a tied embedding after a reload."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        with set_current_vllm_config(self.vllm_config):
            for module in self.model_runner.get_model().modules():
                if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)


@contextlib.contextmanager
def _nothing_missing(model: Any, quantization: Any) -> Iterator[None]:
    """A reload in here raises ValueError where it leaves parameters as they are; vLLM only warns, though it refuses that at its start."""
    missing = {name for name, _ in model.named_parameters()}
    load_weights = model.load_weights

    def load(weights: Any) -> Any:
        found = load_weights(weights)
        missing.difference_update(missing if found is None else found)
        return found

    model.load_weights = load
    try:
        yield
    finally:
        del model.load_weights
    if quantization is None and missing:
        raise ValueError(f"nothing was published for {sorted(missing)[:3]}")


def _abandon_reload(model: Any, model_config: Any) -> None:
    """Forget the tensors that a failed reload has put aside; the next one would count them as its own and finish layers too early."""
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    finalize: Any = layerwise.finalize_layerwise_reload
    finalize(model, model_config)


def _avoid_amx_attention() -> None:
    """vLLM 0.32's AMX attention kernel ends the process with SIGILL on virtual machines that show AMX and do not grant its tiles."""
    from vllm.v1.attention.backends import cpu_attn

    def choose(dtype: Any, block_size: int, head_size: int | None = None, kv_cache_dtype: Any = None) -> str:
        del dtype, block_size, kv_cache_dtype
        return "vec16" if (head_size or 32) % 32 else "vec"

    if hasattr(cpu_attn, "_get_attn_isa"):
        cpu_attn._get_attn_isa = choose


def _prepare() -> None:
    from vllm.platforms import current_platform

    die_with(int(os.environ[ACTOR_PID]))
    if current_platform.is_cpu():
        _avoid_amx_attention()


if ACTOR_PID in os.environ and int(os.environ[ACTOR_PID]) != os.getpid():
    _prepare()
