"""A worker extension for tests: vLLM's CPU build leaves parameters plain, as on accelerators, so that they can be patched and compared."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import utils

from actor.vllm_worker import ShadowWorker


def _keep_plain(layer: Any, remove_weight: bool) -> None:
    """In the place of vLLM's function that packs a layer's weight and throws the parameter away."""
    del remove_weight
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = _keep_plain


class PlainWorker(ShadowWorker):
    """What runs in the test's workers."""
