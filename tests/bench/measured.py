"""Run a command, then print the seconds and the most bytes of memory it took.

    python measured.py COMMAND [ARGUMENT ...]

A process of its own, because a command is charged with what its parent had in memory when it was started.
"""

import resource
import subprocess
import sys
import time

if __name__ == "__main__":
    begin = time.perf_counter()
    subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
    print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
