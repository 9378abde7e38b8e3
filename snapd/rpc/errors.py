"""From errno to gRPC status, with the details a program can act on (docs/api.md, "Errors")."""

import errno
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from snapd.block.errors import SnapdError

DOMAIN = "snapd.v1"

_CODES: dict[int, grpc.StatusCode] = {
    errno.EINVAL: grpc.StatusCode.INVALID_ARGUMENT,
    errno.ELOOP: grpc.StatusCode.INVALID_ARGUMENT,
    errno.ERANGE: grpc.StatusCode.OUT_OF_RANGE,
    errno.ENODEV: grpc.StatusCode.NOT_FOUND,
    errno.ENXIO: grpc.StatusCode.NOT_FOUND,
    errno.ENOENT: grpc.StatusCode.NOT_FOUND,
    errno.EPERM: grpc.StatusCode.PERMISSION_DENIED,
    errno.EACCES: grpc.StatusCode.PERMISSION_DENIED,
    errno.EALREADY: grpc.StatusCode.ALREADY_EXISTS,
    errno.EBUSY: grpc.StatusCode.FAILED_PRECONDITION,
    errno.EROFS: grpc.StatusCode.FAILED_PRECONDITION,
    errno.EOPNOTSUPP: grpc.StatusCode.FAILED_PRECONDITION,
    errno.ENOTCONN: grpc.StatusCode.FAILED_PRECONDITION,
    errno.EUCLEAN: grpc.StatusCode.FAILED_PRECONDITION,
    errno.ENOSPC: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errno.ENOMEM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errno.ETIMEDOUT: grpc.StatusCode.ABORTED,
    errno.EBADMSG: grpc.StatusCode.DATA_LOSS,
    errno.EAGAIN: grpc.StatusCode.UNAVAILABLE,
}


def code_of(error: SnapdError) -> grpc.StatusCode:
    """The status code for an error; INTERNAL for an errno outside the table."""
    return _CODES.get(error.errno, grpc.StatusCode.INTERNAL)


async def abort(context: Any, error: SnapdError) -> NoReturn:
    """End the call with the error's code, its message and an `ErrorInfo` that names its reason."""
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error), details=[info])
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status returned")
