"""An engine on plain transformers: any Hugging Face causal LM, on any device torch has.

Invariants: all model work happens in one thread; no token is sampled unless the live parameters had the published root when they were last
written; a token's recorded version is the one whose weights gave its distribution.

Updates are taken between two tokens. The key-value cache is then rebuilt from the tokens so far, so that log-probabilities stay those of the
new weights exactly.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from actor.engine import Completion, GenerationRequest, Pause
from actor.shadow import StagedWeights
from protocol.errors import EngineError, RootMismatch
from protocol.groups import FULL, STOPPED
from protocol.weights import DTYPE_BITS, PolicyVersion, Tensor, Weights, root_hash

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SIGNED = {2: torch.int16, 4: torch.int32}


@dataclass(slots=True, eq=False)
class _Job:
    request: GenerationRequest
    completions: list[Completion] | None = None


@dataclass(slots=True, eq=False)
class _Update:
    staged: StagedWeights
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Pause]

    def settle(self, outcome: Pause | Exception) -> None:
        """Tell whoever waits; called from the engine's thread."""
        self.loop.call_soon_threadsafe(_settle, self.done, outcome)


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: int | None = None

    def completion(self) -> Completion:
        return Completion(
            np.array(self.token_ids, np.int32),
            np.array(self.logprobs, np.float32),
            np.array(self.versions, np.int32),
            FULL if self.finish is None else self.finish,
        )


