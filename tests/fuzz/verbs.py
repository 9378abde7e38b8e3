"""What `snapctl cow info` and `verify` make of a hostile file, with its base and its digests table beside it."""

import errno
from pathlib import Path

import model
import tables
from corpus import BASE
from expected import Expected
from findings import ACCEPTED, Outcome, require, statement_of
from modelcodecs import Damaged

from snapd.block.errors import SnapdError
from snapd.cow.verbs.info import cow_info
from snapd.cow.verbs.picture import draw
from snapd.cow.verbs.verify import verify_cow

_COLUMNS, _ROWS = 40, 10
_WITHOUT_BASE = frozenset(("COW-216", "COW-23"))


def check_verbs(
    raw: bytes, digests: bytes | None, reading: model.Reading | None, folder: Path, outcome: Outcome
) -> None:
    """Run both in `folder`; `reading` is what the second reader makes of the file, if it takes it."""
    path, base = folder / "a.cow", folder / "base"
    path.write_bytes(raw)
    base.write_bytes(BASE)
    table = folder / "a.cow.digests"
    table.unlink(missing_ok=True)
    if digests is not None:
        table.write_bytes(digests)
    _info(path, reading, outcome)
    _verify(path, None, reading, digests, outcome)
    _verify(path, base, reading, digests, outcome)


def _info(path: Path, reading: model.Reading | None, outcome: Outcome) -> None:
    for lenient in (False, True):
        step = "lenient info" if lenient else "info"
        try:
            info, extent_map = cow_info(path, lenient=lenient)
        except SnapdError as error:
            statement = statement_of(error, errno.EBADMSG, errno.ERANGE)
            outcome[step, statement] += 1
            require(reading is None or statement in _WITHOUT_BASE, f"{step} refuses by {statement}")
            continue
        outcome[step, ACCEPTED] += 1
        require(lenient or (reading is not None and info.ops == len(reading.ops)), f"info of {info.ops} ops")
        draw(extent_map, columns=_COLUMNS, max_rows=_ROWS)


def _verify(
    path: Path, base: Path | None, reading: model.Reading | None, digests: bytes | None, outcome: Outcome
) -> None:
    step = "verify" if base is None else "verify with the base"
    try:
        report = verify_cow(path, base, lambda _done, _all: None, payloads=True)
    except SnapdError as error:
        # A COW that says it is merged, and a base that does not have what it says.
        if error.errno == errno.EINVAL and reading is not None and reading.is_merged and base is not None:
            outcome[step, "EINVAL"] += 1
            return
        outcome[step, statement_of(error, errno.EBADMSG, errno.ERANGE, errno.EBUSY)] += 1
        return
    assert reading is not None, "verified what is refused"
    damaged = sum(_is_damaged(reading, op) for op in reading.ops)
    outcome[step, ACCEPTED if report.ok else "not ok"] += 1
    require(report.damaged_ops == damaged, f"{step} finds {report.damaged_ops} ops damaged, not {damaged}")
    fine = not (damaged or report.damaged_blocks or reading.has_begun) and reading.order_holds()
    require(report.ok == fine, f"{step} is ok: {report.ok}, though fine is {fine}: {report}")
    if digests is not None and base is not None and not reading.is_merged:
        known = tables.read_table(digests, op_count=len(reading.ops), ops_digest=reading.ops_digest)
        assert known is not None, "verified with a table of other ops"
        count = known.target_blocks or max(len(BASE) // reading.block_size, reading.end_block)
        expected = Expected(reading, count, BASE, known.digests)
        wrong = expected.wrong if known.target_blocks is not None else expected.wrong & expected.changed.keys()
        require(report.damaged_blocks == len(wrong), f"{step} finds {report.damaged_blocks} blocks, not {len(wrong)}")


def _is_damaged(reading: model.Reading, op: model.Op) -> bool:
    if op.kind not in (model.REPLACE, model.XOR):
        return False
    try:
        reading.decoded(op)
    except Damaged:
        return True
    return False
