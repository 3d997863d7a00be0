"""Making a run: its directory, keys, policy and manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from broker.blobs import BlobStore
from broker.keys import make_keys
from deploy.rundir import RunDirectory, RunManifest, policy_files
from learner.stability.files import with_calibration
from protocol.config import Config
from protocol.errors import ConfigError, SlipstreamError
from protocol.sampling import MAX_PROMPTS
from tasks.base import Task
from tasks.registry import load_task

CLI = Path(__file__).resolve().parent.parent / "cli.py"
_RUN_ID = re.compile(r"^(?!\.+$)[A-Za-z0-9_.\-]{1,128}$")
_LIBRARIES = ("torch", "transformers", "pyzmq", "msgspec", "safetensors", "numpy")


def prepare_run(config: Config, directory: Path | None, say: Callable[[str], None], *, is_latest: bool = True) -> RunDirectory:
    """Make a run's directory below config.run.directory (or at `directory`), with everything that its processes need.

    `is_latest`: commands that are not told which run are then about this one.
    Raises ConfigError and TaskError before anything is written, and what training the policy raises.
    """
    config = with_calibration(config)
    task = load_task(config.task.name, config.task.options)
    if task.num_train < 1 or task.num_heldout < 1:
        raise ConfigError("task", config.task.name, "has an empty split", "give it at least one problem in each split")
    if task.num_train > MAX_PROMPTS:
        raise ConfigError(
            "task", config.task.name, f"has {task.num_train} training problems, at most 2^63 can be numbered", "give it fewer"
        )
    policy = resolve_policy(config, say)
    check_room(config, task, policy)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    root = Path(config.run.directory)
    path = (directory or root / f"{config.run.name}-{stamp}").absolute()
    if not _RUN_ID.match(path.name):
        fix = "end it in a name of letters, digits, dot, dash and underscore: it is the run's id"
        raise ConfigError("--directory", str(path), f"{path.name!r} cannot be a run's id", fix)
    if (path / "run.json").exists():
        raise ConfigError(
            "--directory", str(path), "holds a run already", f"go on with it by `cli.py up --resume {path}`, or choose another"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--directory", str(path), f"cannot be made ({error.strerror})", "give a folder that can be written") from None
    make_keys(path / "keys")
    run = RunDirectory(path)
    manifest = RunManifest(
        run=path.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        policy=str(policy),
        num_prompts=task.num_train,
        policy_files=policy_files(policy, BlobStore(path / "blobs")),
        versions=_versions(),
        source=_source(),
    )
    run.create(config, manifest)
    if is_latest:
        _point_latest(root, path)
    return run


def resolve_policy(config: Config, say: Callable[[str], None]) -> Path:
    """The folder of the policy to start from: a folder as given, a hub id fetched, or a small policy trained once and cached."""
    if config.policy.path is None:
        return _supervised_policy(config, say)
    folder = Path(config.policy.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ConfigError("policy.path", str(folder), "has no config.json", "give a Hugging Face model folder")
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.policy.path, ignore_patterns=["*.gguf", "*.pth", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"is neither a folder nor a model that the hub gives ({type(error).__name__})"
        raise ConfigError(
            "policy.path", config.policy.path, problem, "give a folder, or an id and a network that reaches the hub"
        ) from error


def check_room(config: Config, task: Task, policy: Path) -> None:
    """Raise ConfigError if the policy has no room for a prompt and a completion, by its own configuration and a sample of prompts."""
    settings = json.loads((policy / "config.json").read_bytes())
    room = settings.get("max_position_embeddings") or settings.get("text_config", {}).get("max_position_embeddings")
    if isinstance(room, int) and config.rollout.max_tokens >= room:
        problem = f"the policy has room for {room} tokens, prompt included"
        raise ConfigError("rollout.max_tokens", config.rollout.max_tokens, problem, f"less than {room}, by the length of a prompt")


def cache_folder() -> Path:
    """Where policies are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slipstream"


def _supervised_policy(config: Config, say: Callable[[str], None]) -> Path:
    """Train the supervised policy in a process of its own, unless a run with the same settings has done so before."""
    recipe = config.task.model_dump_json() + config.supervised.model_dump_json() + f"{config.rollout.max_tokens}/{supervised_seed(config)}"
    folder = cache_folder() / "policies" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if (folder / "supervised.json").exists():
        say(f"policy: using the supervised policy in {folder}")
        return folder
    say(f"policy: training a small Llama on the task's solutions until its held-out reward is {config.supervised.target_reward}")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    settings = partial / "settings.json"
    settings.write_text(config.model_dump_json())
    try:
        child = subprocess.Popen(
            [sys.executable, str(CLI), "prepare", str(settings), str(partial)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            assert child.stdout is not None
            with child.stdout as lines:
                for line in filter(str.strip, lines):
                    say(f"policy: {line.rstrip()}")
        except BaseException:
            child.kill()
            raise
        finally:
            code = child.wait()
        if code:
            raise SlipstreamError(f"the supervised policy could not be trained (exit code {code}); the lines above say why")
        settings.unlink()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def supervised_seed(config: Config) -> int:
    """What fixes the supervised policy beside its recipe."""
    return config.run.seed if config.supervised.seed is None else config.supervised.seed


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def _source() -> dict[str, str]:
    """The git commit this program runs from and whether it was changed, as far as git can tell."""
    found = {}
    for name, command in {"commit": ["rev-parse", "HEAD"], "changed": ["status", "--porcelain"]}.items():
        try:
            result = subprocess.run(["git", "-C", str(CLI.parent), *command], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        found[name] = result.stdout.strip() if name == "commit" else str(bool(result.stdout.strip())).lower()
    return found


def _point_latest(root: Path, path: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    link = root / "latest"
    temporary = root / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.resolve(), target_is_directory=True)
    temporary.replace(link)
