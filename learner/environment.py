"""What the bits of a learner's arithmetic depend on beside the data and the world size.

A run records it at each start of its learner; a replay compares it with its own before it says that roots must be equal.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers


def environment(device: torch.device) -> dict[str, str]:
    """Libraries, processor, device and threads of this process, by name."""
    return {
        "torch": str(torch.__version__),  # a subclass of str
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """The processor's model, as far as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
