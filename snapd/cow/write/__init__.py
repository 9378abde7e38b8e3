"""Writing a COW file, versions 2 and 3: ops, labels, append, in an order that survives a power cut."""
