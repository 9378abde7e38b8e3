"""The fixed newstyle handshake of an NBD server, as a state machine.

The one export has the empty name. An option's data and the number of options are bounded, whatever a client sends.
Besides the options every client uses, structured replies and the metadata context `base:allocation` can be negotiated;
TLS and extended headers cannot.
"""

import errno

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer
from snapd.device.nbd import (
    ALLOCATION_CONTEXT,
    ALLOCATION_CONTEXT_ID,
    CAN_MULTI_CONN,
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    FIXED_NEWSTYLE,
    GREETING,
    GREETING_MAGIC,
    HAS_FLAGS,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_REQUEST_BYTES,
    MIN_READ_ONLY_BLOCK_BYTES,
    MIN_WRITABLE_BLOCK_BYTES,
    NO_ZEROES,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK_BYTES,
    READ_ONLY,
    SEND_DF,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    STRING_LENGTH,
    Info,
    Option,
    OptionReply,
)

MAX_OPTION_BYTES = 16 << 10
MAX_OPTIONS = 64


class Handshake:
    """One client's negotiation for an export of `size_bytes`.

    Send `greeting` first, then `feed` what comes until `finished` (the transmission phase begins) or `aborted`
    (the client wants no more: send the replies and close). Then `structured` is whether replies are to be structured,
    and `allocation_context` whether block status may be asked for.
    """

    greeting = GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES)

    def __init__(self, size_bytes: int, *, read_only: bool, can_multi_conn: bool) -> None:
        self.finished = False
        self.aborted = False
        self.structured = False
        self.allocation_context = False
        self._size_bytes = size_bytes
        self._min_block_bytes = MIN_READ_ONLY_BLOCK_BYTES if read_only else MIN_WRITABLE_BLOCK_BYTES
        self._flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA
        self._flags |= READ_ONLY if read_only else SEND_TRIM | SEND_WRITE_ZEROES
        self._flags |= CAN_MULTI_CONN if can_multi_conn else 0
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
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._meta_context(option, data)
        if option in (Option.LIST, Option.STRUCTURED_REPLY) and data:
            return _reply(option, OptionReply.ERR_INVALID)
        if option == Option.LIST:
            # One export, whose name has no characters.
            return _reply(option, OptionReply.SERVER, STRING_LENGTH.pack(0)) + _reply(option, OptionReply.ACK)
        if option == Option.STRUCTURED_REPLY:
            self.structured = True
            return _reply(option, OptionReply.ACK)
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
        return EXPORT_NAME_REPLY.pack(self._size_bytes, self._export_flags()) + padding

    def _info(self, option: int, data: bytes) -> bytes:
        # Name length, name, number of information requests, the requests; which we need not look at, since
        # everything there is to know is always sent.
        name_length = int.from_bytes(data[:4], "big")
        requests = int.from_bytes(data[4 + name_length : 6 + name_length], "big")
        if len(data) != 6 + name_length + 2 * requests:
            return _reply(option, OptionReply.ERR_INVALID)
        if name_length:
            # What was set for our export is gone, now that the client has turned to another.
            self.allocation_context = False
            return _reply(option, OptionReply.ERR_UNKNOWN)
        self.finished = option == Option.GO
        sizes = (self._min_block_bytes, PREFERRED_BLOCK_BYTES, MAX_REQUEST_BYTES)
        return (
            _reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, self._size_bytes, self._export_flags()))
            + _reply(option, OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
            + _reply(option, OptionReply.ACK)
        )

    def _meta_context(self, option: int, data: bytes) -> bytes:
        if option == Option.SET_META_CONTEXT:
            # It replaces what was set before even when it fails.
            self.allocation_context = False
        strings = _strings(data)
        if strings is None or not self.structured:
            return _reply(option, OptionReply.ERR_INVALID)
        name, *queries = strings
        if name:
            return _reply(option, OptionReply.ERR_UNKNOWN)
        if option == Option.SET_META_CONTEXT:
            self.allocation_context = listed = ALLOCATION_CONTEXT in queries
        else:
            # To ask for nothing is to ask for everything.
            listed = not queries or ALLOCATION_CONTEXT in queries or b"base:" in queries
        context = STRING_LENGTH.pack(ALLOCATION_CONTEXT_ID) + ALLOCATION_CONTEXT
        found = _reply(option, OptionReply.META_CONTEXT, context) if listed else b""
        return found + _reply(option, OptionReply.ACK)

    def _export_flags(self) -> int:
        return self._flags | (SEND_DF if self.structured else 0)


def _strings(data: bytes) -> list[bytes] | None:
    """The export's name and the queries of a metadata context option; None when the lengths do not add up."""
    strings: list[bytes] = []
    at = 0
    count = 1
    while len(strings) < count:
        if len(data) - at < STRING_LENGTH.size:
            return None
        (length,) = STRING_LENGTH.unpack_from(data, at)
        at += STRING_LENGTH.size
        strings.append(data[at : at + length])
        at += length
        if len(strings) == 1:
            if len(data) - at < STRING_LENGTH.size:
                return None
            count += STRING_LENGTH.unpack_from(data, at)[0]
            at += STRING_LENGTH.size
    return strings if at == len(data) else None


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data
