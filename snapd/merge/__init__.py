"""The reversible merge: the undo store, the old view, the span loop, and the process that runs it.

`docs/spec/reversible-merge.md` has the statements (UNDO-n) that this room implements.
"""
