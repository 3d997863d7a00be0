"""Targets: what lies on disks. The journal (its rows and its bytes), configurations, key files, and the small files of a run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import sqlite3
import tempfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from broker.core import Broker
from broker.journal import Journal
from broker.keys import KeyFile, add_key, allowed_keys, load_key, make_keys
from deploy.rundir import RunDirectory, RunManifest
from protocol import facts
from protocol.config import Config, config_json, load_config, parse_config
from protocol.errors import CheckpointError, ConfigError, JournalDamaged, JournalError, KeyFileError
from protocol.journal import JOURNAL_NAME, SCHEMA, open_read_only, read_facts, read_payload
from protocol.messages import NamedBlob
from protocol.weights import BlobRef, PolicyVersion
from tests.fuzz.fuzzing import Target
from tests.fuzz.mutate import damage_bytes, damage_json, damage_msgpack
from tests.fuzz.values import random_struct

DIGEST: Final = "ab" * 32


@functools.cache
def room() -> Path:
    """A folder in memory where there is one: what is fuzzed is not the disk. Gone when the process ends."""
    shared = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared if os.access(shared, os.W_OK) else None)
    _kept.append(made)
    return Path(made.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def in_turn(*steps: Callable[[], object], expected: tuple[type[Exception], ...]) -> None:
    """Every step, whatever the ones before came to; then the last expected error, if there was one."""
    refused: Exception | None = None
    for step in steps:
        try:
            step()
        except expected as error:
            refused = error
    if refused is not None:
        raise refused


# --- the journal


def history() -> list[facts.AnyFact]:
    """A short run that a broker can recover: one batch of two groups, trained on; one more ticket in hand."""
    version = PolicyVersion(0, 0, 0, "root")
    return [
        facts.RunStarted("fuzz", 0),
        facts.ActorJoined("a", "e", "engine", "host"),
        facts.LearnerStarted("s", 0, 0, 1),
        facts.VersionPublished(version, -1, None, None, 10, 10, is_base=True),
        facts.VersionPublished(PolicyVersion(1, 0, 0, "other"), 0, BlobRef(DIGEST, 9), BlobRef(DIGEST, 9), 10, 10, seconds={"code": 0.5}),
        facts.TicketIssued(0, 1, "a", "e", 0, 0),
        facts.TicketIssued(1, 1, "a", "e", 0, 0),
        facts.TicketRevoked(1, 1, "silent"),
        facts.TicketIssued(1, 2, "a", "e", 0, 0),
        facts.GroupAccepted("a", "e", 1, 0, 1, [0], 0, 12, 0.5),
        facts.AttemptFailed("a", "e", 2, 1, 2, "no"),
        facts.GroupAccepted("a", "e", 3, 1, 2, [0, 1], 0, 12, 0.25),
        facts.ResultRefused("a", "e", 4, 1, "already done"),
        facts.BatchFormed(0, 0, [0, 1]),
        facts.StepCommitted(0, 0, 0, [0, 0], {"loss": 1.0, "nan": None}),
        facts.Evaluated(1, 0.5, 8),
        facts.TicketIssued(2, 1, "a", "e", 1, 0),
        facts.TicketEnded(2, "expired", "old"),
        facts.VersionAnchored(1, 0, BlobRef(DIGEST, 9)),
        facts.VersionOrphaned(1, 0),
        facts.VersionReproduced(1, 0),
        facts.DeltasDropped(0),
        facts.TicketIssued(3, 1, "a", "e", 1, 0),
        facts.ActorsDesired(2),
        facts.RunStopping("asked"),
        facts.RunEnded(""),
        facts.ActorLeft("a", "e", "left"),
        facts.LearnerFinished(1, {"x": 1.0}),
    ]


def _histories() -> Sequence[bytes]:
    """Rows as they are in the table: place, time, body."""
    rows = [[lsn, 1.5, msgspec.json.encode(fact).decode()] for lsn, fact in enumerate(history(), 1)]
    rng = random.Random("facts")
    kinds = typing.get_args(facts.AnyFact)
    more = [
        [29 + n, 2.0, msgspec.json.encode(random_struct(rng, kinds[n % len(kinds)], [0, 1, 2])).decode()] for n in range(2 * len(kinds))
    ]
    return [msgspec.msgpack.encode(rows), msgspec.msgpack.encode(rows[:14]), msgspec.msgpack.encode(rows + more)]


def _damage_history(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.4:
        return damage_msgpack(rng, seeds)
    rows = msgspec.msgpack.decode(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(rows))
        match rng.randrange(4):
            case 0:
                del rows[place]
            case 1:
                rows.insert(rng.randrange(len(rows)), rows[place])
            case _:
                body = rows[place][2]
                body = damage_json(rng, [body.encode() if isinstance(body, str) else body])
                rows[place] = [*rows[place][:2], body if rng.random() < 0.1 else body.decode("utf-8", "replace")]
        if rng.random() < 0.8:
            rows = [[lsn, *row[1:]] for lsn, row in enumerate(rows, 1)]
        if not rows:
            break
    return msgspec.msgpack.encode(rows)


def _rows_of(data: bytes) -> list[tuple[Any, Any, Any]]:
    """The rows in an input; whatever is not one becomes one whose body it is."""
    try:
        decoded = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        decoded = [data]
    rows = []
    for number, row in enumerate(decoded if isinstance(decoded, list) else [decoded], 1):
        lsn, time, body = row if isinstance(row, list) and len(row) == 3 else (number, 0.0, row)
        lsn = lsn if isinstance(lsn, int) and not isinstance(lsn, bool) and abs(lsn) < 1 << 63 else number
        rows.append((lsn, _storable(time), _storable(body)))
    return list({row[0]: row for row in rows}.values())


def _storable(value: Any) -> Any:
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else float(value)
    return value if isinstance(value, float | str | bytes | None) else msgspec.msgpack.encode(value)


@functools.cache
def _loose_tables() -> sqlite3.Connection:
    """A journal in memory whose columns take values of any type, as a damaged file may hold them."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in SCHEMA:
        connection.execute(statement.replace(" STRICT", "").replace(" NOT NULL", "").replace("TEXT", "ANY").replace("REAL", "ANY"))
    return connection


