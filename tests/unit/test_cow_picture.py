"""The picture of an image: its cells, the characters in a terminal, the pixels of the PNG."""

import io
import struct
import zlib
from array import array
from collections.abc import Sequence
from random import Random

import pytest

from snapd.cow.format import Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.cow.verbs.picture import THIN, Cell, draw
from snapd.ctl.blockpicture import png_picture, text_picture

COPY, REPLACE, ZERO, XOR = OpType.COPY, OpType.REPLACE, OpType.ZERO, OpType.XOR


def image(*runs: tuple[int, int]) -> ExtentMap:
    """The map of an image of these runs, each (blocks, kind)."""
    starts = [0]
    for blocks, _ in runs:
        starts.append(starts[-1] + blocks)
    return ExtentMap(
        block_size=4096,
        version=3,
        compression=Compression.NONE,
        max_unit=4096,
        ops_digest=0,
        starts=memoryview(array("I", starts)),
        whats=memoryview(array("Q", [kind << 60 for _, kind in runs])),
        records=b"",
        payloads=memoryview(array("Q")),
        digests=None,
    )


def test_one_cell_a_block_where_the_grid_is_large_enough() -> None:
    """Left to right, then down; what is left of the last row is outside."""
    picture = draw(image((3, UNCHANGED), (2, COPY), (1, XOR), (2, ZERO), (3, REPLACE)), columns=4, max_rows=3)
    assert picture.cell_blocks == 1
    assert picture.cells.tolist() == [
        [Cell.UNCHANGED, Cell.UNCHANGED, Cell.UNCHANGED, Cell.COPY],
        [Cell.COPY, Cell.XOR, Cell.ZERO, Cell.ZERO],
        [Cell.REPLACE, Cell.REPLACE, Cell.REPLACE, Cell.OUTSIDE],
    ]


def test_a_cell_of_many_blocks_shows_the_most_frequent_change() -> None:
    """Unchanged only if nothing changes; thin below one half; of equal kinds the most costly."""
    cells = {
        ((10, UNCHANGED),): Cell.UNCHANGED,
        ((9, UNCHANGED), (1, ZERO)): Cell.ZERO + THIN,
        ((5, UNCHANGED), (5, COPY)): Cell.COPY,
        ((6, UNCHANGED), (4, COPY)): Cell.COPY + THIN,
        ((3, UNCHANGED), (3, ZERO), (2, REPLACE), (2, XOR)): Cell.ZERO,
        ((4, ZERO), (2, UNCHANGED), (4, XOR)): Cell.XOR,
        ((4, REPLACE), (2, UNCHANGED), (4, XOR)): Cell.REPLACE,
        ((8, UNCHANGED), (1, COPY), (1, ZERO)): Cell.COPY + THIN,
    }
    picture = draw(image(*(run for runs in cells for run in runs)), columns=4, max_rows=2)
    assert picture.cell_blocks == 10
    assert picture.cells.ravel().tolist() == list(cells.values())


def test_a_short_last_cell_is_judged_by_its_own_blocks() -> None:
    """An image of 21 blocks in cells of four: the last one has a single block."""
    picture = draw(image((20, UNCHANGED), (1, COPY)), columns=3, max_rows=2)
    assert picture.cells.tolist() == [[1, 1, 1], [1, 1, Cell.COPY]]


def test_an_image_without_blocks_has_no_rows() -> None:
    """Nothing to show, and no error."""
    assert draw(image(), columns=10, max_rows=10).cells.shape == (0, 10)


def test_cells_agree_with_a_count_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images, also in several pieces: every cell is what counting block by block gives."""
    monkeypatch.setattr("snapd.cow.verbs.picture._RUNS_AT_ONCE", 7)
    cost = {kind: code for code, kind in enumerate((UNCHANGED, ZERO, COPY, XOR, REPLACE), start=1)}
    for seed in range(50):
        random = Random(seed)
        runs = [(random.randrange(1, 12), random.choice(list(cost))) for _ in range(random.randrange(1, 60))]
        blocks = [kind for length, kind in runs for _ in range(length)]
        picture = draw(image(*runs), columns=random.randrange(1, 9), max_rows=random.randrange(1, 5))
        expected = []
        for start in range(0, len(blocks), picture.cell_blocks):
            cell = blocks[start : start + picture.cell_blocks]
            changed = [kind for kind in cell if kind != UNCHANGED]
            most = max(cost, key=lambda kind: (changed.count(kind), cost[kind]))
            thin = THIN if 2 * len(changed) < len(cell) else 0
            expected.append(cost[most] + thin if changed else Cell.UNCHANGED)
        found = [code for code in picture.cells.ravel().tolist() if code != Cell.OUTSIDE]
        assert found == expected, seed


class Terminal(io.StringIO):
    """Where colours are shown."""

    def isatty(self) -> bool:
        return True


def test_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as the terminal, with legend and scale, readable without colour."""
    monkeypatch.setenv("COLUMNS", "5")
    runs = (60, UNCHANGED), (30, COPY), (10, REPLACE), (20, ZERO), (10, UNCHANGED), (8, XOR), (12, UNCHANGED)
    assert text_picture(image(*runs), io.StringIO()) == (
        ".....\n" * 6
        + "CCCCC\n" * 3
        + "RRRRR\n"
        + "ZZZZZ\n" * 2
        + ".....\n"
        + "XXXX.\n"
        + ".....\n"
        + ". unchanged  Zz zero  Cc copy  Xx XOR  Rr replace\n"
        + "a character is 2 blocks (8 KiB), a small letter means less than half of it"
    )


