"""A recording as one file for other tools: Parquet or JSON lines, one row for each completion of every accepted group.

Rows are written as they are read, a few thousand at a time, so memory does not grow with the journal's payloads. The file gets its name
when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import blake3
import msgspec
import numpy as np
from numpy.typing import NDArray

from analysis.fates import Fates, read_fates
from analysis.recording import Recording
from analysis.text import PolicyText
from analysis.ticket import finish_name
from protocol import facts
from protocol.errors import ConfigError, JournalDamaged
from protocol.groups import decode_group

SUFFIXES: Final = (".parquet", ".jsonl")
ROWS_TOKENS: Final = 1 << 19
"""A Parquet row group is written once it holds this many tokens, or MAX_ROWS rows."""
MAX_ROWS: Final = 16384


class CompletionRow(msgspec.Struct, frozen=True, eq=False):
    """One completion. Times are seconds since 1970 (in Parquet: timestamps, UTC); lists have one entry for each token.

    `step` is the first step that uses it and `lag` its lag there; batch, step and lag are None for a group that is in no batch.
    Texts are None where there is no tokenizer. Advantages depend on the objective and are not in the recording.
    """

    ticket: int
    attempt: int
    completion: int
    batch: int | None
    step: int | None
    lag: int | None
    outcome: str
    actor: str
    epoch: str
    engine: str
    prompt: int
    prompt_text: str | None
    prompt_ids: NDArray[np.int32]
    text: str | None
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    reward: float
    finish: str
    issued: float | None
    accepted: float


def export(recording: Recording, out: Path, text: PolicyText, *, force: bool) -> int:
    """Write the file `out`; returns the number of rows. Raises ConfigError, and JournalDamaged for a payload that is not what was written.

    A file of that name is replaced only with `force`, and only by a complete one.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError("OUT", str(out), "is no kind of file that is written", f"end it in {' or '.join(SUFFIXES)}")
    if out.exists() and not force:
        raise ConfigError("OUT", str(out), "is there already", "give another name, or --force to replace it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    write = _write_parquet if out.suffix == ".parquet" else _write_jsonl
    try:
        num_rows = write(partial, completion_rows(recording, text))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise ConfigError(
            "OUT", str(out), f"cannot be written ({error.strerror or error})", "choose a folder with room to write in"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return num_rows


def completion_rows(recording: Recording, text: PolicyText) -> Iterator[CompletionRow]:
    """Every completion in the order that groups were accepted. Raises JournalDamaged."""
    fates = read_fates(recording)
    issued = _issue_times(recording)
    query = (
        "SELECT g.lsn, e.time, g.ticket, g.attempt, g.actor, g.epoch, g.oldest_step, g.payload, g.digest "
        "FROM groups g JOIN events e USING (lsn) WHERE g.lsn <= ? ORDER BY g.lsn"
    )
    for lsn, time, ticket, attempt, actor, epoch, oldest_step, payload, digest in recording.each(query, recording.last_lsn):
        if blake3.blake3(payload).digest() != digest:
            raise JournalDamaged(recording.path, f"the group of ticket {ticket} (event {lsn})", "its checksum does not match")
        times = issued.pop((ticket, attempt), None), time
        yield from _rows(payload, text, (ticket, attempt), _place(fates, ticket, lsn, oldest_step), (actor, epoch), times)


def _place(fates: Fates, ticket: int, lsn: int, oldest_step: int) -> dict[str, Any]:
    outcome = fates.outcome(ticket, lsn)
    batch = None if outcome == "sampled again" else fates.batch(ticket)
    if batch is None:
        return {"outcome": outcome, "batch": None, "step": None, "lag": None}
    return {"outcome": outcome, "batch": batch.number, "step": batch.first_step, "lag": batch.first_step - oldest_step}


def _rows(
    payload: bytes,
    text: PolicyText,
    ticket: tuple[int, int],
    place: dict[str, Any],
    made_by: tuple[str, str],
    times: tuple[float | None, float],
) -> Iterator[CompletionRow]:
    group = decode_group(payload)
    prompt_text = text.text(group.prompt_ids)
    for number, part in enumerate(group.completions()):
        yield CompletionRow(
            ticket=ticket[0],
            attempt=ticket[1],
            completion=number,
            **place,
            actor=made_by[0],
            epoch=made_by[1],
            engine=group.engine,
            prompt=group.prompt,
            prompt_text=prompt_text,
            prompt_ids=group.prompt_ids,
            text=text.text(group.token_ids[part]),
            token_ids=group.token_ids[part],
            logprobs=group.logprobs[part],
            versions=group.versions[part],
            reward=float(group.rewards[number]),
            finish=finish_name(int(group.finish[number])),
            issued=times[0],
            accepted=times[1],
        )


def _issue_times(recording: Recording) -> dict[tuple[int, int], float]:
    """When each attempt at a ticket was issued."""
    found = {}
    for _, time, fact in recording.facts(facts.TicketIssued):
        assert isinstance(fact, facts.TicketIssued)
        found[fact.ticket, fact.attempt] = time
    return found


# --- the two formats


def _write_jsonl(path: Path, rows: Iterator[CompletionRow]) -> int:
    num_rows = 0
    with path.open("wb") as file:
        for row in rows:
            file.write(msgspec.json.encode(row, enc_hook=np.ndarray.tolist) + b"\n")
            num_rows += 1
    return num_rows


def _write_parquet(path: Path, rows: Iterator[CompletionRow]) -> int:
    """zstd, with a checksum on every page: damage is noticed by readers that ask for it (`page_checksum_verification`)."""
    import pyarrow as pa
    from pyarrow import parquet

    schema, num_rows = _schema(pa), 0
    with parquet.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for some in _row_groups(rows):
            columns = {name: [getattr(row, name) for row in some] for name in schema.names}
            for name in ("issued", "accepted"):
                columns[name] = [None if time is None else datetime.fromtimestamp(time, UTC) for time in columns[name]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(some))
            num_rows += len(some)
    return num_rows


def _row_groups(rows: Iterator[CompletionRow]) -> Iterator[list[CompletionRow]]:
    some: list[CompletionRow] = []
    num_tokens = 0
    for row in rows:
        some.append(row)
        num_tokens += row.token_ids.size + row.prompt_ids.size
        if num_tokens >= ROWS_TOKENS or len(some) >= MAX_ROWS:
            yield some
            some, num_tokens = [], 0
    if some:
        yield some


def _schema(pa: Any) -> Any:
    number, numbers, name = pa.int64(), pa.list_(pa.int32()), pa.dictionary(pa.int32(), pa.string())
    time = pa.timestamp("us", tz="UTC")
    types: dict[str, Any] = {
        "ticket": number, "attempt": pa.int32(), "completion": pa.int32(), "batch": number, "step": number, "lag": number, "outcome": name,
        "actor": name, "epoch": name, "engine": name, "prompt": number, "prompt_text": pa.string(), "prompt_ids": numbers,
        "text": pa.string(), "token_ids": numbers, "logprobs": pa.list_(pa.float32()), "versions": numbers, "reward": pa.float32(),
        "finish": name, "issued": time, "accepted": time,
    }  # fmt: skip
    return pa.schema([pa.field(key, kind) for key, kind in types.items()])