def _check_rows(data: bytes) -> None:
    connection, path = _loose_tables(), Path("fuzz.sqlite")
    for table in ("events", "groups"):
        connection.execute(f"DELETE FROM {table}")
    rows = _rows_of(data)
    connection.executemany("INSERT INTO events VALUES (?, ?, NULL, ?)", rows)
    connection.executemany(
        "INSERT INTO groups (lsn, ticket, payload, digest) VALUES (?, ?, ?, ?)", [(lsn, lsn, b, t) for lsn, t, b in rows]
    )
    for lsn, _, _ in rows[:3]:
        with contextlib.suppress(JournalDamaged):
            read_payload(connection, path, lsn)
    for _ in read_facts(connection, path):
        pass


def fuzz_config() -> Config:
    """A run of two groups a batch."""
    return parse_config({"run": {"steps": 6}, "rollout": {"group_size": 2, "groups_per_batch": 2}, "policy": {"max_lag": 2}})


def make_broker(directory: Path) -> Broker:
    """A broker on `directory`, new or recovered."""
    return Broker(directory, "fuzz", fuzz_config(), 5, [], now=0.0, wall=1.0)


@functools.cache
def _empty_run() -> Path:
    directory = room() / "empty"
    make_broker(directory).close()
    with contextlib.closing(sqlite3.connect(directory / JOURNAL_NAME, isolation_level=None)) as connection:
        connection.execute("DELETE FROM events")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    return directory / JOURNAL_NAME