class TransformersEngine:
    """Implements actor.engine.Engine. Computes in fp32 on the CPU (bf16 weights are exact in it) and in bf16 elsewhere."""

    def __init__(self, policy: Path, device: str, threads: int, groups_per_forward: int) -> None:
        """Build the model from the configuration in the folder `policy`; its weights come with the first `update`."""
        self._device = torch.device(pick_device(device))
        torch.set_num_threads(threads)
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        config = AutoConfig.from_pretrained(policy)
        self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(self._device).eval()
        self._context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        self._targets: dict[str, torch.Tensor] = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        self._groups_per_forward = groups_per_forward
        self._thread = ThreadPoolExecutor(1, "engine")
        self._turn = asyncio.Lock()
        self._waiting: list[_Job] = []
        self._update: _Update | None = None
        self._version: PolicyVersion | None = None
        self._num_tokens = 0
        self._busy_seconds = 0.0
        self._is_closing = False

    @property
    def name(self) -> str:
        return f"transformers/{self._device.type}"

    @property
    def num_groups_wanted(self) -> int:
        return self._groups_per_forward + 1

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        length = len(request.prompt_ids) + request.max_tokens
        if length > self._context:
            raise EngineError(f"prompt and budget are {length} tokens, the policy has room for {self._context}")
        job = _Job(request)
        self._waiting.append(job)
        try:
            async with self._turn:
                if job.completions is None:
                    others = [other for other in self._waiting if other is not job and other.completions is None]
                    jobs = [job, *others][: self._groups_per_forward]
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
        finally:
            self._waiting.remove(job)
        assert job.completions is not None
        return job.completions

    async def update(self, staged: StagedWeights) -> Pause:
        loop = asyncio.get_running_loop()
        overtaken = self._update
        if overtaken is not None:
            overtaken.settle(EngineError(f"version {overtaken.staged.version.number} was overtaken by version {staged.version.number}"))
        update = self._update = _Update(staged, loop, loop.create_future())
        # Taken between two tokens if a generation is running, otherwise by this call; all in the one thread.
        self._thread.submit(self._take_update)
        return await update.done

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.to_thread(self._thread.shutdown)

    # --- in the engine's thread

    def _take_update(self) -> bool:
        """Write waiting weights into the model. Whether there were any."""
        update, self._update = self._update, None
        if update is None:
            return False
        self._version = None
        started = time.monotonic()
        version, weights = update.staged.version, update.staged.weights
        try:
            self._write(weights)
            found = root_hash(self._live(weights))
            if found != version.root:
                raise RootMismatch(version.root, found, f"the engine's parameters at version {version.number}")
            self._version = version
        except (RootMismatch, EngineError) as error:
            update.settle(error)
        except Exception as error:  # a device's errors are of many kinds, and whoever waits must hear of all of them
            update.settle(EngineError(f"the model could not take version {version.number}: {error!r}"))
        else:
            seconds = time.monotonic() - started
            update.settle(Pause(seconds, seconds))
        return True

    def _write(self, weights: Weights) -> None:
        missing = {name for name, _ in self._model.named_parameters()} - set(weights)
        unknown = set(weights) - set(self._targets)
        if missing or unknown:
            raise EngineError(f"the published weights do not fit the model: {sorted(missing | unknown)[:3]} differ")
        for name, tensor in weights.items():
            if tuple(self._targets[name].shape) != tensor.shape or tensor.dtype not in _TORCH_DTYPES:
                raise EngineError(
                    f"the published {name} is {tensor.dtype}{list(tensor.shape)}, the model's {list(self._targets[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in weights.items():
                self._targets[name].copy_(to_torch(tensor))

    def _live(self, like: Weights) -> Weights:
        """The parameters as they are in the model now, in the published dtypes."""
        live: Weights = {}
        for name, tensor in like.items():
            value = self._targets[name].detach().to(_TORCH_DTYPES[tensor.dtype]).cpu().contiguous()
            bits = value.view(_SIGNED[value.element_size()]).numpy().reshape(-1).view(DTYPE_BITS[tensor.dtype])
            live[name] = Tensor(tensor.dtype, tensor.shape, bits)
        return live

    def _run(self, jobs: list[_Job]) -> None:
        started = time.monotonic()
        groups = self._sample([job.request for job in jobs])
        for job, completions in zip(jobs, groups, strict=True):
            job.completions = completions
        self._busy_seconds += time.monotonic() - started

    @torch.inference_mode()
    def _sample(self, requests: list[GenerationRequest]) -> list[list[Completion]]:
        """Generate all groups of `requests` side by side, one token a turn."""
        groups = [[_Row() for _ in range(request.num_completions)] for request in requests]
        seeds = [np.random.Generator(np.random.Philox(key=request.seed)) for request in requests]
        prompts, mask = self._prompts(requests)
        budget = max(request.max_tokens for request in requests)
        cache: Any = None
        fed = 0
        tokens = prompts
        for turn in range(budget):
            if self._take_update():
                cache = None
            if self._version is None or self._is_closing:
                raise EngineError("the engine is being closed" if self._is_closing else "no verified weights are loaded")
            if cache is None:
                cache, fed = DynamicCache(config=self._model.config), 0
            positions = (mask.cumsum(1) - 1).clamp(0, self._context - 1)
            logits = self._model(
                input_ids=tokens[:, fed:],
                attention_mask=mask,
                position_ids=positions[:, fed:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            fed = tokens.shape[1]
            next_ids = self._draw(logits, requests, seeds, groups, turn)
            if all(row.finish is not None for rows in groups for row in rows):
                break
            tokens = torch.cat([tokens, next_ids[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return [[row.completion() for row in rows] for rows in groups]

    def _prompts(self, requests: list[GenerationRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [rows, longest prompt], padded on the left."""
        longest = max(len(request.prompt_ids) for request in requests)
        ids, mask = [], []
        for request in requests:
            padding = longest - len(request.prompt_ids)
            ids += [[0] * padding + request.prompt_ids] * request.num_completions
            mask += [[0] * padding + [1] * len(request.prompt_ids)] * request.num_completions
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _draw(
        self,
        logits: torch.Tensor,
        requests: list[GenerationRequest],
        seeds: list[np.random.Generator],
        groups: list[list[_Row]],
        turn: int,
    ) -> torch.Tensor:
        """Sample the next token of every row by inversion, with the group's own generator. logits: (rows, vocabulary)."""
        assert self._version is not None
        all_logits = logits.float().cpu()
        next_ids: list[torch.Tensor] = []
        begin = 0
        for request, generator, rows in zip(requests, seeds, groups, strict=True):
            scaled = all_logits[begin : begin + len(rows)] / request.temperature
            begin += len(rows)
            logprobs = torch.log_softmax(scaled, dim=-1)
            cumulative = logprobs.double().exp().cumsum(-1)
            points = torch.from_numpy(generator.random((len(rows), 1))) * cumulative[:, -1:]
            ids = torch.searchsorted(cumulative, points, right=True).clamp(max=logprobs.shape[-1] - 1)
            chosen = logprobs.gather(1, ids)[:, 0].tolist()
            for row, token, logprob in zip(rows, ids[:, 0].tolist(), chosen, strict=True):
                if row.finish is not None or turn >= request.max_tokens:
                    continue
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.versions.append(self._version.number)
                self._num_tokens += 1
                if token in request.stop_ids:
                    row.finish = STOPPED
                elif turn == request.max_tokens - 1:
                    row.finish = FULL
            next_ids.append(ids[:, 0])
        return torch.cat(next_ids).to(self._device)


def pick_device(device: str) -> str:
    """`auto` is the first accelerator that torch sees, otherwise the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The torch tensor with these bits."""
    signed = np.ascontiguousarray(tensor.bits).view(np.int16 if tensor.bits.itemsize == 2 else np.int32)
    return torch.from_numpy(signed.copy()).view(_TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _settle(future: asyncio.Future[Pause], outcome: Pause | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
