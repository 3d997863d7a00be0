"""`inspect export` writes every completion once, whole or not at all, and never over something that is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import Result

from analysis import export as exporting
from analysis.recording import Recording
from analysis.text import find_text
from protocol.errors import ConfigError, JournalDamaged
from tests.analysis.recorded import START
from tests.analysis.test_verify import damage

Inspect = Callable[..., Result]


def test_every_completion_is_a_row_with_its_tokens_and_texts(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    assert "36 completions" in inspect("export", eventful, tmp_path / "run.jsonl").stdout
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    one = next(row for row in rows if (row["ticket"], row["completion"]) == (9, 1))
    assert (one["attempt"], one["batch"], one["step"], one["lag"], one["outcome"]) == (1, 4, 4, 2, "consumed")
    assert (one["actor"], one["epoch"], one["engine"], one["finish"], one["reward"]) == ("a", "a-1", "scripted/cpu", "full", 1.0)
    assert (one["prompt_text"], one["prompt_ids"]) == ("9+3=", [9, 10, 3, 11])
    assert one["text"] == "".join("0123456789+="[token] for token in one["token_ids"])
    assert one["versions"] == [2, 3, 3, 3]
    assert len(one["token_ids"]) == len(one["logprobs"]) == 4
    assert START < one["issued"] < one["accepted"]
    again = [row for row in rows if row["outcome"] == "sampled again"]
    assert [(row["ticket"], row["batch"], row["step"], row["lag"]) for row in again] == [(n, None, None, None) for n in (13, 13, 15, 15)]


def test_parquet_says_the_same_as_json_lines(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    inspect("export", eventful, tmp_path / "run.jsonl")
    inspect("export", eventful, tmp_path / "run.parquet")
    table = parquet.read_table(tmp_path / "run.parquet", page_checksum_verification=True)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert table.column_names == list(lines[0])
    for row, line in zip(table.to_pylist(), lines, strict=True):
        for name in ("issued", "accepted"):
            assert row.pop(name) == datetime.fromtimestamp(line.pop(name), UTC)
        assert row.pop("logprobs") == pytest.approx(line.pop("logprobs"), rel=1e-7)
        assert row == line


def test_parquet_has_zstd_and_checksums_that_notice_a_flipped_bit(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    inspect("export", eventful, path)
    column = parquet.read_metadata(path).row_group(0).column(parquet.read_schema(path).names.index("reward"))
    assert column.compression == "ZSTD"
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        parquet.read_table(path, page_checksum_verification=True)


def test_rows_are_written_as_they_are_read(eventful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a row group is held: when a row is asked for, at most the group it falls into is not yet in the file."""
    monkeypatch.setattr(exporting, "MAX_ROWS", 5)
    written: list[int] = []
    write_table = parquet.ParquetWriter.write_table

    def count(self: parquet.ParquetWriter, table: pa.Table, row_group_size: int) -> None:
        write_table(self, table, row_group_size)
        written.append(table.num_rows)

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", count)
    held: list[int] = []

    def watched(rows: Iterator[exporting.CompletionRow]) -> Iterator[exporting.CompletionRow]:
        for place, row in enumerate(rows):
            held.append(place - sum(written))
            yield row

    original = exporting.completion_rows
    monkeypatch.setattr(exporting, "completion_rows", lambda recording, text: watched(original(recording, text)))
    with Recording(eventful) as recording:
        assert exporting.export(recording, tmp_path / "run.parquet", find_text(recording), force=False) == 36
    assert max(held) < 5
    assert parquet.read_metadata(tmp_path / "run.parquet").num_row_groups == 8


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="--force to replace it"):
        inspect("export", eventful, path)
    assert path.read_text() == "mine"
    inspect("export", eventful, path, "--force")
    assert len(path.read_text().splitlines()) == 36


@pytest.mark.parametrize("name", ["run.parquet", "run.jsonl"])
def test_damage_leaves_nothing_behind_and_a_file_to_be_replaced_as_it_was(copy: Path, inspect: Inspect, tmp_path: Path, name: str) -> None:
    damage(copy, "UPDATE groups SET payload = x'00' WHERE ticket = 12")
    (tmp_path / name).write_text("mine")
    with pytest.raises(JournalDamaged, match="the group of ticket 12"):
        inspect("export", copy, tmp_path / name, "--force")
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", name]


def test_names_that_cannot_be_written_are_refused(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end it in \.parquet or \.jsonl"):
        inspect("export", eventful, tmp_path / "run.csv")
    with pytest.raises(ConfigError, match="cannot be written"):
        inspect("export", eventful, tmp_path / "nowhere" / "run.parquet")


def test_without_a_tokenizer_there_are_ids_and_no_texts(copy: Path, inspect: Inspect, tmp_path: Path) -> None:
    (copy / "run.json").unlink()
    assert "no texts: run.json names no tokenizer.json" in inspect("export", copy, tmp_path / "run.jsonl").stdout
    row = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert (row["text"], row["prompt_text"]) == (None, None)
    assert row["token_ids"]
