"""What a hostile file is put through: everything that reads it, compared with a second reader at every step.

A file is parsed strictly, leniently and up to a label; what parses is ordered, mapped and read (`imagecheck`). Some are
also tried by path (`verbs`). Allowed is the right answer or a refusal that names a rule; both readers must agree on it.
"""

import os
from pathlib import Path
from random import Random

import model
from findings import ACCEPTED, Finding, Outcome, memory_file, require, statement_in, statement_of
from imagecheck import check_image
from modelread import Refused, read
from verbs import check_verbs

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.cow.errors import Tolerance
from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.reader import CowFile

_TOLERATED = frozenset(("V4", "V27", "V28", "V32"))


def check(raw: bytes, digests: bytes | None, random: Random, folder: Path | None) -> Outcome:
    """Put a file, and the digests table beside it, through everything; `Finding`, or whatever else should not be.

    With a `folder` also through what works with paths, which takes as long as the rest.
    """
    outcome = Outcome()
    store = memory_file(raw)
    try:
        strict = _parse(store, raw, outcome)
        lenient = _parse(store, raw, outcome, lenient=True)
        _check_tolerance(strict, lenient)
        known = lenient or strict
        names = known[1].names if known else []
        label = random.choice((*names, *names, 0, 3, 5))
        cut = _parse(store, raw, outcome, label=label, lenient=random.random() < 0.3)
        for parsed in (strict, cut, lenient if lenient and lenient[1].tolerated else None):
            if parsed is not None:
                check_image(*parsed, store, digests, outcome, random)
    finally:
        os.close(store.fd)
    if folder is not None:
        check_verbs(raw, digests, strict[1] if strict is not None else None, folder, outcome)
    return outcome


def _parse(
    store: FileStore, raw: bytes, outcome: Outcome, *, label: int | None = None, lenient: bool = False
) -> tuple[CowFile, model.Reading] | None:
    """The file as both readers see it; None where both refuse it."""
    step = "lenient parse" if lenient else "parse"
    if label is not None:
        step += " to a label"
    cow, statement = None, ACCEPTED
    try:
        cow = CowFile.parse(store, label=label, lenient=lenient)
    except SnapdError as error:
        statement = statement_of(error)
    outcome[step, statement] += 1
    try:
        reading = read(raw, label=label, lenient=lenient)
    except Refused as refused:
        require(cow is None, f"{step}: accepted, though it breaks {refused}")
        tolerated = lenient and statement in _TOLERATED - {str(refused)}
        require(not tolerated, f"{step}: refused by {statement}, which is tolerated")
        return None
    if cow is None:
        raise Finding(f"{step}: refused by {statement}, though nothing is wrong")
    _compare(cow, reading)
    fault = order_fault(cow)
    require((not fault) == reading.order_holds(), f"{step}: the order holds is {not fault}: {fault}")
    outcome["order", statement_in(fault) or ACCEPTED] += 1
    for note in cow.tolerated.notes:
        outcome["tolerated", statement_in(note)] += 1
    return cow, reading


def _check_tolerance(
    strict: tuple[CowFile, model.Reading] | None, lenient: tuple[CowFile, model.Reading] | None
) -> None:
    """A lenient parse takes all that a strict one takes, and says what else it let pass (COW-208)."""
    require(strict is None or lenient is not None, "a strict parse takes what a lenient one does not")
    require(strict is None or not strict[0].tolerated.count, "a strict parse tolerated something")
    if lenient is not None:
        cow, reading = lenient
        require((cow.tolerated.count > 0) == reading.tolerated, f"tolerated {cow.tolerated.notes}")
        require(strict is not None or cow.tolerated.count > 0, "more than the strict parse, and no word about it")
        require(len(cow.tolerated.notes) == min(cow.tolerated.count, Tolerance.LIMIT), "notes and count differ")


def _compare(cow: CowFile, reading: model.Reading) -> None:
    for name, ours, theirs in (
        ("version", cow.header.version, reading.version),
        ("block size", cow.header.block_size, reading.block_size),
        ("compression", cow.header.compression, reading.compression),
        ("ops digest", cow.ops_digest, reading.ops_digest),
        ("types", cow.ops.type.tolist(), [op.kind for op in reading.ops]),
        ("blocks", cow.ops.new_block.tolist(), [op.block for op in reading.ops]),
        ("lengths", cow.ops.blocks.tolist(), [op.blocks for op in reading.ops]),
        ("sources", cow.ops.source.tolist(), [op.source for op in reading.ops]),
        ("payloads", cow.ops.payload.tolist(), [op.payload for op in reading.ops]),
        ("payload lengths", cow.ops.data_length.tolist(), [op.length for op in reading.ops]),
        ("sequence", cow.sequence.tolist(), reading.sequence),
        ("labels", list(map(tuple, cow.labels)), reading.labels),
        ("merged", cow.is_merged, reading.is_merged),
        ("begun", cow.has_begun, reading.has_begun),
        ("end block", cow.highest_target_block + 1, reading.end_block),
        ("merge order", merge_list(cow).tolist(), reading.merge_order()),
    ):
        require(ours == theirs, f"{name}: {ours}, not {theirs}")
