"""How a worker is started: by a service, with descriptors that it inherits, or by hand, with paths."""

import argparse
from collections.abc import Sequence

from snapd.proc.child import FIRST_FD

MAX_THREADS = 64
_NAMES = frozenset(
    {"channel", "arena", "fence", "base", "cow", "extent_map", "shared_map", "undo_directory"},
)
_USAGE = """\
python -m snapd.worker --channel PATH --base IMAGE [--cow COW] [--threads N] [--read-only]
       python -m snapd.worker --inherited NAME,NAME,... [--channel PATH] [--threads N] [--read-only]"""


class Arguments(argparse.Namespace):
    """What was asked for; `inherited` maps the name of a descriptor to its number."""

    channel: str | None
    base: str | None
    cow: str | None
    inherited: dict[str, int]
    threads: int
    read_only: bool


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Exits with status 2 and one line on standard error for anything that does not fit together."""
    parser = argparse.ArgumentParser(
        prog="python -m snapd.worker",
        usage=_USAGE,
        description="Answers a device's requests, from a COW over a base, or passed through to a store.",
    )
    parser.add_argument("--channel", metavar="PATH", help="a unix stream socket to connect to, or a dm-user node")
    parser.add_argument("--base", metavar="IMAGE", help="the old image under a COW, else the store to pass through to")
    parser.add_argument("--cow", metavar="COW", help="serve the new image that this COW makes of the base")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="connections, or opens of the node")
    parser.add_argument("--read-only", action="store_true", help="refuse to write to the store")
    parser.add_argument(
        "--inherited",
        metavar="NAMES",
        type=lambda text: {name: FIRST_FD + i for i, name in enumerate(text.split(","))},
        help=f"the descriptors from {FIRST_FD} on, of {', '.join(sorted(_NAMES))}",
    )
    parsed = parser.parse_args(arguments, namespace=Arguments())
    if not 1 <= parsed.threads <= MAX_THREADS:
        parser.error(f"{parsed.threads} threads: expected 1 to {MAX_THREADS}")
    if parsed.inherited is None:
        parsed.inherited = {}
        if parsed.base is None:
            parser.error("--base is missing")
    elif parsed.base is not None or parsed.cow is not None:
        parser.error("--base and --cow cannot go with --inherited")
    elif not parsed.inherited.keys() <= _NAMES or "base" not in parsed.inherited:
        parser.error(
            f"descriptors {', '.join(parsed.inherited)}: expected base, and others of {', '.join(sorted(_NAMES))}"
        )
    elif ("cow" in parsed.inherited) != ("extent_map" in parsed.inherited):
        parser.error("cow and extent_map go together")
    elif ("shared_map" in parsed.inherited) != ("undo_directory" in parsed.inherited):
        parser.error("shared_map and undo_directory go together")
    if (parsed.channel is None) == ("channel" not in parsed.inherited):
        parser.error("one channel is needed, by --channel or inherited")
    if parsed.channel is not None and "arena" in parsed.inherited:
        parser.error("an arena belongs to an inherited channel")
    if parsed.threads > 1 and parsed.channel is None:
        parser.error("an inherited channel has one thread")
    return parsed
