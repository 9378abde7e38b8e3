"""How a COW file ends, in words."""

_OPEN = "open: a version 3 file does not say whether more was to come (COW-214)"
_OPEN_BUT_FINAL = "finished: version 3 has no mark for it (COW-214), but the digests are final"


def end_text(end: str, *, label: int | None, final_digests: bool) -> str:
    """What `CowFile.end` means for this file."""
    if end == "open":
        return _OPEN_BUT_FINAL if final_digests else _OPEN
    return f"cut at label {label}" if end == "label" else end
