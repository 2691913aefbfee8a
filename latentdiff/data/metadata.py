"""metadata.jsonl and metadata.csv: a row for each image of a folder, with its label and captions."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from latentdiff.data.file_report import FileReport, listed
from latentdiff.data.image_files import image_suffixes, leaves, one_line
from latentdiff.data.image_source import TEXT_COLUMNS, Columns, captions_of
from latentdiff.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")  # the first that exists is read
FILE_COLUMN, LABEL_COLUMN = "file_name", "label"
DELIMITERS = ",;\t"
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass
class Row:
    """One image: its file relative to the folder, its label and captions or None, and the line that it begins on.

    pair: the file of the paired picture, relative to the folder, or None.
    """

    file: str
    label: str | None
    captions: tuple[str, ...] | None
    line: int
    pair: str | None = None


def read_metadata(path: Path, columns: Columns, report: FileReport) -> tuple[list[Row], str | None]:
    """The rows of a metadata file, in its order, and the name of the column of captions, or None.

    Other columns go into the report as not used.

    Columns that are not named: file_name, label, and the first of TEXT_COLUMNS that has a caption.
    UserError: not UTF-8, not a table, a column or a value is missing, or a file is not inside the folder; the message
    names the line.
    """
    needed = f"{columns.image or FILE_COLUMN}, and label or text"
    table = list(_csv_rows(path, columns.image or FILE_COLUMN) if path.suffix == ".csv" else json_rows(path, needed))
    if not table:
        raise UserError(f"{path} has no rows: each needs {needed}")
    names = list(dict.fromkeys(key for _, row in table for key in row))
    image, label, text = _chosen(path, columns, names, table)
    for name in names:
        if name not in (image, label, text, columns.pair):
            report.remark(f"column of {path.name} that is not used", name)
    rows = [_row(path, line, row, image, label, text, columns.pair) for line, row in table]
    for column, missing in (
        (label, [row.line for row in rows if row.label is None]),
        (text, [row.line for row in rows if row.captions is None]),
    ):
        if missing and len(missing) < len(rows):
            raise UserError(f"{path} line {min(missing)}: has no {column} although other lines do")
    return rows, text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 one with its byte order mark, as some editors on Windows write it."""
    content = path.read_bytes()
    encoding = BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({one_line(error)}); save it as UTF-8") from error


def _chosen(
    path: Path, columns: Columns, names: list[str], table: list[tuple[int, dict[str, Any]]]
) -> tuple[str, str | None, str | None]:
    """The columns of file names, labels and captions."""
    named = {
        "image_column": columns.image,
        "label_column": columns.label,
        "text_column": columns.text,
        "pair_column": columns.pair,
    }
    for key, column in named.items():
        if column is not None and column not in names:
            raise UserError(f"{path}: {key} {column} is not a column; the columns are {listed(names, 20)}")
    label = columns.label or (LABEL_COLUMN if LABEL_COLUMN in names else None)
    usual = [name for name in TEXT_COLUMNS if name in names]
    filled = [name for name in usual if any(row.get(name) not in (None, "", []) for _, row in table)]
    return columns.image or FILE_COLUMN, label, columns.text or next(iter(filled or usual), None)


def _row(path: Path, line: int, row: dict[str, Any], image: str, label: str | None, text: str | None, pair: str | None) -> Row:
    file = row.get(image)
    if not isinstance(file, str) or not file:
        hint = "" if image in row else f"; {_no_column(image, list(row))}"
        raise UserError(f"{path} line {line}: needs {image}, and label or text{hint}")
    check_inside(path, line, image, file)
    value = None if label is None else row.get(label)
    captions = None if text is None else captions_of(row.get(text), f"{path} line {line}")
    other = None if pair is None else row.get(pair)
    if pair is not None:
        if not isinstance(other, str) or not other:
            raise UserError(f"{path} line {line}: has no {pair}, the picture that is paired with {image} {file[:200]!r}")
        check_inside(path, line, pair, other)
    return Row(file, None if value in (None, "") else str(value), captions, line, other)


def _no_column(image: str, names: list[str]) -> str:
    return f"has no column {image}, only {listed(names, 20)}; data.image_column names the column of the files"


def check_inside(path: Path, line: int, column: str, file: str) -> None:
    """UserError where a file that a row of metadata names is not inside the folder of the metadata."""
    if leaves(path.parent, file) or leaves(path.parent, file.replace("\\", "/")):
        raise UserError(f"{path} line {line}: {column} {file[:200]!r} is not inside {path.parent}; copy it there")


def json_rows(path: Path, needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each row of a .jsonl file. UserError for a line that is not a JSON object; it says what is needed."""
    # Not splitlines: a caption may have characters that end a line in Unicode
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: not JSON ({one_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: needs {needed}")
        yield number, row


def _csv_rows(path: Path, image: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of each row, by the header's columns. The delimiter is the comma, semicolon or tab: the header's commonest.

    UserError for a quote that is not closed, which would take in the lines after it, and for a row with more values than
    columns, whose text would be cut at a comma.
    """
    content = read_text(path)
    header = content.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    begins = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path} line {begins}: not a row of a table ({one_line(error)}); is a quote opened there and not closed?"
            ) from error
        if cells is None:
            return
        line, begins = begins, reader.line_num + 1
        if not cells:
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if image not in names:
                raise UserError(f"{path}: {_no_column(image, names)}")
            continue
        _check_cells(path, line, cells, names, delimiter)
        yield line, dict(zip(names, cells, strict=False))


def _check_cells(path: Path, line: int, cells: list[str], names: list[str], delimiter: str) -> None:
    if len(cells) > len(names):
        raise UserError(
            f"{path} line {line}: has {len(cells)} values and the header {len(names)} columns; "
            f"put double quotes around a text that has {delimiter!r} in it"
        )
    for cell in cells:
        for later in cell.split("\n")[1:]:
            first = later.partition(delimiter)[0].strip().strip('"')
            if Path(first).suffix.lower() in image_suffixes():
                raise UserError(
                    f"{path} line {line}: a quote is opened and not closed before the next rows ({first[:80]}); close it"
                )
