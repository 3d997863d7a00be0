"""`doctor`: what is missing on this machine, and how to mend it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from actor.vllm_engine import CPU_HEAD_WIDTHS, installed_build
from protocol.errors import SlipstreamError

REQUIRED = {
    "torch": "torch>=2.11,<2.14", "transformers": "transformers", "tokenizers": "tokenizers", "safetensors": "safetensors",
    "numpy": "numpy", "numba": "numba", "zmq": "pyzmq", "msgspec": "msgspec", "zstandard": "zstandard", "blake3": "blake3", "pydantic": "pydantic",
    "rich": "rich", "psutil": "psutil", "matplotlib": "matplotlib",
}  # fmt: skip
OPTIONAL = {
    "reasoning_gym": ("reasoning-gym", "task reasoning-gym"),
    "math_verify": ("math-verify[antlr4_13_2]", "task question-answer"),
    "pyarrow": ("pyarrow", "Parquet question files"),
    "datasets": ("datasets", "question files from the Hugging Face hub"),
}
LOW_DISK_BYTES = 2 << 30
LOW_OPEN_FILES = 1024
LOW_SHARED_BYTES = 1 << 30


class Findings(NamedTuple):
    """What was found, a line each; `is_well` if a run can start."""

    lines: list[str]
    is_well: bool


class _Notebook:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.is_well = True

    def good(self, text: str) -> None:
        self.lines.append(f"ok       {text}")

    def note(self, text: str) -> None:
        self.lines.append(f"note     {text}")

    def missing(self, text: str, fix: str) -> None:
        self.lines.append(f"missing  {text}. Fix: {fix}")
        self.is_well = False


def examine(config: Path | None) -> Findings:
    """Look at Python, libraries, encryption, devices, disk and limits, and at a configuration if one is given."""
    notes = _Notebook()
    _python(notes)
    _libraries(notes)
    _encryption(notes)
    _devices(notes)
    _engine(notes)
    _disk_and_limits(notes)
    if config is not None:
        _configuration(notes, config)
    return Findings(notes.lines, notes.is_well)


def _python(notes: _Notebook) -> None:
    version = sys.version.split()[0]
    notes.good(f"Python {version}")


def _libraries(notes: _Notebook) -> None:
    for module, package in REQUIRED.items():
        try:
            importlib.import_module(module)
            notes.good(f"{module} {_version(package)}")
        except ImportError as error:
            notes.missing(f"{module} cannot be imported ({error})", f"pip install '{package}'")
    for module, (package, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            notes.note(f"{module} is not installed; {purpose} needs it: pip install '{package}'")


def _version(requirement: str) -> str:
    name = requirement.split(">", maxsplit=1)[0].split("[", maxsplit=1)[0]
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _encryption(notes: _Notebook) -> None:
    import zmq

    if zmq.has("curve"):
        notes.good(f"libzmq {zmq.zmq_version()} with CURVE encryption")
    else:
        notes.missing("libzmq was built without CURVE, so sockets cannot be encrypted", "pip install --force-reinstall pyzmq")


def _devices(notes: _Notebook) -> None:
    try:
        import torch
    except ImportError:
        return
    if _has_accelerator():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        notes.good(f"accelerators: {', '.join(names)}")
    else:
        notes.note(f"no accelerator: everything runs on {os.cpu_count()} CPU cores, which is enough for small policies")
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        notes.good("torch.distributed with gloo")
    else:
        notes.missing("torch.distributed has no gloo", "install a torch build with distributed support")


def _engine(notes: _Notebook) -> None:
    """What `actor.engine = "auto"` means on this machine."""
    build = installed_build()
    if build is None:
        notes.note("vLLM is not installed; actors generate with transformers. `make vllm` brings the CPU build, pip install vllm another")
    elif build.kind == "cpu":
        notes.good(f"engine auto is vLLM {build.version} for the CPU; it takes head widths {', '.join(map(str, CPU_HEAD_WIDTHS))}")
    elif _has_accelerator():
        notes.good(f"engine auto is vLLM {build.version}")
    else:
        notes.missing(f"vLLM {build.version} needs an accelerator, and torch sees none", "actor.engine = transformers, or the CPU build")
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    if free < LOW_SHARED_BYTES:
        notes.note(
            f"/dev/shm has {free >> 20} MB free; larger weights are kept in {tempfile.gettempdir()} (docker run --shm-size enlarges it)"
        )


def _has_accelerator() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _disk_and_limits(notes: _Notebook) -> None:
    free = shutil.disk_usage(Path.cwd()).free
    if free < LOW_DISK_BYTES:
        notes.missing(f"only {free / 1e9:.1f} GB are free here", "free some space, or set run.directory elsewhere")
    else:
        notes.good(f"{free / 1e9:.0f} GB of disk free here")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        probe.touch(0o600)
        if probe.stat().st_mode & 0o077:
            notes.missing("files cannot be made private here", "use a file system with Unix permissions for run.directory")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LOW_OPEN_FILES:
        notes.missing(f"only {soft} files may be open", f"ulimit -n {min(4096, hard)}")


def _configuration(notes: _Notebook, path: Path) -> None:
    from protocol.config import load_config
    from tasks.registry import load_task

    try:
        config = load_config(path)
        task = load_task(config.task.name, config.task.options)
    except SlipstreamError as error:
        notes.missing(f"configuration {path}", str(error))
        return
    pacing = config.pacing
    notes.good(f"configuration {path}: task {config.task.name}, {task.num_train} prompts, {task.num_heldout} held out")
    notes.good(
        f"pacing: S = {pacing.max_lag}, reuse {pacing.reuse}, a version every {pacing.sync_every} steps, "
        f"at most {pacing.run_ahead} groups ahead of the learner"
    )
    cores, wanted = os.cpu_count() or 1, config.actor.num_actors * config.actor.threads + config.learner.ranks * config.learner.threads
    if wanted > 4 * cores:
        notes.note(f"{wanted} computing threads are configured for {cores} cores")
