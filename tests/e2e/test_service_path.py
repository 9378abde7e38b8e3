"""The whole path by the command line, with the real processes: the contract that scripts rely on."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Images, Service, make_images, read_device

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient

MakeImages = Callable[..., Images]


def create(service: Service, pair: Images) -> None:
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))


@pytest.mark.parametrize("new_blocks", [None, 2500])
def test_update_from_creation_to_confirmation(service: Service, images: MakeImages, new_blocks: int | None) -> None:
    """UNDO-2 to UNDO-5, UNDO-10: the new view before, the base after, the way back until confirmed."""
    pair = images(new_blocks=new_blocks)
    create(service, pair)
    assert service.json("update", "show", "u")["state"] == "CREATED"

    uri = service.json("snapshot", "map", "u/s")["nbd_uri"]
    assert service.snapctl("snapshot", "map", "u/s") == f"{uri}\n"
    assert read_device(uri) == pair.new
    assert pair.base.read_bytes() == pair.old
    assert service.json("update", "show", "u")["state"] == "SEALED"

    merged = service.json("merge", "start", "u", "--wait")
    assert merged["state"] == "MERGED"
    assert merged["merged_bytes"] == merged["changed_bytes"] > 0
    (snapshot,) = merged["snapshots"]
    assert (snapshot["state"], snapshot["read_back"]) == ("MERGED", "OK")
    assert pair.base.read_bytes() == pair.new
    assert read_device(uri) == pair.new

    old = service.directory / "old.img"
    service.snapctl("cow", "extract", snapshot["undo_path"], "--base", str(pair.base), "--out", str(old))
    assert old.read_bytes() == pair.old

    assert service.json("merge", "watch", "u")["state"] == "MERGED"
    service.snapctl("confirm", "u", "--yes")
    assert service.json("update", "show", "u")["snapshots"][0]["undo_path"] is None
    assert not Path(snapshot["undo_path"]).exists()
    assert read_device(uri) == pair.new

    service.snapctl("snapshot", "unmap", "u/s")
    with pytest.raises(SnapdError) as caught:
        NbdClient.connect(uri)
    assert caught.value.errno in (errno.ENOENT, errno.ECONNREFUSED)
    assert pair.base.read_bytes() == pair.new
    assert not Path(service.state, "snapshots", snapshot["uuid"]).exists()


def test_a_confirmed_cow_cannot_be_merged_again_onto_its_base(service: Service, images: MakeImages) -> None:
    """COW-145: copies would read the new image where they need the old one."""
    pair = images()
    create(service, pair)
    service.snapctl("merge", "start", "u", "--wait")
    service.snapctl("confirm", "u", "--yes")
    assert json.loads(service.snapctl("cow", "merge", str(pair.cow), "--base", str(pair.base), "-o", "json"))[
        "already_merged"
    ]
    assert pair.base.read_bytes() == pair.new
    service.snapctl("update", "create", "v")
    verb = ("snapshot", "create", "v/s", "--base", str(pair.base), "--cow", str(pair.cow))
    assert "is the new image of" in service.snapctl(*verb, code=1)
    out = str(service.directory / "out.img")
    service.snapctl("cow", "extract", str(pair.cow), "--base", str(pair.base), "--out", out)
    assert Path(out).read_bytes() == pair.new


def test_a_confirmed_cow_serves_another_old_base(service: Service, images: MakeImages) -> None:
    """One COW for many devices: what a merge leaves beside it tells an old base from a new one."""
    pair = images()
    create(service, pair)
    service.snapctl("merge", "start", "u", "--wait")
    service.snapctl("confirm", "u", "--yes")
    pair.base.write_bytes(pair.old)
    service.snapctl("update", "create", "v")
    service.snapctl("snapshot", "create", "v/s", "--base", str(pair.base), "--cow", str(pair.cow))
    assert read_device(service.json("snapshot", "map", "v/s")["nbd_uri"]) == pair.new
    service.snapctl("merge", "start", "v", "--wait")
    assert pair.base.read_bytes() == pair.new


def test_a_merge_needs_no_device(service: Service, images: MakeImages) -> None:
    pair = images()
    create(service, pair)
    service.snapctl("merge", "start", "u")
    assert service.json("merge", "watch", "u")["state"] == "MERGED"
    assert pair.base.read_bytes() == pair.new


def test_verbs_may_be_repeated(service: Service, images: MakeImages) -> None:
    create(service, images())
    first = service.json("snapshot", "map", "u/s")
    assert service.json("snapshot", "map", "u/s")["host_pid"] == first["host_pid"]
    service.snapctl("snapshot", "unmap", "u/s")
    service.snapctl("snapshot", "unmap", "u/s")
    service.snapctl("merge", "start", "u", "--wait")
    assert service.json("merge", "start", "u", "--wait")["state"] == "MERGED"


def test_two_snapshots_are_one_update(service: Service, short_dir: Path) -> None:

    pairs: list[Images] = []
    service.snapctl("update", "create", "u")
    for name in ("system", "vendor"):
        (short_dir / name).mkdir()
        pairs.append(make_images(short_dir / name, seed=len(pairs), blocks=1024))
        service.snapctl("snapshot", "create", f"u/{name}", "--base", str(pairs[-1].base), "--cow", str(pairs[-1].cow))
    assert service.json("merge", "start", "u", "--wait")["state"] == "MERGED"
    service.snapctl("confirm", "u", "--yes")
    for pair in pairs:
        assert pair.base.read_bytes() == pair.new


def test_errors_name_what_is_wrong_and_change_nothing(service: Service, images: MakeImages) -> None:
    pair = images()
    assert "there is no update u" in service.snapctl("update", "show", "u", code=1)
    assert "1 to 63 of a-z" in service.snapctl("update", "create", "U!", code=1)
    service.snapctl("update", "create", "u")
    assert "exists" in service.snapctl("update", "create", "u", code=1)
    assert "not U/S" in service.snapctl("snapshot", "map", "u", code=1)
    assert "no snapshot s" in service.snapctl("snapshot", "map", "u/s", code=1)
    assert "no snapshots to merge" in service.snapctl("merge", "start", "u", code=1)
    assert "cannot become CONFIRMED" in service.snapctl("confirm", "u", "--yes", code=1)
    assert "--yes" in service.snapctl("confirm", "u", code=2)
    assert "Missing option" in service.snapctl("snapshot", "create", "u/s", code=2)
    missing = service.snapctl("snapshot", "create", "u/s", "--base", "/nowhere", "--cow", str(pair.cow), code=1)
    assert "/nowhere: No such file" in missing
    assert "not a COW file" in service.snapctl(
        "snapshot", "create", "u/s", "--base", str(pair.cow), "--cow", str(pair.base), code=1
    )
    damaged = bytearray(pair.cow.read_bytes())
    damaged[14] ^= 1
    bad = service.directory / "bad.cow"
    bad.write_bytes(damaged)
    assert "V7" in service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(bad), code=1)
    assert service.json("update", "show", "u")["snapshots"] == []
    assert pair.base.read_bytes() == pair.old


def test_no_more_snapshots_once_mapped(service: Service, images: MakeImages) -> None:
    pair = images()
    create(service, pair)
    service.snapctl("snapshot", "map", "u/s")
    refused = service.snapctl("snapshot", "create", "u/t", "--base", str(pair.base), "--cow", str(pair.cow), code=1)
    assert "SEALED" in refused


def test_files_in_use_are_refused_to_others(service: Service, images: MakeImages) -> None:
    """UNDO-28: the base and the COW are locked from map, or the start of a merge, until confirm and unmap."""
    pair = images()
    create(service, pair)
    merge = ("cow", "merge", str(pair.cow), "--base", str(pair.base))
    service.snapctl("snapshot", "map", "u/s")
    assert "in use" in service.snapctl(*merge, code=1)
    service.snapctl("merge", "start", "u", "--wait")
    service.snapctl("snapshot", "unmap", "u/s")
    assert "in use" in service.snapctl(*merge, code=1)
    assert "in use" in service.snapctl(
        "cow", "extract", str(pair.cow), "--base", str(pair.base), "--out", "/tmp/no", code=1
    )
    service.snapctl("confirm", "u", "--yes")
    assert service.snapctl(*merge)


def test_one_daemon_a_state_directory(service: Service) -> None:
    command = [sys.executable, "-m", "snapd.rpc.serve", "serve", "--state-dir", str(service.state)]
    listen = f"unix:{service.directory}/other.sock"
    second = subprocess.run([*command, "--listen", listen], capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert "another snapd serves this state directory" in second.stderr


def test_sockets_are_private(service: Service, images: MakeImages) -> None:
    """DMU-188: whoever can connect can answer, or be answered."""
    create(service, images())
    uri = service.json("snapshot", "map", "u/s")["nbd_uri"]
    sockets = [uri.partition("socket=")[2], service.server.removeprefix("unix:")]
    sockets += [str(Path(sockets[0]).with_name("control.sock"))]
    for path in sockets:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600, path


def test_health_and_reflection(service: Service) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(service.server) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "snapd.v1.Updates", "snapd.v1.Snapshots", "snapd.v1.Devices"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection: Any = reflection_pb2_grpc
        stub = reflection.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
        names = {found.name for found in listed.list_services_response.service}
    assert {"snapd.v1.Updates", "snapd.v1.Snapshots", "snapd.v1.Devices", "grpc.health.v1.Health"} <= names


def test_errors_carry_their_reason(service: Service) -> None:
    """The errno travels as `ErrorInfo.reason`, so a client sees the error the service raised."""
    with service.client() as client, pytest.raises(SnapdError, match="there is no update x") as caught:
        client.get_update("updates/x")
    assert (caught.value.errno, caught.value.reason) == (errno.ENODEV, "ENODEV")


def test_an_unfinished_merge_claims_its_cow_without_any_process(short_dir: Path) -> None:
    """UNDO-28: base + COW alone would give a wrong image, and no lock is left to say so."""
    with Service(short_dir) as service:
        pair = make_images(short_dir, seed=1, blocks=1024)
        create(service, pair)
        undo = service.json("merge", "start", "u", "--wait")["snapshots"][0]["undo_path"]
    cow, base, out = str(pair.cow), str(pair.base), str(short_dir / "out.img")
    for verb in (
        ("extract", cow, "--base", base, "--out", out),
        ("merge", cow, "--base", base),
        ("create", "--source", base, "--target", base, "--out", cow),
    ):
        assert "a service has begun to merge it" in service.snapctl("cow", *verb, code=1)
    service.snapctl("cow", "extract", undo, "--base", base, "--out", out)
    assert Path(out).read_bytes() == pair.old
    with service:
        service.snapctl("update", "create", "v")
        assert "in use" in service.snapctl("snapshot", "create", "v/s", "--base", base, "--cow", cow, code=1)
        service.snapctl("confirm", "u", "--yes")
        assert not Path(f"{cow}.undo").exists()
        assert service.snapctl("cow", "merge", cow, "--base", base)


def test_a_cow_in_an_offline_merge_is_refused(service: Service, images: MakeImages) -> None:
    """UNDO-28: the base may hold half of each image."""
    pair = images()
    Path(f"{pair.cow}.undo").mkdir()
    service.snapctl("update", "create", "u")
    verb = ("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    assert "an offline merge of it has begun" in service.snapctl(*verb, code=1)


def test_a_block_device_as_base(service: Service, images: MakeImages) -> None:
    """UNDO-23: a device is merged like a file, and one that the new image does not fit on is refused at once."""
    pair = images()
    loop = attach_loop(pair.base)
    try:
        service.snapctl("update", "create", "u")
        service.snapctl("snapshot", "create", "u/s", "--base", loop, "--cow", str(pair.cow))
        assert read_device(service.json("snapshot", "map", "u/s")["nbd_uri"]) == pair.new
        service.snapctl("merge", "start", "u", "--wait")
        service.snapctl("confirm", "u", "--yes")
        service.snapctl("snapshot", "unmap", "u/s")
        assert Path(loop).read_bytes() == pair.new
        longer = service.directory / "longer"
        longer.mkdir()
        other = make_images(longer, seed=2, blocks=1024, new_blocks=4096)
        service.snapctl("update", "create", "v")
        verb = ("snapshot", "create", "v/s", "--base", loop, "--cow", str(other.cow))
        assert f"{loop} has {len(pair.new)} bytes, the new image needs" in service.snapctl(*verb, code=1)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def attach_loop(path: Path) -> str:
    """A loop device over a file; skips where there is none to be had."""
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("loop devices need root and losetup")
    result = subprocess.run(["losetup", "-f", "--show", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"no loop device: {result.stderr.strip()}")
    return result.stdout.strip()


def test_a_full_disk_stops_the_merge_and_room_resumes_it(short_dir: Path) -> None:
    """UNDO-17 as far as it goes: the undo store fills the disk; the state says so, both views stay exact."""
    state = short_dir / "state"
    state.mkdir(mode=0o700)
    pair = make_images(short_dir, seed=3, blocks=4096)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "snapd-test", str(state)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs root and mount")
    try:
        with Service(short_dir) as service:
            create(service, pair)
            uri = service.json("snapshot", "map", "u/s")["nbd_uri"]
            assert "No space left on device" in service.snapctl("merge", "start", "u", "--wait", code=1)
            failed = service.json("update", "show", "u")
            assert failed["state"] == "FAILED"
            assert read_device(uri) == pair.new
            old = str(short_dir / "old.img")
            undo = failed["snapshots"][0]["undo_path"]
            service.snapctl("cow", "extract", undo, "--base", str(pair.base), "--out", old)
            assert Path(old).read_bytes() == pair.old
            subprocess.run(["mount", "-o", "remount,size=64m", str(state)], check=True)
            assert service.json("merge", "start", "u", "--wait")["state"] == "MERGED"
            assert pair.base.read_bytes() == pair.new
            service.snapctl("confirm", "u", "--yes")
            assert (state / "reserve").stat().st_size == 1 << 20
    finally:
        subprocess.run(["umount", str(state)], check=True)
