"""Groups of channels: one daemon with several connections (DMU-147)."""

import errno

import pytest
from dmurig import EIO, OK, NodeRig, Rig, answer_header, raises, read_one, read_request, serve, write_all

from snapd.block.bio import BioOp


def test_any_member_answers() -> None:
    """DMU-147, DMU-136: what one member has read another may answer; who is not of the group may not (DMU-139)."""
    rig = Rig()
    reader, helper, stranger = rig.target.open("disk"), rig.target.open("disk"), rig.target.open("other")
    first, second = rig.submit(), rig.submit(BioOp.WRITE)
    seq = read_one(reader).seq
    assert helper.answer(seq, 0) is not None
    helper.answered()
    assert first.result == OK
    seq = read_one(helper).seq
    assert rig.target.in_flight == 1
    with raises(errno.EINVAL):
        stranger.answer(seq, 0)
    assert reader.answer(seq, 0) is None
    assert second.result == OK


def test_without_a_group_each_is_alone() -> None:
    """DMU-147, DMU-139: the default is the kernel's rule."""
    rig = Rig()
    one, two = rig.target.open(), rig.target.open()
    rig.submit()
    seq = read_one(one).seq
    with raises(errno.EINVAL):
        two.answer(seq, 0)


def test_messages_fail_when_the_last_member_closes() -> None:
    """DMU-147, DMU-76: what awaits its answer stays while a member is open, then ends inside the last close."""
    rig = Rig()
    one, two, other = rig.target.open("disk"), rig.target.open("disk"), rig.target.open()
    kept, lost = rig.submit(), rig.submit()
    first, second = read_one(one), read_one(one)
    one.close()
    assert (kept.result, lost.result) == (None, None)
    assert two.answer(first.seq, 0) is not None
    two.answered()
    two.close()
    assert (kept.result, lost.result) == (OK, EIO)
    assert second.bio is lost.bio
    assert other.take() is None


def test_half_done_messages_of_a_member_that_leaves() -> None:
    """DMU-147, DMU-40: a half answer is as none; what nobody has read whole is queued again, with its number."""
    rig = Rig()
    leaving, staying = rig.target.open("disk"), rig.target.open("disk")
    answering, erase, younger = rig.submit(), rig.submit(BioOp.SECURE_ERASE), rig.submit()
    assert leaving.answer(read_one(leaving).seq, 0) is not None
    half_read = leaving.take()
    assert half_read is not None
    assert (rig.target.in_flight, rig.target.queued) == (2, 1)
    leaving.close()
    assert (rig.target.in_flight, rig.target.queued) == (1, 2)
    assert [bio.result for bio in (answering, erase, younger)] == [None] * 3
    assert staying.answer(0, 0) is not None
    staying.answered()
    assert [serve(staying).seq for _ in range(2)] == [1, 2]
    assert [bio.result for bio in (answering, erase, younger)] == [OK] * 3


def test_a_poisoned_member_leaves_the_others_whole() -> None:
    """DMU-147, DMU-71: it is out, what it had read is still the group's."""
    rig = Rig()
    bad, good = rig.target.open("disk"), rig.target.open("disk")
    bio = rig.submit()
    seq = read_one(bad).seq
    with raises(errno.EINVAL):
        bad.answer(99, 0)
    assert good.answer(seq, 0) is not None
    good.answered()
    assert bio.result == OK


def test_grace_begins_with_the_last_member() -> None:
    """DMU-147, DMU-148: the last close of the group gives all of it back; a new group of that name begins empty."""
    rig = Rig(restart_grace_ms=1000)
    one, two = rig.target.open("disk"), rig.target.open("disk")
    bios = [rig.submit() for _ in range(3)]
    read_one(one)
    read_one(two)
    one.close()
    assert rig.target.queued == 1
    two.close()
    assert rig.target.queued == 3
    again = rig.target.open("disk")
    with raises(errno.EINVAL):
        again.answer(0, 0)
    again = rig.target.open("disk")
    assert [serve(again).seq for _ in range(3)] == [0, 1, 2]
    assert [bio.result for bio in bios] == [OK] * 3


def test_destroyed_under_a_group() -> None:
    """DMU-147, DMU-107: after destroy what a member leaves half read is not given on, it fails."""
    rig = Rig()
    leaving, staying = rig.target.open("disk"), rig.target.open("disk")
    half_read, awaiting = rig.submit(), rig.submit()
    leaving.take()
    read_one(staying)
    rig.target.destroy()
    leaving.close()
    assert (half_read.result, awaiting.result) == (EIO, None)
    assert staying.answer(1, 0) is not None
    staying.answered()
    assert awaiting.result == OK


def test_a_stuck_group_is_named_by_its_members() -> None:
    """DMU-147, DMU-96: the request timeout watches what a group has read, whoever of it did."""
    rig = Rig(request_timeout_ms=500)
    one, two = rig.target.open("disk"), rig.target.open("disk")
    rig.submit()
    read_one(two)
    rig.advance(500)
    stuck = rig.target.stuck_channel()
    assert stuck is one
    stuck.close()
    assert rig.target.stuck_channel() is two
    two.close()
    assert rig.target.stuck_channel() is None


@pytest.mark.parametrize("group", ["", "disk"])
def test_a_nodes_files_may_be_a_group(group: str) -> None:
    """DMU-147, DMU-157: the node's files follow the same rule."""
    rig = NodeRig()
    one, two = rig.node.open(group=group), rig.node.open(group=group)
    bio = rig.submit()
    read_request(one)
    answer = answer_header(0) + bytes(512)
    if group:
        write_all(two, answer)
        assert bio.result == OK
    else:
        assert two.write(answer) == 40
        with raises(errno.EINVAL):
            two.write(answer[40:])
