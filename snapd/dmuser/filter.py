"""The filter: bios that never become messages, decided without a round trip to the daemon (DMU-146).

A list of rules; the first that fits a bio decides, and what no rule fits goes to the daemon. The daemon can serve
everything, so a device has the same bytes with the filter and without.
"""

import errno
from collections.abc import Callable, Iterable
from typing import NamedTuple

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.message import is_flush

Handler = Callable[[Bio], None]
"""Takes a bio over: completes it, at once or later, or raises to refuse it."""
_EVERYWHERE = (0, 1 << 55)


class Rule(NamedTuple):
    """Bios of `ops` that lie wholly in sectors [first, end) go to `handler`; None is the daemon."""

    ops: frozenset[BioOp]
    first_sector: int
    end_sector: int
    handler: Handler | None

    def fits(self, bio: Bio) -> bool:
        """Whether this rule decides about the bio; a flush in either form is a FLUSH."""
        op = BioOp.FLUSH if is_flush(bio.op, bio.length, bio.flags) else bio.op
        end = bio.sector * SECTOR_BYTES + bio.length
        return op in self.ops and self.first_sector <= bio.sector and end <= self.end_sector * SECTOR_BYTES


def pass_down(first_sector: int, end_sector: int, handler: Handler, *, ops: Iterable[BioOp] = (BioOp.READ,)) -> Rule:
    """`handler` serves these operations in the range; a bio that reaches out of it goes on to the next rule."""
    return Rule(frozenset(ops), first_sector, end_sector, handler)


def fail(op: BioOp) -> Rule:
    """The operation ends with EIO wherever it lies, as if the kernel had killed it."""
    return Rule(frozenset({op}), *_EVERYWHERE, _kill)


def to_daemon(first_sector: int, end_sector: int, *, ops: Iterable[BioOp] = tuple(BioOp)) -> Rule:
    """An exception to the rules behind it."""
    return Rule(frozenset(ops), first_sector, end_sector, None)


def _kill(bio: Bio) -> None:
    raise SnapdError(errno.EIO, f"{bio.op.name} is switched off on this target")


class Filter:
    """The rules of one target, in order."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)

    def divert(self, bio: Bio) -> bool:
        """Hand the bio to its handler; False when it is for the daemon. Errors as the handler raises them."""
        for rule in self._rules:
            if rule.fits(bio):
                if rule.handler is None:
                    return False
                rule.handler(bio)
                return True
        return False
