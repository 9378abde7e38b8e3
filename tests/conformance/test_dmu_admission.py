"""What a target takes: profiles, flags, hints, operations, the filter (DMU-13 to DMU-24, DMU-144 to DMU-146)."""

import errno
from random import Random

import pytest
from dmurig import EIO, OK, PREFLUSH, Rig, Submitted, raises, read_one, serve

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.dmuser.admission import ANDROID, HINTS, PROFILES, V1, Admission
from snapd.dmuser.filter import fail, pass_down, to_daemon
from snapd.dmuser.message import HEADER, Flag

ZONE_OPS = {BioOp.ZONE_OPEN, BioOp.ZONE_CLOSE, BioOp.ZONE_FINISH, BioOp.ZONE_RESET}
NEVER = {BioOp.WRITE_SAME, BioOp.ZONE_APPEND, BioOp.ZONE_RESET_ALL}
TAKEN = {"android": set(BioOp) - ZONE_OPS - NEVER, "v1": set(BioOp) - NEVER}
REFUSED_FLAGS = {
    "android": {Flag.CGROUP_PUNT, Flag.HIPRI, Flag.DRV, Flag.SWAP},
    "v1": {Flag.DRV, Flag.SWAP},
}
EVERY_PROFILE = pytest.mark.parametrize("profile", ["android", "v1"])


def rig_of(profile: str, dropped_hints: int = 0) -> Rig:
    return Rig(admission=Admission(PROFILES[profile], dropped_hints=dropped_hints))


def flags_handed_over(rig: Rig) -> int:
    return int(HEADER.unpack(serve(rig.target.open()).header())[2])


@EVERY_PROFILE
@pytest.mark.parametrize("op", sorted(BioOp))
def test_every_operation(profile: str, op: BioOp) -> None:
    """DMU-13, DMU-17, DMU-18: taken with its own number, or refused; WRITE_SAME and ZONE_APPEND by every profile."""
    rig = rig_of(profile)
    if op in TAKEN[profile]:
        rig.submit(op, sector=3, length=8192)
        assert HEADER.unpack(read_one(rig.target.open()).header()) == (0, int(op), 0, 3, 8192)
        return
    with raises(errno.EOPNOTSUPP):
        rig.submit(op)
    assert rig.target.queued == 0


@EVERY_PROFILE
@pytest.mark.parametrize("flag", sorted(Flag))
def test_every_flag(profile: str, flag: Flag) -> None:
    """DMU-20, DMU-21: a flag that is taken arrives as its one bit; any other refuses the bio, among known ones too."""
    rig = rig_of(profile)
    if flag in REFUSED_FLAGS[profile]:
        for flags in (int(flag), int(flag) | PROFILES[profile].flags):
            with raises(errno.EOPNOTSUPP):
                rig.submit(flags=flags)
        return
    rig.submit(flags=int(flag))
    assert flags_handed_over(rig) == int(flag)


@EVERY_PROFILE
def test_all_combinations(profile: str) -> None:
    """DMU-20, DMU-22: every combination of the flags that are taken arrives unchanged; all others are refused."""
    taken = PROFILES[profile].flags
    assert taken.bit_count() == {"android": 15, "v1": 17}[profile]
    admission = Admission(PROFILES[profile])
    for flags in range(1 << 19):
        wanted = not flags & ~taken
        # What the target itself asks before it looks closer.
        assert (not flags & admission.other_flags) == wanted
    rig = rig_of(profile)
    for flags in [taken, *(Random(1).getrandbits(19) & taken for _ in range(100))]:
        rig.submit(flags=flags)
        assert flags_handed_over(rig) == flags


@EVERY_PROFILE
@pytest.mark.parametrize("bit", [19, 20, 31, 32, 63])
def test_a_bit_nobody_knows(profile: str, bit: int) -> None:
    """DMU-21: a bit outside the list refuses the bio, whatever else is set."""
    with raises(errno.EOPNOTSUPP):
        rig_of(profile).submit(flags=1 << bit | int(Flag.SYNC))


