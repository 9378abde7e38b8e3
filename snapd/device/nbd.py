"""NBD: wire constants, and the fixed newstyle handshake as a state machine.

The one export has the empty name, is read-only and may be used by several connections at once. Everything on the wire
is big-endian. An option's data and the number of options are bounded, whatever a client sends.
"""

import errno
import struct
from enum import IntEnum

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer

DEFAULT_PORT = 10809
GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

GREETING = struct.Struct(">8s8sH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")

FIXED_NEWSTYLE = 1
NO_ZEROES = 2
EXPORT_NAME_PADDING = bytes(124)

HAS_FLAGS = 1
READ_ONLY = 2
CAN_MULTI_CONN = 256
EXPORT_FLAGS = HAS_FLAGS | READ_ONLY | CAN_MULTI_CONN

MIN_BLOCK_BYTES = 1
PREFERRED_BLOCK_BYTES = 4096
MAX_REQUEST_BYTES = 32 << 20

MAX_OPTION_BYTES = 16 << 10
MAX_OPTIONS = 64


class Option(IntEnum):
    """The options this server knows; any other is answered `OptionReply.ERR_UNSUP`."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class OptionReply(IntEnum):
    """Types of option replies; the top bit marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
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


class Handshake:
    """One client's negotiation for an export of `size_bytes`.

    Send `greeting` first, then `feed` what comes until `finished` (the transmission phase begins) or `aborted`
    (the client wants no more: send the replies and close).
    """

    greeting = GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES)

    def __init__(self, size_bytes: int) -> None:
        self.finished = False
        self.aborted = False
        self._size_bytes = size_bytes
        self._client_flags: int | None = None
        self._options = 0

    def feed(self, received: Buffer) -> tuple[int, bytes]:
        """Take in whole options; returns the bytes used up and the replies to send.

        Errors: EPROTO for a client that does not speak fixed newstyle, or goes beyond a bound.
        """
        used = 0
        replies = bytearray()
        if self._client_flags is None:
            if len(received) < CLIENT_FLAGS.size:
                return 0, b""
            (flags,) = CLIENT_FLAGS.unpack_from(received)
            if flags & ~NO_ZEROES != FIXED_NEWSTYLE:
                raise SnapdError(errno.EPROTO, f"client flags {flags:#x}: fixed newstyle is needed, no more is known")
            self._client_flags = flags
            used = CLIENT_FLAGS.size
        while not self.finished and not self.aborted and len(received) - used >= OPTION.size:
            magic, option, length = OPTION.unpack_from(received, used)
            if magic != OPTION_MAGIC:
                raise SnapdError(errno.EPROTO, f"option magic {magic!r}")
            if length > MAX_OPTION_BYTES:
                raise SnapdError(errno.EPROTO, f"option {option} with {length} bytes: at most {MAX_OPTION_BYTES}")
            if len(received) - used < OPTION.size + length:
                break
            used += OPTION.size
            replies += self._answer(option, bytes(received[used : used + length]))
            used += length
            self._options += 1
            if self._options > MAX_OPTIONS:
                raise SnapdError(errno.EPROTO, f"more than {MAX_OPTIONS} options")
        return used, bytes(replies)

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        if option in (Option.INFO, Option.GO):
            return self._info(option, data)
        if option == Option.LIST:
            if data:
                return _reply(option, OptionReply.ERR_INVALID)
            # One export, whose name has no characters.
            return _reply(option, OptionReply.SERVER, struct.pack(">I", 0)) + _reply(option, OptionReply.ACK)
        if option == Option.ABORT:
            self.aborted = True
            return _reply(option, OptionReply.ACK)
        return _reply(option, OptionReply.ERR_UNSUP)

    def _export_name(self, name: bytes) -> bytes:
        if name:
            # This option has no error reply: the only refusal is to hang up.
            raise SnapdError(errno.EPROTO, f"no export {name[:64]!r}")
        self.finished = True
        assert self._client_flags is not None
        padding = b"" if self._client_flags & NO_ZEROES else EXPORT_NAME_PADDING
        return EXPORT_NAME_REPLY.pack(self._size_bytes, EXPORT_FLAGS) + padding

    def _info(self, option: int, data: bytes) -> bytes:
        # Name length, name, number of information requests, the requests; which we need not look at, since
        # everything there is to know is always sent.
        name_length = int.from_bytes(data[:4], "big")
        requests = int.from_bytes(data[4 + name_length : 6 + name_length], "big")
        if len(data) != 6 + name_length + 2 * requests:
            return _reply(option, OptionReply.ERR_INVALID)
        if name_length:
            return _reply(option, OptionReply.ERR_UNKNOWN)
        self.finished = option == Option.GO
        sizes = (MIN_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, MAX_REQUEST_BYTES)
        return (
            _reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, self._size_bytes, EXPORT_FLAGS))
            + _reply(option, OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
            + _reply(option, OptionReply.ACK)
        )


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data
