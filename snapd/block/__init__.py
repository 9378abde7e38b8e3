"""The ground: stores, extents, bios, the clock and the simulated disk.

Nothing here knows of processes, RPC or configuration. A *store* is seven verbs (`size`, `read_into`, `write`,
`flush`, `discard`, `zero`, `truncate`); everything above moves bytes through them, so that a test can put a
simulated disk under any protocol that must survive a power cut.
"""
