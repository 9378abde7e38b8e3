"""A batch: requests that are answered together, and the memory they are answered from.

Invariant: `on_ready` is called once, when nobody will touch the batch's memory any more.
"""

from collections.abc import Callable

from snapd.block.bio import Bio
from snapd.dmuser.arena import Region


class Batch:
    """One client's requests, numbered by `tag`; `errors` has the errno of those that failed.

    `region` is theirs, None where there is no payload. Whoever adds a piece of work counts it in `pending`, whoever
    ends one calls `piece_done` or `bio_done`; `seal` says that no more will be added.
    """

    __slots__ = ("errors", "on_ready", "pending", "region")

    def __init__(self, region: Region | None, on_ready: "Callable[[Batch], None]") -> None:
        self.region = region
        self.on_ready = on_ready
        self.errors: dict[int, int] = {}
        # One for whoever still adds.
        self.pending = 1

    @property
    def first_error(self) -> int:
        """An errno number if anything failed, else 0."""
        return next(iter(self.errors.values()), 0)

    def seal(self) -> None:
        """Nothing more will be added; calls `on_ready` when everything is done already."""
        self.pending -= 1
        if not self.pending:
            self.on_ready(self)

    def piece_done(self, tag: int, number: int) -> None:
        """A piece of request `tag` is done (0) or has failed (an errno number)."""
        if number:
            self.errors[tag] = number
        self.pending -= 1
        if not self.pending:
            self.on_ready(self)

    def bio_done(self, bio: Bio, number: int) -> None:
        """The same for a piece that was a bio."""
        if number:
            self.errors[bio.tag] = number
        self.pending -= 1
        if not self.pending:
            self.on_ready(self)
