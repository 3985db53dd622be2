"""Texts from files: one a row, read row by row."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec

from portcullis_client.cli.session import Complaint

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "txt"}
_STANDARD_INPUT = "-"
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """`number`: from 1; of a line in text files. `text` None: there is none, and `problem` says why."""

    number: int
    id: str | None
    text: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """`id_column` None: `id`, if there is such a column."""

    path: str
    format: str
    text_column: str
    id_column: str | None

    def rows(self) -> Iterator[Row]:
        """Raises `Complaint` for a file that cannot be used at all."""
        match self.format:
            case "jsonl":
                yield from self._jsonl()
            case "csv":
                yield from self._csv(",")
            case "tsv":
                yield from self._csv("\t")
            case "parquet":
                yield from self._parquet()
            case _:
                yield from self._txt()

    def count(self) -> int | None:
        """How many rows there are; None when that cannot be told without using them up."""
        if self.path == _STANDARD_INPUT:
            return None
        if self.format == "parquet":
            rows: int = _parquet_file(self.path).metadata.num_rows
            return rows
        return sum(1 for _ in self.rows())

    # --- by format -------------------------------------------------------------------------------------------------------

    def _txt(self) -> Iterator[Row]:
        with self._opened() as file:
            for number, line in enumerate(file, 1):
                if text := line.rstrip("\r\n"):
                    yield Row(number, None, text)

    def _jsonl(self) -> Iterator[Row]:
        decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
        with self._opened() as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    # Only what is asked for is decoded: the rest may be large, and need not be sound.
                    fields = decoder.decode(line)
                    values = {name: msgspec.json.decode(fields[name]) for name in self._wanted if name in fields}
                except msgspec.ValidationError:
                    yield Row(number, None, None, "not a JSON object")
                except (msgspec.DecodeError, UnicodeError, RecursionError):
                    yield Row(number, None, None, "not JSON")
                else:
                    yield self._row(number, values.get)

    def _csv(self, delimiter: str) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)
        with self._opened(newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                self._require(list(reader.fieldnames or ()))
                for number, fields in enumerate(reader, 1):
                    yield self._row(number, fields.get)
            except csv.Error as error:
                raise Complaint(f"{self.path}: line {reader.line_num} is not CSV: {error}") from None

    def _parquet(self) -> Iterator[Row]:
        file = _parquet_file(self.path)
        self._require(file.schema_arrow.names)
        columns = [name for name in self._wanted if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for fields in batch.to_pylist():
                number += 1
                yield self._row(number, fields.get)

    # --- what they share -------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, newline: str | None = "\n") -> Iterator[TextIO]:
        """UTF-8, with or without a byte order mark. Lines end at newlines alone."""
        try:
            if self.path == _STANDARD_INPUT:
                sys.stdin.reconfigure(encoding="utf-8-sig", newline=newline)  # type: ignore[union-attr]
                yield sys.stdin
            else:
                with Path(self.path).open(encoding="utf-8-sig", newline=newline) as file:
                    yield file
        except UnicodeDecodeError as error:
            raise Complaint(f"{self.path} is not UTF-8: {error.reason} at byte {error.start} of a block") from None

    @property
    def _wanted(self) -> tuple[str, str]:
        return self.text_column, self.id_column or "id"

    def _require(self, names: list[str]) -> None:
        for name in (self.text_column, self.id_column):
            if name is not None and name not in names:
                known = ", ".join(names) or "none"
                option = "--text-column" if name == self.text_column else "--id-column"
                raise Complaint(f"{self.path} has no column {name!r}; choose with {option} among: {known}")

    def _row(self, number: int, get: Callable[[str], Any]) -> Row:
        id_value, text = get(self._wanted[1]), get(self.text_column)
        item_id = None if id_value is None else str(id_value)
        if not isinstance(text, str):
            return Row(number, item_id, None, f"no text in {self.text_column!r}")
        return Row(number, item_id, text)


def _parquet_file(path: str) -> Any:
    try:
        import pyarrow.parquet as parquet  # an extra that few need
        from pyarrow import ArrowInvalid
    except ImportError:
        raise Complaint("Parquet files need pyarrow, which portcullis-client[parquet] brings") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid:
        raise Complaint(f"{path} is not a Parquet file") from None


def source_of(path: str, chosen: str | None, text_column: str, id_column: str | None) -> Source:
    """Raises `Complaint` when the format cannot be told."""
    found = chosen or FORMATS.get(Path(path).suffix.lower())
    if found is None:
        raise Complaint(f"the format of {path} cannot be told from its name; say --format")
    if path == _STANDARD_INPUT and found == "parquet":
        raise Complaint("a Parquet file cannot be read from standard input")
    return Source(path, found, text_column, id_column)


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """FILE, --format, --text-column and --id-column."""
    for decorate in (
        click.option("--id-column", metavar="NAME", help="Comes back with each result.  [default: id, if there is one]"),
        click.option("--text-column", metavar="NAME", default="text", show_default=True, help="Where the text is."),
        click.option(
            "--format",
            "chosen",
            type=click.Choice(sorted(set(FORMATS.values()))),
            help="What FILE is.  [default: by its name]",
        ),
        click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True)),
    ):
        command = decorate(command)
    return command
