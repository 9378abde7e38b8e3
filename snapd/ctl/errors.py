"""From errors to what a user sees: one line on standard error, and the exit code."""

import contextlib
import errno
import sys
from collections.abc import Iterator

import typer

from snapd.block.errors import SnapdError

FAILED = 1


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn an expected error into its line and exit code 1; anything else is a fault of ours and keeps its traceback.

    Wrong usage (2), Ctrl-C (130) and a closed pipe are typer's own.
    """
    try:
        yield
    except SnapdError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        _fail(str(error))


@contextlib.contextmanager
def usage(option: str) -> Iterator[None]:
    """Make an error about the value of `option` one of usage: exit code 2."""
    try:
        yield
    except SnapdError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _fail(message: str) -> None:
    print(f"snapctl: {message}", file=sys.stderr)
    sys.exit(FAILED)
