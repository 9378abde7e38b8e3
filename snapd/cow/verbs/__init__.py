"""What `snapctl cow` does with files, without a daemon."""
