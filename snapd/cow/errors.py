"""The error every check of a COW file raises."""

import errno

from snapd.block.errors import SnapdError


class CowError(SnapdError):
    """A COW file that is damaged, unfinished or not supported.

    `statement` is the rule that was broken (`"COW-46"`, `"V18"`); `offset` the byte in the file and `op_index` the
    op concerned, where there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        statement: str,
        offset: int | None = None,
        op_index: int | None = None,
        number: int = errno.EBADMSG,
    ) -> None:
        where = "" if op_index is None else f"op {op_index}: "
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(number, f"{where}{message}{at} ({statement})")
        self.statement = statement
        self.offset = offset
        self.op_index = op_index


class Tolerance:
    """What a lenient parse let pass (COW-208): the errors that a strict one would have raised, in order, bounded."""

    LIMIT = 100

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.count = 0

    def note(self, error: CowError) -> None:
        """Keep the error instead of raising it; beyond the first hundred only their number is kept."""
        self.count += 1
        if len(self.notes) < self.LIMIT:
            self.notes.append(str(error))
