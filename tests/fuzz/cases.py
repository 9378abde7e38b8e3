"""Hostile files by number: a file of the corpus, changed as a draft that still hangs together and as bytes."""

from dataclasses import dataclass
from random import Random

from damage import DAMAGES
from draft import Seed
from hostiletables import make_table
from redraft import CHANGES

_MOST_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Case:
    """A file to try, the digests table beside it if there is one, and how they came about."""

    raw: bytes
    digests: bytes | None
    story: str


def make_case(number: int, seeds: list[Seed]) -> Case:
    """Case `number` of a corpus, the same every time."""
    random = Random(number)
    seed = random.choice(seeds)
    story = [seed.name]
    raw = bytearray(seed.raw)
    if seed.draft is not None:
        draft = seed.draft.copy()
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            change = random.choice(CHANGES)
            story.append(change.__name__)
            change(random, draft)
        raw = bytearray(draft.build())
    for _ in range(random.choice((0, 0, 0, 1, 1, 2, 4) if len(story) > 1 else (1, 1, 1, 2, 3))):
        damage = random.choice(DAMAGES)
        story.append(damage.__name__)
        damage(random, raw, random.choice(seeds).raw)
    file = bytes(raw[:_MOST_BYTES])
    digests = seed.digests
    if digests is None and random.random() < 0.3:
        digests, how = make_table(random, file)
        story.append(how)
    return Case(file, digests, ", ".join(story))
