"""The state file: one sector, whole or old, and never taken for empty when it is damaged."""

import errno
import uuid
from dataclasses import replace
from random import Random

import pytest

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk
from snapd.merge.statefile import Phase, ReadBack, State, read_state, write_state

STATE = State(
    snapshot=uuid.UUID(int=5),
    generation=3,
    undo_generation=2,
    phase=Phase.MERGING,
    next_block=1 << 33,
    undo_op_count=7,
    old_size_bytes=8 << 40,
    new_size_bytes=9 << 40,
    read_back=ReadBack.FAILED,
)


def test_a_record_is_one_sector_and_comes_back() -> None:
    """UNDO-27: 512 bytes, every field as it was, in every phase."""
    for phase in Phase:
        for result in ReadBack:
            state = replace(STATE, phase=phase, read_back=result)
            assert len(state.pack()) == 512
            assert State.unpack(state.pack()) == state


@pytest.mark.parametrize("raw", [b"", bytes(100), bytes(512)])
def test_empty_and_zeros_mean_that_nothing_began(raw: bytes) -> None:
    """A file just made, or whose first write was lost, is no state."""
    assert read_state(SimDisk(Random(0)).store("state", raw)) is None


def test_every_flipped_bit_is_damage() -> None:
    """UNDO-29: the truth is never guessed; EBADMSG, not "nothing began"."""
    raw = STATE.pack()
    for bit in range(0, 512 * 8, 7):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SnapdError) as caught:
            read_state(SimDisk(Random(0)).store("state", bytes(damaged)))
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("length", [1, 78, 511])
def test_a_record_cut_short_is_damage(length: int) -> None:
    """A file shorter than its record was not written by us."""
    with pytest.raises(SnapdError, match="damaged"):
        read_state(SimDisk(Random(0)).store("state", STATE.pack()[:length]))


def test_a_power_cut_leaves_the_old_record_or_the_new_one() -> None:
    """UNDO-12 f: a record is written in place, unflushed or not, and is never half."""
    found = set()
    for seed in range(50):
        disk = SimDisk(Random(seed))
        store = disk.store("state", STATE.pack())
        store.write(replace(STATE, generation=4).pack(), 0)
        disk.power_cut()
        state = read_state(store)
        assert state is not None
        found.add(state.generation)
    assert found == {3, 4}


def test_a_written_record_is_durable() -> None:
    """UNDO-8: durable before anybody sees it."""
    for seed in range(20):
        disk = SimDisk(Random(seed))
        write_state(disk.store("state"), STATE)
        disk.power_cut()
        assert read_state(disk.store("state")) == STATE
