"""`python -I -m snapd.device`: be the device host that the first control message describes.

Inherited descriptors: 3 control connection, 4 fence of this device's hosts. The first message is
`{"verb": "start", "device": {...}, "descriptors": [names]}` with the descriptors; the reply is sent when the device
serves. Exits 0 after the verb `stop`, or SIGTERM, when what was in flight is answered.
"""

import errno
import os
import socket
import sys

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, DeviceConfig
from snapd.device.control import refusal
from snapd.device.host import Host
from snapd.proc import control, fence
from snapd.proc.child import FIRST_FD
from snapd.proc.control import Message
from snapd.proc.log import Log

CONTROL_FD, FENCE_FD = FIRST_FD, FIRST_FD + 1


def main() -> int:
    fence.hold(FENCE_FD)
    clock = SystemClock()
    log = Log("ota-snapd device", clock)
    connection = socket.socket(fileno=CONTROL_FD)
    message: Message = {}
    try:
        received = control.receive(connection)
        if received is None:
            return 0
        message, fds = received
        if message.get("verb") != "start":
            raise SnapdError(errno.EINVAL, f"the first verb is {message.get('verb')!r} instead of 'start'")
        config = DeviceConfig.from_dict(message.get("device"))
        descriptors = Descriptors.from_message(message.get("descriptors"), fds)
        host = Host(config, descriptors, connection, clock, log)
        control.send(connection, {"ok": True, "pid": os.getpid(), "id": message.get("id")})
    except SnapdError as error:
        control.send(connection, {**refusal(error), "id": message.get("id")})
        return 1
    try:
        host.run()
    except SnapdError as error:
        log.line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
