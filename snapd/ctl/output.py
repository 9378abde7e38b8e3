"""Results on standard output: a table for people or JSON for programs, from the same record.

A record is a flat mapping; its keys are the JSON's. In a table a key ending in `_bytes` is shown as a size, one ending
in `seconds` with two decimals and a list with one item a line, so a verb formats nothing itself.
"""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import Annotated

import typer

from snapd.ctl.sizes import format_size

Record = Mapping[str, object]


class Format(StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]


def show(record: Record, output: Format) -> None:
    """Print one record: a line a field, or one JSON object."""
    if output is Format.JSON:
        print(json.dumps(record, indent=2))
        return
    width = max((len(_label(key)) for key in record), default=0)
    for key, value in record.items():
        items = (value or (None,)) if isinstance(value, list | tuple) else (value,)
        for label, item in zip_longest((_label(key),), items, fillvalue=""):
            print(f"{label:<{width}}  {_cell(key, item)}".rstrip())


def show_rows(records: Sequence[Record], output: Format) -> None:
    """Print records with the same keys: a line each under a heading, or a JSON list."""
    if output is Format.JSON:
        print(json.dumps(records, indent=2))
        return
    rows = [[_cell(key, value) for key, value in record.items()] for record in records]
    if rows:
        rows.insert(0, [_label(key) for key in records[0]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    if key.endswith("seconds") and isinstance(value, int | float):
        return f"{value:.2f}"
    return str(value)