def test_small_letters_are_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of one block in a hundred is not lost; a short last row has no trailing blanks."""
    monkeypatch.setenv("COLUMNS", "40")
    rows = text_picture(image((63_200, UNCHANGED), (1, REPLACE), (99, UNCHANGED), (210, ZERO)), io.StringIO())
    assert rows.splitlines()[15] == "." * 32 + "rZZZ"


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One escape sequence a stretch; none in a pipe or when the user does not want them."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    small = image((2, UNCHANGED), (3, COPY))
    plain = text_picture(small, io.StringIO())
    assert text_picture(small, Terminal()).splitlines()[0] == "\x1b[90m..\x1b[0m\x1b[34mCCC\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert text_picture(small, Terminal()) == plain
    assert plain.splitlines()[0] == "..CCC"


def read_png(content: bytes) -> tuple[list[list[tuple[int, ...]]], str]:
    """Rows of RGB pixels and the description of an 8-bit palette PNG whose rows have no filter."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        body = content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"tEXt", b"PLTE", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    colours = [tuple(chunks[b"PLTE"][i : i + 3]) for i in range(0, len(chunks[b"PLTE"]), 3)]
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (width + 1)
    rows = [raw[y * (width + 1) : (y + 1) * (width + 1)] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return [[colours[code] for code in row[1:]] for row in rows], chunks[b"tEXt"].partition(b"\0")[2].decode("latin-1")


def middles(rows: Sequence[Sequence[tuple[int, ...]]], square: int) -> list[list[tuple[int, ...]]]:
    """One pixel of every square."""
    return [list(row[square // 2 :: square]) for row in rows[square // 2 :: square]]


def test_png_of_a_small_image() -> None:
    """Squares of many pixels, one a block; the description says what the colours are."""
    rows, text = read_png(png_picture(image((1, UNCHANGED), (1, COPY), (1, ZERO), (1, XOR), (1, REPLACE))))
    assert len(rows) == 256
    assert {len(row) for row in rows} == {512}
    grey, blue, green, purple, red, white = (
        *((208, 208, 208), (31, 119, 180), (44, 160, 44)),
        *((148, 60, 189), (214, 39, 40), (255, 255, 255)),
    )
    assert middles(rows, 128) == [[grey, blue, green, purple], [red, white, white, white]]
    assert text.startswith("128x128 pixels are 1 block (4 KiB); unchanged #d0d0d0, zero #2ca02c, copy #1f77b4,")


@pytest.mark.parametrize(
    ("blocks", "size", "scale"),
    [
        (1, (512, 512), "512x512 pixels are 1 block (4 KiB)"),
        (1000, (512, 512), "16x16 pixels are 1 block (4 KiB)"),
        (1 << 18, (512, 512), "a pixel is 1 block (4 KiB)"),
        (1 << 20, (1024, 1024), "a pixel is 1 block (4 KiB)"),
        ((1 << 20) + 1, (1024, 513), "a pixel is 2 blocks (8 KiB)"),
        ((1 << 32) - 1, (1024, 1024), "a pixel is 4096 blocks (16 MiB)"),
    ],
)
def test_a_png_has_at_most_1024_by_1024_pixels(blocks: int, size: tuple[int, int], scale: str) -> None:
    """Whatever the image's size; also the largest that the format knows."""
    rows, text = read_png(png_picture(image((blocks - 1, UNCHANGED), (1, REPLACE))))
    assert (len(rows[0]), len(rows)) == size
    assert text.startswith(scale + ";")


def test_a_pale_pixel_is_a_thin_cell() -> None:
    """One changed block of 4096 still shows."""
    rows, _ = read_png(png_picture(image((1, ZERO), ((1 << 32) - 2, UNCHANGED))))
    assert rows[0][:2] == [(149, 207, 149), (208, 208, 208)]
