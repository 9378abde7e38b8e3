"""What every block of an image must read as, by the second reader and the digests that are known."""

import model
import tables
from modelcodecs import Damaged


class Expected:
    """The image of `block_count` blocks over `base`.

    A block that is neither `wrong` nor `doubtful` reads as in `content`. One that is `wrong` must raise: its unit does
    not decode, or it is not what its digest says. One that is `doubtful` may raise: its unit is checked as a whole, and
    another block of it is not what its digest says.
    """

    def __init__(self, reading: model.Reading, block_count: int, base: bytes, wanted: dict[int, int]) -> None:
        size = reading.block_size
        self.content = bytearray(base[: block_count * size].ljust(block_count * size, b"\0"))
        self.wrong: set[int] = set()
        self.doubtful: set[int] = set()
        self.changed = reading.owners()
        served: dict[int, list[int]] = {}
        for block, index in self.changed.items():
            served.setdefault(index, []).append(block)
        for index, blocks in served.items():
            op = reading.ops[index]
            try:
                content = reading.content(op, base)
            except Damaged:
                self.wrong.update(blocks)
                continue
            parts = [content[at : at + size] for at in range(0, len(content), size)]
            for block in blocks:
                self.content[block * size : block * size + size] = parts[block - op.block]
            # Also the blocks of it that a later op has taken.
            if op.kind == model.REPLACE and any(
                wanted.get(block, 0) not in (0, tables.block_digest(part)) for block, part in enumerate(parts, op.block)
            ):
                self.doubtful.update(blocks)
        for block, digest in wanted.items():
            here = bytes(self.content[block * size : block * size + size])
            if here and digest != tables.block_digest(here):
                self.wrong.add(block)
        self.doubtful -= self.wrong
