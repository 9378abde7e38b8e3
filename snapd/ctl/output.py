"""Results on standard output: a table for people or JSON for programs, from the same record.

A record is a flat mapping; its keys are the JSON's. In a table a key ending in `_bytes` is shown as a size and
one ending in `seconds` with two decimals, so a verb formats nothing itself.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
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
    cells = [(_label(key), _cell(key, value)) for key, value in record.items()]
    width = max((len(label) for label, _ in cells), default=0)
    for label, cell in cells:
        print(f"{label:<{width}}  {cell}".rstrip())


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
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "-"
    return str(value)
