"""The one error base of the project: a message that names what is wrong, and the errno it stands for.

Every layer above translates by `errno` alone (exit codes, dm-user answers, NBD errors, gRPC status), so an
error is described once, where it is found.
"""

import errno as _errno
import os

# The number has two names, and Python's table knows the other one.
_NAMES = {**_errno.errorcode, _errno.EOPNOTSUPP: "EOPNOTSUPP"}


class SnapdError(Exception):
    """Something the caller can be told.

    `errno` is a positive errno number; `reason` is its symbolic name (`"EBUSY"`), or a documented reason.
    """

    def __init__(self, errno: int, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.reason = reason or _NAMES.get(errno, str(errno))

    @classmethod
    def from_os(cls, error: OSError, doing: str) -> "SnapdError":
        """The same failure as `error`, with what was being done in front of the system's own words."""
        number = error.errno or _errno.EIO
        return cls(number, f"{doing}: {os.strerror(number)}")
