"""A process like an actor's: runs an engine that patches its parameters, reports, then generates until it is killed.

Arguments: a folder with a policy's config.json, base.safetensors and <number>.delta; how many deltas; the request to probe
with, in JSON; the descriptor to report to.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


async def main(folder: Path, num_deltas: int, asked: dict[str, Any], output: int) -> None:
    from actor import vllm_engine
    from actor.engine import GenerationRequest
    from actor.shadow import Shadow, StagedWeights, shadow_folders
    from protocol.base import base_layout, base_tensors
    from protocol.config import ActorConfig
    from protocol.delta import Delta, apply_in_place, read_header
    from protocol.errors import EngineError
    from protocol.weights import PolicyVersion

    settings = ActorConfig(max_sequences=64)
    vllm_engine._set_environment(settings, is_cpu=True)
    arguments = vllm_engine.engine_arguments(folder, settings, 256, is_cpu=True)
    arguments["worker_extension_cls"] = "vllm_plain_worker.PlainWorker"
    llm = await asyncio.to_thread(vllm_engine._start_llm, arguments)
    engine = vllm_engine.VllmEngine(llm, "plain", settings, 8, 256, patches=True)
    await engine._pause()

    paths = [folder / "base.safetensors"]
    shadow = Shadow(base_layout(paths), shadow_folders())
    shadow.fill(base_tensors(paths))
    await engine.update(StagedWeights(PolicyVersion(0, 0, 0, shadow.root()), shadow.weights, shadow.path, None))
    checks, failure = [], ""
    for number in range(1, num_deltas + 1):
        data = (folder / f"{number}.delta").read_bytes()
        changed = apply_in_place(Delta(data), shadow.weights)
        version = PolicyVersion(number, number, 0, shadow.root(changed))
        assert version.root == read_header(data).new_root
        staged = StagedWeights(version, shadow.weights, shadow.path, changed)
        if number == 3:
            try:
                await engine.update(staged._replace(path=shadow.path.with_name("gone.safetensors")))
            except EngineError as error:
                failure = str(error)
            continue
        await engine.update(staged)
        patched = await llm.collective_rpc("slipstream_checksum")
        await llm.collective_rpc("slipstream_load", args=(str(shadow.path),))
        checks.append((patched, await llm.collective_rpc("slipstream_checksum")))
    request = GenerationRequest(**asked)
    completions = await engine.generate(request)
    report = {
        "checks": checks,
        "patches": engine._num_patches,
        "failure": failure,
        "still_patches": engine._patches,
        "completions": [(c.token_ids.tolist(), c.logprobs.tolist(), c.versions.tolist(), c.finish) for c in completions],
    }
    endless = [asyncio.create_task(generate_for_ever(engine, request._replace(seed=seed))) for seed in range(2)]
    while not engine._llm.output_processor.request_states:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with os.fdopen(output, "w") as file:
        file.write(json.dumps(report) + "\n")
    await asyncio.gather(*endless)


async def generate_for_ever(engine: Any, request: Any) -> None:
    while True:
        await engine.generate(request)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])))
