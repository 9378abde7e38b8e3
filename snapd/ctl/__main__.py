"""`python -m snapd.ctl`: the same as `snapctl`."""

import sys

from snapd.ctl.app import main

sys.exit(main())
