"""The image that a COW stands for: runs of blocks, decoded units, the view. No numpy at start."""