def _check_recovery(data: bytes) -> None:
    """A broker starts on a journal that can be read, whatever its facts say, or says where it is damaged."""
    directory = room() / "recovery"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    shutil.copyfile(_empty_run(), directory / JOURNAL_NAME)
    with contextlib.closing(sqlite3.connect(directory / JOURNAL_NAME, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for lsn, time, body in _rows_of(data):
            with contextlib.suppress(sqlite3.IntegrityError):  # what these tables do not take is for `rows`
                connection.execute("INSERT INTO events VALUES (?, ?, 'fact', ?)", (lsn, time, body))
        connection.execute("COMMIT")
    broker = make_broker(directory)
    counts = broker.ledger.tickets.counts
    broker.close()
    assert counts.conserved, counts


def _journal_files() -> Sequence[bytes]:
    """A journal as it is written, and one with small pages, where a random byte more often matters."""
    path = room() / "seed.sqlite"
    journal = Journal(path, "fuzz", "{}")
    for fact in history():
        journal.append(fact, b"payload" * 9, 1.0)
    journal.commit()
    journal.close()
    whole = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA page_size = 512")
        connection.execute("VACUUM")
    small = path.read_bytes()
    assert len(small) < 40_000 < len(whole)
    return [small, small, small, whole]


def _damage_journal(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """As bytes; the large one only in place, as a cut to the size that other inputs keep would leave nothing of it."""
    data = rng.choice(seeds)
    if len(data) < 40_000 and rng.random() < 0.7:
        return damage_bytes(rng, [data])
    found = bytearray(data)
    for _ in range(rng.choice([1, 4, 16])):
        place = rng.choice([rng.randrange(len(found)), rng.randrange(100), rng.randrange(0, len(found), 512) + rng.randrange(16)])
        found[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    if rng.random() < 0.2:
        page = rng.choice([512, 16384])
        one, other = rng.randrange(0, len(found), page), rng.randrange(0, len(found), page)
        found[one : one + page] = found[other : other + page]
    return bytes(found)


def _check_journal_file(data: bytes) -> None:
    path = room() / "journal.sqlite"
    for suffix in ("-wal", "-shm", "-journal", "-mark"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(data)

    def read() -> None:
        with contextlib.closing(open_read_only(path)) as connection:
            in_turn(
                lambda: list(read_facts(connection, path)),
                lambda: read_payload(connection, path, 0),
                lambda: read_payload(connection, path, 1),
                expected=(JournalError,),
            )

    def write() -> None:
        journal = Journal(path, "fuzz", "{}")
        try:
            journal.entries()
            journal.payload(1)
            journal.append(facts.GroupAccepted("a", "e", 5, 3, 1, [0], 0, 12, 0.5), b"payload", 2.0)
            journal.commit()
        finally:
            journal.close()

    in_turn(read, write, expected=(JournalError,))


# --- configurations


def _configs() -> Sequence[bytes]:
    sections = [
        f"[{section}]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items() if value is not None)
        for section, fields in msgspec.json.decode(config_json(Config())).items()
    ]
    options = "[task]\nname = 'x'\nlimit = 1979-05-27T07:32:00Z\nodds = [1.5, inf, {a = 1}]\n"
    return [text.encode() for text in (*sections, options, "\n".join(sections[:3]))]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


_STRANGE_TOML: Final = [
    "[" * 2000, "{a=" * 2000, "9" * 5000, "0x" + "f" * 5000, "-1", "1e999", "nan", "-inf", "true", "''", "{}", "[]", "[[1]]",
    "1979-05-27T07:32:00Z", "9999-99-99", "0", "18446744073709551616", '"\\ud800"', '"""', "a.b", "1\n[run]\nseed = 2", "'x'", "1.5",
    "[" + "1," * 3000 + "]",
]  # fmt: skip


def _damage_config(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(rng, seeds)
    lines = rng.choice(seeds).decode().splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(lines))
        name, equals, _ = lines[place].partition("=")
        match rng.randrange(6):
            case 0:
                lines.insert(
                    place, rng.choice(["[run]", "[[actor]]", "[actor.x]", "a.b.c = 1", "'' = 1", ".".join("a" * 300) + " = 1", "= 1"])
                )
            case 1:
                lines[place] = lines[rng.randrange(len(lines))]
            case _ if equals:
                lines[place] = f"{name}= {rng.choice(_STRANGE_TOML)}"
            case _:
                lines[place] = rng.choice(_STRANGE_TOML)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _check_config(data: bytes) -> None:
    """As a file, and each line as an override."""
    path = room() / "config.toml"
    path.write_bytes(data)
    lines = [line for line in data.decode("utf-8", "replace").splitlines() if "=" in line]
    overrides = [f"{section}.{line.strip()}" for section, line in zip(("run", "x"), lines[:2], strict=False)]

    for override in overrides:
        with contextlib.suppress(ConfigError):
            load_config(path, [override])
    config = load_config(path)
    assert parse_config(json.loads(config_json(config))).run == config.run
    assert config.pacing.num_batches > 0


# --- key files


def _keys() -> Sequence[bytes]:
    folder = room() / "keys"
    if not folder.exists():
        make_keys(folder)
        add_key(folder, "actor", "more")
    return [(folder / "actor.key").read_bytes(), (folder / "broker.key").read_bytes()]


def _damage_key(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return damage_bytes(rng, seeds)
    lines = rng.choice(seeds).decode().splitlines()
    place = rng.randrange(len(lines))
    name = rng.choice([lines[place].partition("=")[0], "role ", "more "])
    forty = ["[" + "1," * 40 + "]", "'" + "é" * 40 + "'", "'" + " " * 40 + "'", "'" + "\\" * 40 + "'"]
    lines[place] = f"{name}= {rng.choice([*_STRANGE_TOML, *forty])}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _check_key(data: bytes) -> None:
    """As a key file, and as the list of a role's further public keys."""
    path = room() / "damaged.key"
    path.write_bytes(data)
    path.chmod(0o600)
    (room() / "keys" / "actor-more.pub").write_bytes(data)

    def load() -> None:
        key = load_key(path)
        assert all(isinstance(part, str) and len(part.encode("ascii")) == 40 for part in (key.public, key.secret, key.broker))
        assert isinstance(key, KeyFile) and isinstance(key.role, str)

    in_turn(load, lambda: allowed_keys(room() / "keys"), expected=(KeyFileError,))


# --- the small files of a run and of a checkpoint


def _run_files() -> Sequence[bytes]:
    manifest = RunManifest("run", "today", "folder", 9, [NamedBlob("config.json", BlobRef(DIGEST, 9))], {"torch": "2"}, {"commit": "none"})
    return [config_json(Config()).encode(), msgspec.json.encode(manifest), b'{"address": "tcp://127.0.0.1:20000", "pid": 7}']


def _check_run_files(data: bytes) -> None:
    """Each of the three files with these bytes; it is good if one of them is."""
    run = RunDirectory(room() / "run")
    run.path.mkdir(exist_ok=True)
    refused: list[ConfigError] = []
    for name, read in (("config.json", run.config), ("run.json", run.manifest), ("broker.json", run.broker_address)):
        (run.path / name).write_bytes(data)
        try:
            read()
        except ConfigError as error:
            refused.append(error)
    if len(refused) == 3:
        raise refused[0]


def _states() -> Sequence[bytes]:
    return [b'{"run":"run","step":50,"version":[3,50,0,"' + DIGEST.encode() + b'"]}']


def _check_state(data: bytes) -> None:
    """Read for a resume, and looked at for damage."""
    from learner.damage import STATE_NAME, damage, load_state

    checkpoint = room() / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / STATE_NAME).write_bytes(data)
    assert isinstance(damage(checkpoint), str)
    assert load_state(checkpoint, "run").run == "run"


def targets() -> dict[str, Target]:
    """By name."""
    return {
        "journal_rows": Target(_histories, _check_rows, (JournalDamaged,), _damage_history, share=0.5),
        "journal_recovery": Target(_histories, _check_recovery, (JournalError,), _damage_history, share=0.05),
        "journal_file": Target(_journal_files, _check_journal_file, (JournalError,), _damage_journal, share=0.1),
        "config": Target(_configs, _check_config, (ConfigError,), _damage_config, share=0.03),
        "key": Target(_keys, _check_key, (KeyFileError,), _damage_key, share=0.1),
        "run_files": Target(_run_files, _check_run_files, (ConfigError,), damage_json, share=0.3),
        "checkpoint_state": Target(_states, _check_state, (CheckpointError,), damage_json, share=0.3),
    }
