"""Reading a COW file: from bytes of any version to checked op table, merge order and extent map."""
