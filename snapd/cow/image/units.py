"""Units: what one payload of a COW file stores, decoded, checked and cached.

Invariant: a unit that did not decode, or does not match the digests that are known, is never handed out, nor kept.
Workers read units: nothing here imports numpy.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from snapd.block.store import Buffer, Readable
from snapd.cow.compress import Decoder

CACHE_BYTES = 4 << 20

UnitCheck = Callable[[int, Buffer], None]
"""Called with (op index, decoded unit) before a unit is used; raises to refuse it."""


class UnitCache:
    """The decoded units of one file by op index, for any number of threads.

    Beyond `limit_bytes` the least recently used are dropped; the last one stays, however large it is.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._units: OrderedDict[int, memoryview] = OrderedDict()
        self._loading: dict[int, Lock] = {}
        self._lock = Lock()

    def get(self, index: int) -> memoryview | None:
        """The unit of op `index`, if it was used a short while ago."""
        unit = self._units.get(index)
        if unit is not None:
            # Without the lock, which costs more than both calls: each of them is atomic by itself.
            try:  # noqa: SIM105 - suppress() would take longer than all the rest
                self._units.move_to_end(index)
            except KeyError:  # dropped in between by another thread
                pass
        return unit

    def load(self, index: int, decode: Callable[[], Buffer]) -> memoryview:
        """The unit of op `index`, from `decode` unless it is there; raises what `decode` does, and keeps nothing then.

        Threads that want the same unit at once wait for the one that came first.
        """
        while True:
            with self._lock:
                unit = self._units.get(index)
                if unit is not None:
                    return unit
                loading = self._loading.get(index)
                if loading is None:
                    loading = self._loading[index] = Lock()
                    loading.acquire()
                    break
            # When this ends without a unit, the other one has failed, and the next to come tries for itself.
            with loading:
                pass
        try:
            unit = memoryview(decode())
            with self._lock:
                self._keep(index, unit)
            return unit
        finally:
            with self._lock:
                del self._loading[index]
            loading.release()

    def _keep(self, index: int, unit: memoryview) -> None:
        self._units[index] = unit
        self.held_bytes += len(unit)
        while self.held_bytes > self._limit_bytes and len(self._units) > 1:
            self.held_bytes -= len(self._units.popitem(last=False)[1])


class UnitReader:
    """Reads units of one file, through a cache that other readers of the file may share; itself for one thread."""

    def __init__(
        self, payloads: Readable, decoder: Decoder, *, check: UnitCheck | None = None, cache: UnitCache | None = None
    ) -> None:
        self._payloads = payloads
        self._decoder = decoder
        self._check = check
        self._cache = cache or UnitCache()

    def cached(self, index: int) -> memoryview | None:
        """The unit of op `index` if the cache has it."""
        return self._cache.get(index)

    def read(self, index: int, payload_offset: int, payload_bytes: int, unit_bytes: int) -> memoryview:
        """The unit of op `index` and of `unit_bytes`; `CowError` (EBADMSG) when it is damaged."""

        def decode() -> Buffer:
            payload = bytearray(payload_bytes)
            self._payloads.read_into(payload, payload_offset)
            unit = self._decoder.decode(payload, unit_bytes, op_index=index)
            if self._check is not None:
                self._check(index, unit)
            return unit

        return self._cache.load(index, decode)
