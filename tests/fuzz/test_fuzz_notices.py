"""The fuzzing can fail: a reader that leaves out a check, or reads something else, is found in a few hundred files."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from cases import make_case
from corpus import own_seeds
from findings import Finding
from target import check

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer
from snapd.cow.compress import Decoder
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError
from snapd.cow.image.units import UnitReader
from snapd.cow.image.view import CowView
from snapd.cow.parse import mergeorder, reader, regions, stream
from snapd.cow.parse.checks import OpChecks
from snapd.cow.parse.optable import OpTable
from snapd.cow.parse.reader import CowFile

FILES = 800
SEEDS = own_seeds()


def is_caught(folder: Path) -> bool:
    """Whether any of the files is a finding."""
    for number in range(FILES):
        case = make_case(number, SEEDS)
        try:
            check(case.raw, case.digests, Random(number), folder if number % 8 == 0 else None)
        except (Finding, SnapdError, AssertionError, IndexError, ValueError):
            return True
    return False


def nothing(*_arguments: Any, **_options: Any) -> None:
    """Leaves out whatever it stands for."""


def patched_up(decode: Callable[..., Buffer]) -> Callable[..., Buffer]:
    """A decoder that gives something for everything."""

    def decode_anything(self: Decoder, payload: Buffer, size: int, *, op_index: int) -> Buffer:
        try:
            return decode(self, payload, size, op_index=op_index)
        except CowError:
            return bytes(size)

    return decode_anything


def last_unit(self: UnitReader, _index: int) -> memoryview | None:
    """A cache that does not look at what it is asked for."""
    return next(reversed(self._cache._units.values()), None)


CHANGES: dict[str, tuple[Any, str, Any]] = {
    "overlap": (OpChecks, "_check_overlap", nothing),
    "ops": (OpChecks, "_check_part", nothing),
    "sequence of version 3": (regions, "check_sequence", nothing),
    "sequence of version 2": (stream, "check_sequence", nothing),
    "sizes": (CowFile, "check_sizes", nothing),
    "begun": (CowFile, "has_begun", False),
    "digests of blocks": (CowView, "_check", nothing),
    "digest of the whole": (DigestTable, "dense", lambda _table, blocks: np.zeros(blocks, dtype=np.uint64)),
    "decoding": (Decoder, "decode", patched_up(Decoder.decode)),
    "cache": (UnitReader, "cached", last_unit),
    "merge order": (mergeorder, "_readers_first", mergeorder._stream_order),
    "units": (OpTable, "exponent", property(lambda self: np.zeros(len(self), dtype=np.uint8))),
    "window": (reader, "SCRATCH_DONE", 3),
}


def test_nothing_is_found_as_it_is(tmp_path: Path) -> None:
    """Guards the rows below: these files are no findings."""
    assert not is_caught(tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_left_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """COW-67, COW-68, COW-97, COW-120, COW-216, COW-217: each of these is noticed."""
    owner, attribute, instead = CHANGES[name]
    monkeypatch.setattr(owner, attribute, instead)
    assert is_caught(tmp_path)