@EVERY_PROFILE
def test_what_file_systems_send(profile: str) -> None:
    """DMU-175, DMU-177: flushes, journal commits, superblocks, read-ahead and direct I/O, as seen from file systems."""
    f = Flag
    rig = rig_of(profile)
    seen = [
        (BioOp.READ, 8, 4096, f(0)),
        (BioOp.READ, 8, 4096, f.SYNC),
        (BioOp.READ, 8, 4096, f.RAHEAD),
        (BioOp.READ, 8, 4096, f.META | f.PRIO),
        (BioOp.READ, 8, 4096, f.META | f.PRIO | f.RAHEAD),
        (BioOp.WRITE, 8, 4096, f.SYNC | f.IDLE),
        (BioOp.WRITE, 8, 4096, f.SYNC | f.META | f.IDLE),
        (BioOp.WRITE, 8, 4096, f.SYNC | f.META | f.PRIO),
        (BioOp.WRITE, 8, 4096, f.SYNC | f.META | f.PRIO | f.FUA),
        (BioOp.WRITE, 0, 0, f.PREFLUSH | f.SYNC),
        (BioOp.WRITE, 2056, 0, f.SYNC | f.META | f.IDLE | f.FUA | f.PREFLUSH),
    ]
    channel = rig.target.open()
    for number, (op, sector, length, flags) in enumerate(seen):
        bio = rig.submit(op, sector=sector, length=length, flags=int(flags))
        assert HEADER.unpack(serve(channel).header()) == (number, int(op), int(flags), sector, length)
        assert bio.result == OK


def test_sector_is_the_devices_own() -> None:
    """DMU-10, DMU-163: the position is handed on as it was submitted; two targets of a device number by themselves."""
    first, second = Rig(), Rig()
    first.submit(sector=1023)
    second.submit(sector=1025)
    headers = [HEADER.unpack(read_one(rig.target.open()).header()) for rig in (first, second)]
    assert [(header[0], header[3]) for header in headers] == [(0, 1023), (0, 1025)]


def test_offered_operations() -> None:
    """DMU-15, DMU-145: what an export may announce: the profile's, `v1` without flush and discard; or those given."""
    assert Admission().offered == frozenset(TAKEN["android"])
    assert Admission(V1).offered == frozenset(TAKEN["v1"]) - {BioOp.FLUSH, BioOp.DISCARD}
    given = frozenset({BioOp.READ, BioOp.FLUSH})
    assert Admission(V1, ops=given).offered == given
    for op in NEVER | ZONE_OPS:
        with raises(errno.EINVAL):
            Admission(ANDROID, ops=[BioOp.READ, op])


@pytest.mark.parametrize("op", sorted(TAKEN["android"]))
def test_switched_off_operations(op: BioOp) -> None:
    """DMU-144, DMU-145: refused at submission, without a number; everything accepted ends with a status."""
    rig = Rig(admission=Admission(ops=TAKEN["android"] - {op}))
    with raises(errno.EOPNOTSUPP):
        rig.submit(op)
    other = rig.submit(BioOp.READ if op is not BioOp.READ else BioOp.WRITE)
    assert serve(rig.target.open()).seq == 0
    assert other.result == OK


def test_flushes_are_switched_off_together() -> None:
    """DMU-16, DMU-145: both forms of a flush and FUA go with `flush`; without `write` the empty WRITE is still one."""
    rig = Rig(admission=Admission(ops=[BioOp.READ, BioOp.WRITE]))
    for op, length, flags in [
        (BioOp.FLUSH, 0, 0),
        (BioOp.WRITE, 0, PREFLUSH),
        (BioOp.WRITE, 512, PREFLUSH),
        (BioOp.WRITE, 512, int(Flag.FUA)),
    ]:
        with raises(errno.EOPNOTSUPP):
            rig.submit(op, length=length, flags=flags)
    rig = Rig(admission=Admission(ops=[BioOp.READ, BioOp.FLUSH]))
    rig.submit(BioOp.WRITE, length=0, flags=PREFLUSH)
    for length, flags in [(512, 0), (512, PREFLUSH), (0, 0)]:
        with raises(errno.EOPNOTSUPP):
            rig.submit(BioOp.WRITE, length=length, flags=flags)


