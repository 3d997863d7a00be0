"""A run's directory: everything there is about a run, in one place.

config.json      the resolved configuration           run.json       what the run is (RunManifest)
journal.sqlite   the recording                        blobs/         weights and the policy's files
metrics.jsonl    one line per step and evaluation     checkpoints/   learner checkpoints
keys/            CURVE keys, for their owner only     logs/          one file per process
commands.sh      the exact command of each process    broker.json    where the broker listens
summary.json     the result, with reward.png and lag.png
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import msgspec

from broker.blobs import BlobStore
from broker.recorded_weights import recorded_file
from protocol.config import Config, config_json, parse_config_json
from protocol.errors import ConfigError
from protocol.messages import NamedBlob

_FILE_NAME = re.compile(r"^[\w.\-]{1,128}$")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json")


class RunManifest(msgspec.Struct, frozen=True):
    """What a run is, fixed when it is made. `num_prompts` is the size of the training split."""

    run: str
    created: str
    policy: str
    num_prompts: int
    policy_files: list[NamedBlob]
    versions: dict[str, str]
    source: dict[str, str]


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys, self.logs, self.checkpoints = path / "keys", path / "logs", path / "checkpoints"
        self.commands, self.summary = path / "commands.sh", path / "summary.json"

    def create(self, config: Config, manifest: RunManifest) -> None:
        """Write the fixed files."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.json", config_json(config).encode())
        write_atomically(self.path / "run.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2))

    def change_config(self, config: Config) -> None:
        """Replace the resolved configuration."""
        write_atomically(self.path / "config.json", config_json(config).encode())

    def config(self) -> Config:
        """The resolved configuration. Raises ConfigError if this is not a run's directory."""
        try:
            return parse_config_json(self._read("config.json"))
        except (ValueError, RecursionError) as error:
            raise self._damaged("config.json", error) from None

    def manifest(self) -> RunManifest:
        """What the run is. Raises ConfigError if this is not a run's directory."""
        try:
            return msgspec.json.decode(self._read("run.json"), type=RunManifest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged("run.json", error) from None

    def policy(self) -> Path:
        """The folder of the run's policy: where it was, or below the run, where it is put together if that is gone."""
        given = Path(self.manifest().policy)
        return given if (given / "config.json").exists() else self.path / "policy"

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError:
            fix = "give the directory of a run, as printed by `cli.py up`"
            raise ConfigError("--run", str(self.path), f"has no {name}", fix) from None

    def _damaged(self, name: str, error: Exception) -> ConfigError:
        fix = "give another run's directory, or put the file back as it was written when the run was made"
        return ConfigError("--run", str(self.path), f"its {name} cannot be read ({error})", fix)

    def announce_broker(self, address: str) -> None:
        """Say where the broker listens."""
        write_atomically(self.path / "broker.json", json.dumps({"address": address, "pid": os.getpid()}).encode())

    def broker_address(self) -> str | None:
        """Where the broker listens, None if it never has. Raises ConfigError if the file that says so is damaged."""
        try:
            return str(json.loads((self.path / "broker.json").read_bytes())["address"])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._damaged("broker.json", error) from None

    def broker_process(self) -> int | None:
        """The id of the process that announced itself as the run's broker last, None if there was none."""
        try:
            return int(json.loads((self.path / "broker.json").read_bytes())["pid"])
        except FileNotFoundError:
            return None


def policy_files(folder: Path, blobs: BlobStore) -> list[NamedBlob]:
    """The files of a policy's folder, put in the blob store."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _FILE_NAME.match(path.name))
    return [NamedBlob(path.name, blobs.link(path)) for path in files]


def assemble_policy(files: list[NamedBlob], blobs: BlobStore, folder: Path) -> None:
    """Put a policy's folder together from the blob store, as links that go with the run. Raises WeightsError for a file that is not whole."""
    sources = {file.name: recorded_file(blobs, file.blob).resolve() for file in files}
    partial = folder.with_name(f".{folder.name}.partial")
    for left_over in (partial, folder):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir()
    for name, source in sources.items():
        (partial / name).symlink_to(os.path.relpath(source, partial.resolve()))
    partial.rename(folder)


def is_weights(name: str) -> bool:
    """Whether a policy file holds weights, which actors take from publications instead."""
    return name.endswith(WEIGHT_SUFFIXES)


def latest_run(directory: Path) -> RunDirectory:
    """The run that was started last below `directory`. Raises ConfigError if there is none."""
    link = directory / "latest"
    if not link.exists():
        raise ConfigError("--run", str(directory), "holds no run yet", "start one with `cli.py up`, or give --run DIRECTORY")
    return RunDirectory(link.resolve())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
