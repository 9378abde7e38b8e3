"""The device host: one thread, one loop, one device.

Each round: handle what is ready, hand the worker its messages (so that it works meanwhile), read what is passed
down, send the replies, and take in the requests that waited for the room this made. The host never opens, stats or
syncs its own export: a process that waits for itself cannot be killed.
"""

import errno
import os
import socket
import uuid
from collections.abc import Sequence

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.cow.image.extentmap import ExtentMap
from snapd.device.config import Descriptors, DeviceConfig
from snapd.device.control import ControlPort
from snapd.device.export import Export
from snapd.device.loop import Loop
from snapd.device.readpath import ReadPath
from snapd.device.supervisor import Process, Supervisor
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.target import Target
from snapd.merge.sharedmap import SharedMap
from snapd.proc import fence
from snapd.proc.child import Child
from snapd.proc.control import Message
from snapd.proc.log import Log

_CHANNEL_BUFFER_BYTES = 4 << 20


class Host:
    """Everything one device consists of; `run` serves it until `stop`.

    Errors of the constructor, after which nothing serves: EBADMSG for a damaged map, EINVAL when the maps, the
    snapshot and the size do not belong together.
    """

    def __init__(
        self, config: DeviceConfig, descriptors: Descriptors, connection: socket.socket, clock: Clock, log: Log
    ) -> None:
        self._config = config
        self._descriptors = descriptors
        self._clock = clock
        self._stopping = False
        shared, block_bytes = _load_maps(config, descriptors)
        self._target = Target(
            clock,
            attach_timeout_ms=config.attach_timeout_ms,
            restart_grace_ms=config.restart_grace_ms,
            request_timeout_ms=config.request_timeout_ms,
        )
        self._read_path = ReadPath(self._target, file_store(descriptors.base, "the base"), shared, block_bytes)
        self._loop = Loop()
        self._export = Export(
            self._loop,
            socket.socket(fileno=descriptors.nbd_listener),
            size_bytes=config.size_bytes,
            read_path=self._read_path,
            clock=clock,
            log=log,
        )
        self._supervisor = Supervisor(self._loop, self._target, self._start_worker, clock, log)
        self._control = ControlPort(
            self._loop, socket.socket(fileno=descriptors.control_listener), connection, self._do_verb
        )
        # A worker of a device host that died may still be there; its successor waits for its exit.
        fence.evict(descriptors.worker_fence)
        self._supervisor.start()

    def run(self) -> None:
        """Serve until the verb `stop`; ETIMEDOUT when the worker could not be ended."""
        while not self._stopping:
            self._settle()
            self._loop.run_once(self._timeout_ms())
            self._supervisor.expire()
            self._export.expire()
        self._export.close()
        self._target.destroy()
        self._supervisor.stop()

    def _settle(self) -> None:
        while True:
            self._read_path.submit_waiting()
            self._supervisor.send()
            if self._read_path.can_submit:
                continue
            self._read_path.read_local()
            if not self._export.flush() and not self._read_path.can_submit:
                return

    def _timeout_ms(self) -> int | None:
        deadlines = [self._supervisor.next_deadline_ms(), self._export.next_deadline_ms()]
        nearest = min((d for d in deadlines if d is not None), default=None)
        return None if nearest is None else max(0, nearest - self._clock.now_ms())

    def _do_verb(self, verb: str) -> tuple[Message, Sequence[int]]:
        if verb == "status":
            return self._status(), ()
        if verb == "adopt":
            return {"pid": os.getpid(), "device": self._config.to_dict()}, self._descriptors
        if verb == "stop":
            self._stopping = True
            return {}, ()
        raise SnapdError(errno.EINVAL, f"unknown verb {verb!r}")

    def _status(self) -> Message:
        return {
            "pid": os.getpid(),
            "worker_pid": self._supervisor.worker_pid,
            "worker_restarts": self._supervisor.restarts,
            "state": str(self._supervisor.state),
            "connections": len(self._export.connections),
            "in_flight_bytes": self._export.in_flight_bytes,
            "reads_passed_down": self._read_path.reads_passed_down,
            "reads_to_worker": self._read_path.reads_to_worker,
        }

    def _start_worker(self) -> tuple[Process, SocketChannel]:
        given = self._descriptors
        ours, theirs = socket.socketpair()
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BUFFER_BYTES)
            fds = (theirs.fileno(), given.cow, given.base, given.extent_map, given.shared_map, given.undo_directory)
            child = Child.spawn_fenced("snapd.worker", [], fds, fence.path_of(given.worker_fence))
        except OSError as error:
            ours.close()
            raise SnapdError.from_os(error, "start a worker") from error
        except SnapdError:
            ours.close()
            raise
        finally:
            theirs.close()
        return child, SocketChannel(self._target, ours)


def _load_maps(config: DeviceConfig, descriptors: Descriptors) -> tuple[SharedMap, int]:
    extent_map = ExtentMap.load(descriptors.extent_map)
    shared = SharedMap(descriptors.shared_map)
    if shared.snapshot != uuid.UUID(config.snapshot):
        raise SnapdError(errno.EINVAL, f"shared map of snapshot {shared.snapshot}, not {config.snapshot}")
    image_bytes = extent_map.block_count * extent_map.block_size
    if shared.block_count != extent_map.block_count or config.size_bytes != image_bytes:
        raise SnapdError(
            errno.EINVAL,
            f"a device of {config.size_bytes} bytes over maps of {image_bytes} bytes and {shared.block_count} blocks",
        )
    return shared, extent_map.block_size
