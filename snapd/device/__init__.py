"""The device host: one process a device, playing the kernel's part.

Exports take requests (`nbd`, `connection`, `export`), the read path sends each range to the base or to the dm-user
target (`readpath`), the supervisor keeps a worker behind the target (`supervisor`), and the daemon speaks to the
host through `control`. `host` is the one loop that drives them all.
"""
