"""The wire: golden bytes, operations and flags (DMU-5 to DMU-23)."""

import errno

import pytest
from dmurig import PREFLUSH, Rig, Submitted, read_one

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.message import HEADER, HEADER_BYTES, Answer, Flag, Request

GOLDEN = [
    (
        Request(7, BioOp.READ, 0x8, 0x1122334455, 4096),
        "0700000000000000 0000000000000000 0800000000000000 5544332211000000 0010000000000000",
    ),
    (
        Request(1 << 40, BioOp.WRITE, 0x208, 9, 1536),
        "0000000000010000 0100000000000000 0802000000000000 0900000000000000 0006000000000000",
    ),
    (
        Request(2, BioOp.WRITE, PREFLUSH, 0, 0),
        "0200000000000000 0100000000000000 0004000000000000 0000000000000000 0000000000000000",
    ),
]


@pytest.mark.parametrize(("request_header", "golden"), GOLDEN, ids=["read", "write", "flush"])
def test_header_bytes(request_header: Request, golden: str) -> None:
    """DMU-5: five little-endian unsigned 64-bit fields, 40 bytes."""
    raw = request_header.pack()
    assert len(raw) == HEADER_BYTES == 40
    assert raw == bytes.fromhex(golden)
    assert Request._make(HEADER.unpack(raw)) == request_header


def test_request_and_answer_types_overlap() -> None:
    """DMU-9: an untouched READ request sent back is a SUCCESS header, a WRITE an ERROR, a FLUSH an UNSUPPORTED."""
    assert [int(op) for op in (BioOp.READ, BioOp.WRITE, BioOp.FLUSH)] == [int(answer) for answer in Answer]


def test_empty_write_with_preflush_is_a_flush() -> None:
    """DMU-16: both forms of a flush are one; a write that carries data is not."""
    assert Request(0, BioOp.FLUSH, 0, 0, 0).is_flush
    assert Request(0, BioOp.WRITE, PREFLUSH, 8, 0).is_flush
    assert not Request(0, BioOp.WRITE, 0, 0, 0).is_flush
    assert not Request(0, BioOp.WRITE, PREFLUSH, 0, 512).is_flush
    assert not Request(0, BioOp.READ, PREFLUSH, 0, 0).is_flush


def test_a_refused_bio_takes_no_number() -> None:
    """DMU-13, DMU-14: refused before it gets a message; the next accepted one has the next number."""
    rig = Rig()
    channel = rig.target.open()
    rig.submit()
    with pytest.raises(SnapdError):
        rig.submit(BioOp.WRITE_SAME)
    with pytest.raises(SnapdError):
        rig.submit(flags=int(Flag.SWAP))
    rig.submit()
    assert [read_one(channel).seq, read_one(channel).seq] == [0, 1]
    assert channel.take() is None


def test_data_must_be_as_long_as_the_bio() -> None:
    """DMU-6, DMU-7: the payload has `len` bytes, so memory of another length is refused."""
    rig = Rig()
    submitted = Submitted(BioOp.READ, length=1024)
    submitted.bio.length = 512
    with pytest.raises(SnapdError) as error:
        rig.target.submit(submitted.bio)
    assert error.value.errno == errno.EINVAL
