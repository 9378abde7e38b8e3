"""NBD on the wire, as far as this server and its client speak it. Everything is big-endian."""

import struct
from enum import IntEnum, IntFlag

DEFAULT_PORT = 10809
GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

GREETING = struct.Struct(">8s8sH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
STRUCTURED_REPLY = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, bytes that follow; what follows begins with one of the four structs below."""
DATA_CHUNK = struct.Struct(">Q")
HOLE_CHUNK = struct.Struct(">QI")
STATUS_CHUNK = struct.Struct(">I")
"""The context's id; then an `EXTENT` each."""
ERROR_CHUNK = struct.Struct(">IH")
"""Error number, bytes of the message; the message; for ERROR_OFFSET, the offset as in `DATA_CHUNK`."""
EXTENT = struct.Struct(">II")
STRING_LENGTH = struct.Struct(">I")

FIXED_NEWSTYLE = 1
NO_ZEROES = 2
EXPORT_NAME_PADDING = bytes(124)

HAS_FLAGS = 1
READ_ONLY = 2
SEND_FLUSH = 4
SEND_FUA = 8
SEND_TRIM = 32
SEND_WRITE_ZEROES = 64
SEND_DF = 128
CAN_MULTI_CONN = 256

MIN_READ_ONLY_BLOCK_BYTES = 1
MIN_WRITABLE_BLOCK_BYTES = 512
PREFERRED_BLOCK_BYTES = 4096
MAX_REQUEST_BYTES = 32 << 20

CHUNK_DONE = 1
"""Flag of the last chunk of a structured reply."""
ALLOCATION_CONTEXT = b"base:allocation"
ALLOCATION_CONTEXT_ID = 1
STATE_HOLE = 1
STATE_ZERO = 2


class Option(IntEnum):
    """The options this server knows; any other is answered `OptionReply.ERR_UNSUP`."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """Types of option replies; the top bit marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006


class Info(IntEnum):
    """Types of information in an `OptionReply.INFO`."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Commands of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class Chunk(IntEnum):
    """Types of the chunks of a structured reply; the top bit marks an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class NbdError(IntEnum):
    """Error numbers as they are on the wire, whatever the system calls them."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
