"""Reading questions and answers from JSON Lines, Parquet, or a Hugging Face data set."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from protocol.errors import ConfigError, TaskError

_JSON_LINES = {".jsonl", ".ndjson"}
_PARQUET = {".parquet", ".pq"}


class Row(NamedTuple):
    """A question, its answer, and where they were read, for messages."""

    question: str
    answer: str
    where: str


class Source(NamedTuple):
    """Where rows come from.

    `field` is the option that gives `path`, for messages; `question` and `answer` are names of fields or columns;
    `subset` and `split` are only for Hugging Face data sets.
    """

    field: str
    path: str
    question: str
    answer: str
    subset: str | None
    split: str


def read_rows(source: Source) -> list[Row]:
    """All rows of `source`, in order.

    ConfigError if the source cannot be opened or is of another format; TaskError, naming the file and the line or
    row, if it is damaged, a field is missing, or there are no rows at all.
    """
    rows = [_row(source, where, record) for where, record in _records(source)]
    if not rows:
        raise TaskError(f"{source.path} has no rows")
    return rows


def _records(source: Source) -> Iterable[tuple[str, Mapping[str, Any]]]:
    path = Path(source.path)
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES | _PARQUET and not path.is_file():
        raise ConfigError(source.field, source.path, "there is no such file", "check the path")
    if suffix in _JSON_LINES:
        return _json_lines(path)
    if suffix in _PARQUET:
        return _parquet(path, [source.question, source.answer])
    if path.is_file():
        raise ConfigError(
            source.field,
            source.path,
            "not a file format that can be read",
            f"convert it to JSON Lines ({', '.join(sorted(_JSON_LINES))}) or Parquet ({', '.join(sorted(_PARQUET))})",
        )
    return _hugging_face(source)


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {line_number}"
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise TaskError(f"{where}: not a JSON object: {error}") from error
            yield where, record


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [column for column in columns if column not in names]
            if missing:
                raise TaskError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(names)}")
            table = file.read(columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: not a Parquet file that can be read: {error}") from error
    for row_number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {row_number}", record


def _hugging_face(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            source.field,
            source.path,
            "not a .jsonl or .parquet file, and Hugging Face data sets need a package that is not installed",
            "pip install slipstream-rl[datasets]",
        ) from error
    try:
        records = datasets.load_dataset(source.path, name=source.subset, split=source.split)
    # Not found, no network, no such subset or split: all of them are OSError or ValueError.
    except (OSError, ValueError) as error:
        raise ConfigError(
            source.field,
            source.path,
            f"cannot be loaded with subset {source.subset!r} and split {source.split!r}: {error}",
            "check the id, task.subset and the split, or download it and give the path of a file",
        ) from error
    for row_number, record in enumerate(records, start=1):
        yield f"{source.path} ({source.split}), row {row_number}", record


def _row(source: Source, where: str, record: Mapping[str, Any]) -> Row:
    return Row(_text(where, record, source.question), _text(where, record, source.answer), where)


def _text(where: str, record: Mapping[str, Any], field: str) -> str:
    """The field as non-empty text; numbers are accepted because many answers are numbers."""
    if field not in record:
        raise TaskError(f"{where}: no field {field!r}; its fields are {', '.join(record)}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TaskError(f"{where}: field {field!r} is {value!r}, but text or a number is needed")
    if not str(value).strip():
        raise TaskError(f"{where}: field {field!r} is empty")
    return str(value)