@EVERY_PROFILE
def test_dropped_hints(profile: str) -> None:
    """DMU-23: a hint to drop never refuses a bio and never reaches the daemon; the other flags do."""
    rig = rig_of(profile, dropped_hints=HINTS)
    rig.submit(flags=HINTS | int(Flag.SYNC | Flag.FUA))
    assert flags_handed_over(rig) == int(Flag.SYNC | Flag.FUA)
    with raises(errno.EOPNOTSUPP):
        rig.submit(flags=int(Flag.HIPRI | Flag.SWAP))


@pytest.mark.parametrize("flag", [flag for flag in Flag if not flag & HINTS])
def test_what_is_no_hint_is_not_dropped(flag: Flag) -> None:
    """DMU-23: FUA and PREFLUSH are promises; none but a hint can be dropped."""
    with raises(errno.EINVAL):
        Admission(dropped_hints=int(flag))


class Below:
    """What bios are passed down to."""

    def __init__(self) -> None:
        self.sectors: list[int] = []

    def __call__(self, bio: Bio) -> None:
        self.sectors.append(bio.sector)
        if bio.data is not None:
            bio.data[:] = content(bio)
        bio.on_complete(bio, 0)


def content(bio: Bio) -> bytes:
    return b"".join(Random(bio.sector + i).randbytes(SECTOR_BYTES) for i in range(bio.length // SECTOR_BYTES))


def test_filter_decides_before_the_queue() -> None:
    """DMU-146: the first rule that fits decides; a bio that only overlaps a range goes on; no number is taken."""
    below = Below()
    rig = Rig(rules=[fail(BioOp.DISCARD), to_daemon(16, 17), pass_down(8, 24, below)])
    with raises(errno.EIO):
        rig.submit(BioOp.DISCARD, sector=9)
    reads = [Submitted(sector=sector, length=1024) for sector in (7, 8, 15, 22, 23, 24)]
    for read in reads:
        rig.target.submit(read.bio)
    one = Submitted(sector=16)
    rig.target.submit(one.bio)
    write = rig.submit(BioOp.WRITE, sector=9)
    flush = rig.submit(BioOp.WRITE, sector=9, length=0, flags=PREFLUSH)
    assert below.sectors == [8, 15, 22]
    assert [read.result for read in reads] == [None, OK, OK, OK, None, None]
    channel = rig.target.open()
    assert [serve(channel).bio.sector for _ in range(6)] == [7, 23, 24, 16, 9, 9]
    assert (one.result, write.result, flush.result) == (OK, OK, OK)


def test_filtered_bios_never_wait() -> None:
    """DMU-146: behind a full queue what a rule takes is served all the same, also of those who stand in line."""
    below = Below()
    rig = Rig(rules=[pass_down(1000, 2000, below)])
    while rig.target.has_room():
        rig.submit()
    waiting = rig.wait_in_line()
    passed = rig.wait_in_line(sector=1000)
    assert (waiting.result, passed.result) == (None, OK)


@pytest.mark.parametrize("seed", range(4))
def test_same_bytes_with_and_without_the_filter(seed: int) -> None:
    """DMU-146: a device reads the same whoever is asked."""
    below = Below()
    plain, filtered = Rig(), Rig(rules=[to_daemon(100, 120), pass_down(50, 300, below)])
    choice = Random(seed)
    for _ in range(60):
        sector, length = choice.randrange(400), choice.randrange(1, 16) * SECTOR_BYTES
        results = []
        for rig in (plain, filtered):
            read = Submitted(sector=sector, length=length)
            rig.target.submit(read.bio)
            channel = rig.target.open()
            while (message := channel.take()) is not None:
                channel.handed_over()
                assert channel.answer(message.seq, 0) is not None
                assert message.bio.data is not None
                message.bio.data[:] = content(message.bio)
                channel.answered()
            assert read.result == OK
            results.append(bytes(read.memory))
            channel.close()
        assert results[0] == results[1]
    assert below.sectors


def test_unsupported() -> None:
    """DMU-66: the submitter sees EOPNOTSUPP, or EIO as from the kernel when asked for."""
    for options, number in (({}, errno.EOPNOTSUPP), ({"unsupported_errno": EIO}, EIO)):
        rig = Rig(**options)
        bio = rig.submit(BioOp.DISCARD)
        channel = rig.target.open()
        channel.answer(read_one(channel).seq, 2)
        assert bio.result == number
