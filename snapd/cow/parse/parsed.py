"""What a parse finds in a COW file, whatever its version: the labels, how the file ends, and all of it together."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapd.cow.cursor import Cursor
from snapd.cow.header import Header
from snapd.cow.parse.optable import OpTable

_NAMED_LABELS = 20


class Label(NamedTuple):
    """A point up to which the file can be used: `op_count` data ops lie before it (COW-81)."""

    label: int
    op_count: int


class End(StrEnum):
    """What the ops end with."""

    FINISHED = "finished"
    """A footer (versions 1 and 2)."""
    LABEL = "label"
    """The label that was asked for."""
    OPEN = "open"
    """Version 3: a valid prefix; the format does not say whether more was to come (COW-214)."""


class Parsed(NamedTuple):
    """A file as its version's reader leaves it; `header` has the compression for versions 1 and 2 too (COW-18).

    `op_total` is what the merge progress counts up to: all ops of the file, also where only those before a label
    are kept; None where it is not known. `cursor` lies behind the last record kept (versions 1 and 2).
    """

    header: Header
    ops: OpTable
    op_total: int | None
    sequence: npt.NDArray[np.uint32]
    labels: tuple[Label, ...]
    end: End
    cursor: Cursor | None


def name_labels(labels: Sequence[int]) -> str:
    """The labels a file has, for an error message; of many the last ones."""
    if not labels:
        return "it has no label"
    more = "..., " if len(labels) > _NAMED_LABELS else ""
    return f"it has the labels {more}{', '.join(map(str, labels[-_NAMED_LABELS:]))}"
