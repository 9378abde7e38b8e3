"""What a plan makes of an image: the reference files were written from such plans, and no COW is needed to follow one.

A plan has one command a line: `copy NEW SRC N`, `raw NEW N`, `zero NEW N`, `xor NEW N SRC_BLOCK BYTE_OFFSET`, and
`label V`, `seq BLOCK...`, `finalize`, `abort`, which change no block. The data of `raw` and `xor` are those that make
the block what it is in the target.
"""

from collections.abc import Iterable, Iterator

BLOCK = 4096


def commands(plan: Iterable[str], label: int | None = None) -> Iterator[list[str]]:
    """The commands of a plan, up to a label where one is given, or to where the writer was aborted."""
    for line in plan:
        command = line.split()
        if command == ["abort"] or (label is not None and command == ["label", str(label)]):
            return
        if command:
            yield command
    assert label is None, f"the plan has no label {label}"


def image_of(plan: Iterable[str], base: bytes, target: bytes, label: int | None = None) -> bytes:
    """The image that the plan stands for: the base, with what its commands change. Later ones win."""
    image = bytearray(base)
    for name, *numbers in commands(plan, label):
        if name not in ("copy", "raw", "zero", "xor"):
            continue
        new, *rest = map(int, numbers)
        count = rest[1] if name == "copy" else rest[0]
        start, length = new * BLOCK, count * BLOCK
        if name == "copy":
            content = base[rest[0] * BLOCK : rest[0] * BLOCK + length]
        elif name == "zero":
            content = bytes(length)
        else:
            content = target[start : start + length]
        assert len(content) == length
        image[start : start + length] = content
    return bytes(image)


def reader_blocks(plan: Iterable[str], label: int | None = None) -> list[int]:
    """The target blocks of the commands that read the base, in their order."""
    blocks = list[int]()
    for name, *numbers in commands(plan, label):
        if name in ("copy", "xor"):
            new, count = int(numbers[0]), int(numbers[2] if name == "copy" else numbers[1])
            blocks += range(new, new + count)
    return blocks
