"""`python -m snapd.worker`: answer a device's requests on one channel or several, until they end.

Exits 0 when the channel ended between two messages, or after SIGTERM when what was received is answered; 1 with one
line on standard error when it could not start, or the channel broke; 2 for a wrong command line.
"""

import sys
from collections.abc import Sequence

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.proc import fence
from snapd.proc.log import Log
from snapd.worker.arguments import parse_arguments
from snapd.worker.channels import open_channels
from snapd.worker.crew import hold_signals, run_crew
from snapd.worker.start import make_services


def main(arguments: Sequence[str]) -> int:
    parsed = parse_arguments(arguments)
    log = Log("ota-snapd worker", SystemClock())
    try:
        if not parsed.inherited:
            # Not at the top: it is of no use to a worker that a service starts.
            from snapd.worker.byhand import become_inheriting

            become_inheriting(parsed)
        # First: a node that is open keeps its requests, also while the last worker ends (DMU-78, DMU-189).
        channels = open_channels(parsed)
        # Before anything is read or answered: a predecessor that still lives could answer too (DMU-185).
        if "fence" in parsed.inherited:
            fence.hold(parsed.inherited["fence"])
        hold_signals()
        services = make_services(parsed, channels, log)
    except SnapdError as error:
        log.line(str(error))
        return 1
    return 0 if run_crew(services, log) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
