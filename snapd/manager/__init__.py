"""Updates and snapshots: states, their durable records, and the supervision of device hosts and mergers.

The control plane never touches block data: it opens, locks and hands on descriptors, and watches processes.
"""
