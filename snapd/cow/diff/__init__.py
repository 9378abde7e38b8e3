"""From two images to ops: what is unchanged, copied, similar or new, and in which order it merges."""
